"""dflash-cpp generate"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from .. import _core
from ..errors import CapacityError, DFlashError
from ..options import check_path
from ..tokenizer import Tokenizer
from . import common

_EXAMPLES = """\
  dflash-cpp generate --target m2.gguf --drafter m2-dflash.gguf -p "def quicksort(" --stats
  dflash-cpp generate --target m2.gguf --prompt-file notes.txt --temperature 1 --top-p 0.95 --top-k 40
  echo "Once upon" | dflash-cpp generate --target m2.gguf --json"""


def add(subparsers: common.Subparsers) -> None:
    """Declares the command."""
    parser = common.add_command(subparsers, "generate", run, "continue a text", _EXAMPLES)
    common.add_engine_flags(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", "-p", metavar="TEXT", help="the text (default: standard input)")
    source.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file with the text")
    parser.add_argument("--chat", action="store_true", help="send the text as a user message through the chat template")
    common.add_generate_flags(parser, max_tokens=256)
    parser.add_argument("--stats", action="store_true", help="a table of statistics on standard error")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of streamed text")


def _prompt(args: argparse.Namespace, console: Console) -> str:
    if args.prompt is not None:
        return str(args.prompt)
    if args.prompt_file is not None:
        return common.read_text_file("--prompt-file", args.prompt_file)
    if sys.stdin.isatty():
        console.print("type the prompt; Ctrl-D on a line of its own ends it")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as e:
        raise DFlashError(f"standard input: expected UTF-8 text: {e}") from e


def _check_length(args: argparse.Namespace, prompt: str) -> None:
    """Refuses a prompt longer than the context before minutes of loading. A token stands for a byte or more."""
    if len(prompt.encode(errors="replace")) <= args.n_ctx:
        return
    n = len(Tokenizer(_core.Gguf(check_path("target", args.target))).encode(prompt))
    if n > args.n_ctx:
        raise CapacityError(
            f"prompt: expected at most n_ctx = {args.n_ctx} tokens, found {n}; shorten it or raise --n-ctx"
        )


def run(args: argparse.Namespace) -> int:
    """Streams the text; 0."""
    console = common.stderr_console()
    options = common.generate_options(args)
    common.engine_options(args)
    prompt = _prompt(args, console)
    if not prompt:
        raise DFlashError("prompt: expected text, found an empty string")
    _check_length(args, prompt)
    with common.load_engine(args, console) as engine:
        messages = [{"role": "user", "content": prompt}] if args.chat else None
        with engine.stream(None if args.chat else prompt, messages=messages, **options) as stream:
            for piece in stream:
                if not args.json:
                    common.write_text(piece.text)
            result = stream.result
    if args.json:
        common.print_json(
            {
                "text": result.text,
                "tokens": result.tokens,
                "finish_reason": result.finish_reason,
                "stop": result.stop,
                "stats": result.stats.to_dict(),
            }
        )
    else:
        common.write_text("\n")
    if args.stats:
        console.print(result.stats.table())
    return 0
