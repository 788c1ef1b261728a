#!/usr/bin/env python3
"""Command line of the converter: `dflash-cpp convert`, or this file as a script from a bare checkout."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

if not __package__:  # run as a script: make the folder it lies in the package (PEP 366)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "convert"

from .api import ConvertReport, convert
from .drafter import TAP_CONVENTIONS
from .errors import ConvertError
from .plan import OUTTYPES

DESCRIPTION = (
    "Convert a MiniMax-M2 AWQ checkpoint, or a DFlash drafter for one, to GGUF. config.json tells which it is."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the converter's arguments to `parser`."""
    types = list(OUTTYPES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR", help="folder with config.json and safetensors files")
    parser.add_argument("-o", "--out", metavar="OUT.gguf", required=True, help="file to write; replaces an older GGUF")
    parser.add_argument(
        "--target-model", metavar="DIR", help="drafters: the target's checkpoint folder (config and tokenizer)"
    )
    parser.add_argument(
        "--outtype", type=str.lower, choices=types, help="type of unquantised matrices (default: as stored)"
    )
    parser.add_argument("--head", type=str.lower, choices=types, help="type of the output head (default: as stored)")
    parser.add_argument(
        "--embedding", type=str.lower, choices=types, help="type of the token embedding (default: as stored)"
    )
    parser.add_argument(
        "--tap-convention",
        choices=TAP_CONVENTIONS,
        default="after",
        help="drafters: target_layer_ids mean the stream after layer t (z-lab, default) or entering it",
    )
    parser.add_argument("--allow-inexact", action="store_true", help="round scales that f16 cannot hold exactly")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def run(args: argparse.Namespace, program: str = "error") -> int:
    """Convert as the parsed `args` say; print a summary, or one error line that begins with `program`. Return the exit
    status."""
    try:
        with _terminate_as_interrupt():
            report = convert(
                args.checkpoint,
                args.out,
                target_model=args.target_model,
                outtype=args.outtype,
                head=args.head,
                embedding=args.embedding,
                tap_convention=args.tap_convention,
                allow_inexact=args.allow_inexact,
                progress=not args.quiet,
            )
    except ConvertError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {args.out} was not written", file=sys.stderr)
        return 130
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    if not args.quiet:
        print(summary(report))
    return 0


def summary(report: ConvertReport) -> str:
    """Return the lines that tell a user what was written and how exactly."""
    types = ", ".join(f"{count} {name}" for name, count in sorted(report.types.items()))
    speed = report.bytes / max(report.seconds, 1e-9) / 2**20
    lines = [
        f"{report.path}: {report.arch}, {report.n_tensors} tensors ({types}), {report.bytes / 2**20:.1f} MiB "
        f"in {report.seconds:.1f} s ({speed:.0f} MiB/s)"
    ]
    if report.exact:
        lines.append("every weight has exactly the checkpoint's value, or the rounding of the type you chose")
    if report.scales_inexact:
        lines.append(f"{report.scales_inexact} of {report.scales} scales rounded to f16 (--allow-inexact)")
    if report.mins_rounded:
        lines.append(
            f"{report.mins_rounded} of {report.mins} group minimums rounded to Q4_1's f16, each by less than 0.0074 of "
            "a quantisation step; all integers and scales are the checkpoint's own"
        )
    if report.values_rounded:
        lines.append(f"{report.values_rounded} unquantised weights rounded to their new float type")
    return "\n".join(lines)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM clean up like Ctrl-C does, for the time of the conversion."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default: the process's arguments) and convert. Return the exit status."""
    parser = argparse.ArgumentParser(prog="convert_awq_to_gguf.py", description=DESCRIPTION)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
