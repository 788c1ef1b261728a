#!/usr/bin/env python3
"""dflash_cpp against llama.cpp (llama-cpp-python) on the same GGUF: processes in turn, medians over all rounds.

    python bench/compare_llama_cpp.py mini-m2.gguf [slab.gguf ...] --threads 2 --rounds 3

Needs llama-cpp-python in this interpreter (or --llama-python PATH of one that has it) and a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def build(target: str) -> Path:
    """Builds a measuring program (bench/CMakeLists.txt) and returns its path."""
    out = HERE.parent / "build" / "bench"
    subprocess.run(["cmake", "-S", str(HERE), "-B", str(out)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(out), "--target", target], check=True, stdout=subprocess.DEVNULL)
    return out / target


def llama_worker(path: str, threads: int, seconds: float, rows: list[int], prefill: list[int]) -> None:
    """Runs in its own process: one JSON line {"step 1": [seconds...], ...}."""
    import ctypes
    import random

    import llama_cpp as ll

    quiet = ll.llama_log_callback(lambda *_: None)  # must stay alive
    ll.llama_log_set(quiet, ctypes.c_void_p(0))
    ll.llama_backend_init()
    # One thread is timed by its own CPU clock, which other processes on the machine disturb less (as bench_model does).
    clock = time.thread_time if threads == 1 else time.perf_counter
    start = time.perf_counter()
    mp = ll.llama_model_default_params()
    mp.n_gpu_layers = 0
    model = ll.llama_model_load_from_file(path.encode(), mp)
    cp = ll.llama_context_default_params()
    cp.n_ctx, cp.n_batch, cp.n_ubatch = 1024, 512, 512
    cp.n_threads = cp.n_threads_batch = threads
    ctx = ll.llama_init_from_model(model, cp)
    n_vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    batch = ll.llama_batch_init(512, 0, 1)
    rng = random.Random(7)
    result: dict[str, list[float]] = {}

    def run(n: int, pos: int, all_logits: bool) -> float:
        batch.n_tokens = n
        for i in range(n):
            batch.token[i] = rng.randrange(n_vocab)
            batch.pos[i] = pos + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = int(all_logits or i == n - 1)
        t = clock()
        if ll.llama_decode(ctx, batch) != 0:
            raise RuntimeError("llama_decode failed")
        ll.llama_synchronize(ctx)
        return clock() - t

    run(1, 0, True)
    result["open"] = [time.perf_counter() - start]
    memory = ll.llama_get_memory(ctx)
    for what, sizes in (("step", rows), ("prefill", prefill)):
        for n in sizes:
            times: list[float] = []
            pos, end = 0, time.perf_counter() + seconds
            ll.llama_memory_seq_rm(memory, 0, -1, -1)
            run(n, 0, what == "step")
            while time.perf_counter() < end or len(times) < 3:
                pos = pos + n if pos + 2 * n <= 256 and what == "step" else 0
                ll.llama_memory_seq_rm(memory, 0, pos, -1)
                times.append(run(n, pos, what == "step"))
            result[f"{what} {n}"] = times
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rows", default="1,2,4,8")
    parser.add_argument("--prefill", default="128,512")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows, prefill = ([int(n) for n in part.split(",") if n] for part in (args.rows, args.prefill))
    if args.worker:
        llama_worker(args.gguf[0], args.threads, args.seconds, rows, prefill)
        return

    program = build("bench_model")
    print("file\twork\trows\tllama.cpp ms\tdflash_cpp ms\tratio of medians\tper round")
    for path in args.gguf:
        ours: dict[str, list[float]] = {}
        theirs: dict[str, list[float]] = {}
        common = ["--threads", str(args.threads), "--seconds", str(args.seconds)]
        common += ["--rows", args.rows, "--prefill", args.prefill]
        for _ in range(args.rounds):
            command = [args.llama_python, __file__, path, "--worker", *common]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for key, times in json.loads(out.splitlines()[-1]).items():
                theirs.setdefault(key, []).append(statistics.median(times))
            command = [str(program), "--gguf", path, "--isa", args.isa, *common]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for line in out.splitlines():
                what, *fields = line.split("\t")
                if what in ("step", "prefill"):
                    ours.setdefault(f"{what} {fields[0]}", []).append(float(fields[1]) / 1e6)
                if what == "load":
                    ours.setdefault("open", []).append(float(fields[1]) / 1e6)
        for key, mine in ours.items():
            a, b = statistics.median(theirs[key]), statistics.median(mine)
            ratios = " ".join(f"{x / y:.2f}" for x, y in zip(theirs[key], mine, strict=True))
            what, _, n = key.partition(" ")
            print(f"{Path(path).name}\t{what}\t{n}\t{a * 1e3:.3f}\t{b * 1e3:.3f}\t{a / b:.2f}\t{ratios}", flush=True)


if __name__ == "__main__":
    main()
