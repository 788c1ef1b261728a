"""The `dflash-cpp` command."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # typing is slow to import, and everything up here runs before Ctrl-C is looked after
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_EXAMPLES = """\
examples:
  dflash-cpp demo
  dflash-cpp convert MiniMax-M2.7-AWQ-4bit -o m2.gguf
  dflash-cpp generate --target m2.gguf --drafter m2-dflash.gguf -p "def quicksort(" --stats"""

EXIT_NO_OUTPUT = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    import argparse

    from . import __version__
    from .commands import bench, capture, chat, convert, demo, doctor, generate, inspect, selftest
    from .commands import eval as eval_command

    parser = argparse.ArgumentParser(
        prog="dflash-cpp",
        description="MiniMax-M2.7 with a DFlash block drafter, from GGUF files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dflash-cpp {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (generate, chat, convert, inspect, doctor, demo, eval_command, bench, selftest, capture):
        command.add(subparsers)
    return parser


def _prepare_streams() -> None:
    """Streams that the caller closed become empty ones; characters that stdout's encoding lacks are shown as "?"."""
    import io
    from pathlib import Path

    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _drop_output() -> None:
    """Python flushes stdout once more at exit; let that go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupted() -> int:
    if sys.stderr is not None:
        print("\ndflash-cpp: interrupted", file=sys.stderr, flush=True)
    return EXIT_INTERRUPTED


class _ExitOnInterrupt:
    """Ctrl-C ends the program at once: for the half second of imports, some of which (numpy's) would turn a
    KeyboardInterrupt into an ImportError. Where SIGINT is ignored, or is the caller's, it stays so."""

    def __enter__(self) -> None:
        self._ours = False
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            try:
                signal.signal(signal.SIGINT, lambda number, frame: os._exit(_interrupted()))
                self._ours = True
            except ValueError:  # not the main thread, which gets no signals
                pass

    def __exit__(self, *exception: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(argv: Sequence[str] | None) -> int:
    with _ExitOnInterrupt():
        from .errors import DFlashError

        _prepare_streams()
        parser = build_parser()
    args = parser.parse_args(argv)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except DFlashError as e:
        print(f"dflash-cpp: {' '.join(str(e).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # the reader has gone (`| head`)
        _drop_output()
        return 0
    except OSError as e:  # what commands read and write by name has errors of its own
        _drop_output()
        print(f"dflash-cpp: standard output cannot be written: {e.strerror or e}", file=sys.stderr)
        return EXIT_NO_OUTPUT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 (demo: the outputs differ; output that cannot be written), 2
    (wrong input), 130 (Ctrl-C)."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return _interrupted()
