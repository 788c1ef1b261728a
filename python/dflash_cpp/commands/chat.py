"""dflash-cpp chat"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from rich.console import Console

from ..api import Engine, Stream
from ..errors import CapacityError, DFlashError
from ..options import GenerateOptions
from ..stats import Stats
from . import common

_EXAMPLES = """\
  dflash-cpp chat --target m2.gguf --drafter m2-dflash.gguf
  dflash-cpp chat --target m2.gguf --system "Answer in French." --temperature 1 --top-p 0.95 --top-k 40"""

_HELP = "/reset: start over   /stats: of the last answer   /quit: leave   Ctrl-C: stop an answer"


def add(subparsers: common.Subparsers) -> None:
    """Declares the command."""
    parser = common.add_command(subparsers, "chat", run, "talk to the model, turn by turn", _EXAMPLES)
    common.add_engine_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    common.add_generate_flags(parser, max_tokens=None)


def _read(console: Console) -> str | None:
    """One line from the user; None at the end of input. Ctrl-C at the prompt asks again."""
    if not sys.stdin.isatty():
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as e:
            raise DFlashError(f"standard input: expected UTF-8 text: {e}") from e
        return line.rstrip("\n") if line else None
    while True:
        try:
            return console.input("[bold]> [/bold]")
        except KeyboardInterrupt:
            console.print("\n/quit leaves")
        except EOFError:
            return None


def _answer(stream: Stream) -> bool:
    """Streams one answer; False when Ctrl-C stopped it. Where nobody can type, Ctrl-C ends the conversation."""
    try:
        for piece in stream:
            common.write_text(piece.text)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        stream.close()
        return False
    return True


def converse(engine: Engine, args: argparse.Namespace, console: Console) -> int:
    """The conversation itself."""
    start: list[dict[str, Any]] = [{"role": "system", "content": args.system}] if args.system else []
    messages, stats = list(start), None
    options = common.generate_options(args)
    while (line := _read(console)) is not None:
        command = line.strip()
        if command in ("/quit", "/exit"):
            break
        if command == "/reset":
            engine.reset()
            messages, stats = list(start), None
            console.print("started over")
        elif command == "/stats":
            console.print(stats.table() if isinstance(stats, Stats) else "no answer yet")
        elif command.startswith("/"):
            console.print(_HELP)
        elif command:
            messages.append({"role": "user", "content": line})
            try:
                stream = engine.stream(messages=messages, **options)
            except DFlashError as e:  # too long, or refused by the template: the conversation so far stands
                messages.pop()
                console.print(f"{e}; or /reset" if isinstance(e, CapacityError) else str(e), markup=False)
                continue
            finished = _answer(stream)
            result = stream.result
            stats = result.stats
            common.write_text("\n")
            if not finished:
                console.print("(stopped)")
            elif result.finish_reason == "context":
                console.print("(the context is full: /reset starts over)")
            if result.message is not None:
                messages.append(result.message)
    return 0


def run(args: argparse.Namespace) -> int:
    """Loads, then talks until /quit or the end of input; 0."""
    GenerateOptions(**common.generate_options(args))
    console = common.stderr_console()
    with common.load_engine(args, console) as engine:
        if engine.chat_template is None:
            raise DFlashError(f"{args.target}: it has no chat template; use dflash-cpp generate")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing, where Python has it)
        console.print(_HELP, markup=False)
        return converse(engine, args, console)
