"""dflash-cpp inspect"""

from __future__ import annotations

import argparse

from .. import inspect_gguf
from ..options import EngineOptions
from . import common

_EXAMPLES = """\
  dflash-cpp inspect m2.gguf --n-ctx 65536
  dflash-cpp inspect m2-dflash.gguf --tensors
  dflash-cpp inspect m2.gguf --json"""


def add(subparsers: common.Subparsers) -> None:
    """Declares the command."""
    parser = common.add_command(subparsers, "inspect", run, "show what a GGUF file holds and needs", _EXAMPLES)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument(
        "--n-ctx", type=int, default=8192, metavar="N", help="context for the memory need (default: %(default)s)"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="one JSON document")


def run(args: argparse.Namespace) -> int:
    """Prints the summary; 0."""
    EngineOptions(n_ctx=args.n_ctx)
    summary = inspect_gguf.summarize(args.file, n_ctx=args.n_ctx)
    if args.json:
        common.print_json(summary.to_dict())
    else:
        common.stdout_console().print(inspect_gguf.render(summary, show_tensors=args.tensors))
    return 0
