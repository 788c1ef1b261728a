"""The `dflash-cpp` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import __version__
from .commands import bench, capture, chat, convert, demo, doctor, generate, inspect, selftest
from .commands import eval as eval_command
from .errors import DFlashError

COMMANDS = (generate, chat, convert, inspect, doctor, demo, eval_command, bench, selftest, capture)

_EXAMPLES = """\
examples:
  dflash-cpp demo
  dflash-cpp convert MiniMax-M2.7-AWQ-4bit -o m2.gguf
  dflash-cpp generate --target m2.gguf --drafter m2-dflash.gguf -p "def quicksort(" --stats"""

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(
        prog="dflash-cpp",
        description="MiniMax-M2.7 with a DFlash block drafter, from GGUF files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dflash-cpp {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 (demo: the outputs differ), 2 (wrong input), 130 (Ctrl-C)."""
    args = build_parser().parse_args(argv)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except DFlashError as e:
        print(f"dflash-cpp: {' '.join(str(e).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\ndflash-cpp: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`). Python flushes stdout once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
