#!/usr/bin/env python3
"""Each CPU kernel on real layer shapes: time, bandwidth, share of the measured read bandwidth, arithmetic.

    python bench/bench_ops.py --threads 1 --rows 1,4,16            # full M2.7 shapes
    python bench/bench_ops.py --model mini --threads 2
    python bench/bench_ops.py --instructions                        # callgrind counts (repeatable), AVX2 kernels

Builds bench/bench_ops.cpp first. Needs a C++ compiler; --instructions needs valgrind.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

from compare_llama_cpp import build

# Kernel function -> the ops of bench_ops that exercise it.
KERNELS = {"panels": "q_proj Q4_0", "quantize": "q_proj Q4_0", "float_rows": "q_proj BF16", "swiglu": "moe Q4_0",
           "attention_chunk": "attention F16"}  # fmt: skip


def table(program: Path, args: argparse.Namespace) -> None:
    command = [str(program), "--threads", str(args.threads), "--isa", args.isa, "--model", args.model]
    command += ["--rows", args.rows] + (["--only", args.only] if args.only else [])
    command += ["--no-repack"] if args.no_repack else []
    read = 0.0
    print(f"{'op':<24}{'rows':>5}{'us':>11}{'GB/s':>8}{'of read':>9}{'GMAC/s':>9}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            name, *fields = line.rstrip("\n").split("\t")
            if name == "backend":
                print(f"# {fields[0]}")
            elif name == "read":
                read = float(fields[0])
                print(f"# reads {read:.1f} GB/s")
            else:
                rows, us, bytes_, macs = (float(f) for f in fields)
                rate = bytes_ / us / 1e3
                print(
                    f"{name:<24}{rows:>5.0f}{us:>11.2f}{rate:>8.1f}{rate / read:>9.0%}{macs / us / 1e3:>9.1f}",
                    flush=True,
                )


def instructions(program: Path) -> None:
    """Instructions inside each kernel for one op on mini shapes; valgrind knows AVX2, not AVX-512."""
    for kernel, op in KERNELS.items():
        with tempfile.TemporaryDirectory() as folder:
            command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", "--collect-atstart=no"]
            command += [f"--toggle-collect=*dflash::cpu::(anonymous namespace)::{kernel}*", str(program)]
            command += ["--isa", "avx2", "--model", "mini", "--threads", "1", "--rows", "1", "--only", op]
            command += ["--once", "--no-bandwidth"]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            found = re.search(r"Collected : (\d+)", result.stderr)
            print(f"{kernel:<18}{op:<16}{int(found.group(1)) if found else 0:>12,} instructions", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--model", choices=["full", "mini"], default="full")
    parser.add_argument("--rows", default="1,2,4,8,16")
    parser.add_argument("--only", default="")
    parser.add_argument("--no-repack", action="store_true")
    parser.add_argument("--instructions", action="store_true")
    args = parser.parse_args()
    program = build("bench_ops")
    if args.instructions:
        instructions(program)
    else:
        table(program, args)


if __name__ == "__main__":
    main()
