"""dflash-cpp demo"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from .. import demo
from ..errors import DFlashError
from ..options import GenerateOptions
from . import common

_EXAMPLES = """\
  dflash-cpp demo
  dflash-cpp demo --depth 3 --max-tokens 400
  dflash-cpp demo --model-dir my-checkpoints   # one target's and one drafter's folder"""


def add(subparsers: common.Subparsers) -> None:
    """Declares the command."""
    summary = "convert the small embedded pair and generate without and with the drafter"
    parser = common.add_command(subparsers, "demo", run, summary, _EXAMPLES)
    parser.add_argument("--prompt", "-p", default=demo.PROMPT, metavar="TEXT", help="default: the head of a module")
    parser.add_argument("--max-tokens", "-n", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--depth", type=common.depth_value, default="auto", metavar="auto|N", help="drafts per round")
    common.add_threads_flag(parser)
    parser.add_argument("--model-dir", metavar="DIR", help="checkpoint folders of another pair")


def run(args: argparse.Namespace) -> int:
    """0 when both outputs are identical, 1 when not."""
    GenerateOptions(max_tokens=args.max_tokens, depth=args.depth)
    model_dir = demo.embedded_model_dir() if args.model_dir is None else Path(args.model_dir)
    if not model_dir.is_dir():
        raise DFlashError(f"--model-dir: expected a folder at {model_dir}, found none")
    console = common.stderr_console()
    with tempfile.TemporaryDirectory(prefix="dflash-cpp-demo-") as tmp:
        console.rule("converting the checkpoints to GGUF")
        pair = demo.convert_pair(model_dir, Path(tmp), progress=True)
        comparison = demo.compare(
            pair,
            prompt=args.prompt,
            max_tokens=args.max_tokens,
            depth=args.depth,
            n_threads=args.threads,
            announce=console.rule,
            write=common.write_text,
        )
    common.stdout_console().print(demo.table(comparison))
    if not comparison.identical:
        console.print("[red]the outputs differ: this is a bug, please report it[/red]")
        return 1
    console.print("both outputs are identical")
    return 0
