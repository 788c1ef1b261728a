"""dflash-cpp capture"""

from __future__ import annotations

import argparse

from ..capture import DTYPES, CaptureOptions, capture
from ..errors import DFlashError
from . import common
from .eval import load_samples

_EXAMPLES = """\
  dflash-cpp capture --target m2.gguf --drafter m2-dflash.gguf --prompts prompts.jsonl --out shards
  dflash-cpp capture --target m2.gguf --drafter m2-dflash.gguf --prompts p.npy --out shards --dtype fp8_e4m3"""


def add(subparsers: common.Subparsers) -> None:
    """Declares the command."""
    d = CaptureOptions()
    summary = "write the target's own answers and hidden states, to train a drafter on"
    parser = common.add_command(subparsers, "capture", run, summary, _EXAMPLES)
    common.add_engine_flags(parser)
    parser.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".jsonl (text or messages), .npy or text (one prompt)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of shards; a run cut short goes on there")
    parser.add_argument("--limit", type=int, metavar="N", help="prompts to use (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default=d.dtype, help="of hidden states (default: %(default)s)")
    parser.add_argument("--max-tokens", "-n", type=int, default=d.max_tokens, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=d.temperature, metavar="T", help="0: greedy")
    parser.add_argument("--top-k", type=int, default=d.top_k, metavar="K", help="0: off")
    parser.add_argument("--top-p", type=float, default=d.top_p, metavar="P", help="1: off")
    parser.add_argument("--seed", type=int, default=d.seed, metavar="N", help="of the first prompt; then one more each")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")


def run(args: argparse.Namespace) -> int:
    """Writes the shards; 0."""
    if args.drafter is None:
        raise DFlashError("--drafter: expected a drafter (it says which layers are tapped), found none")
    options = CaptureOptions(
        dtype=args.dtype,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
    )
    prompts = load_samples(args, args.prompts, args.limit)
    console = common.stderr_console()
    with common.load_engine(args, console) as engine, common.count_progress(console, "shards") as progress:
        paths = capture(engine, prompts, args.out, options, on_progress=progress)
    common.stdout_console().print(f"{args.out}: {len(paths)} shard{'s' if len(paths) != 1 else ''}")
    return 0
