"""dflash-cpp eval"""

from __future__ import annotations

import argparse

from .. import _core
from ..chat import ChatTemplate
from ..corpus import Sample, check_writable, read_corpus, write_json_atomically
from ..errors import DFlashError
from ..evaluate import PUBLISHED_SEED, check_anchors, evaluate
from ..options import check_path
from ..tokenizer import Tokenizer
from . import common

_EXAMPLES = """\
  dflash-cpp eval --target m2.gguf --drafter m2-dflash.gguf --data heldout.npy --anchor-range 256:1007
  dflash-cpp eval --target m2.gguf --drafter m2-dflash.gguf --data shards/*.safetensors --json table.json
  dflash-cpp eval --target m2.gguf --drafter m2-dflash.gguf --data notes.txt --anchors 32 --precise"""


def add(subparsers: common.Subparsers) -> None:
    """Declares the command."""
    summary = "the acceptance table of a drafter on sequences that the target wrote"
    parser = common.add_command(subparsers, "eval", run, summary, _EXAMPLES)
    common.add_engine_flags(parser)
    parser.set_defaults(n_ctx=None, draft_head="target")  # what the data needs; what cards evaluate
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help=".npy, .jsonl, .safetensors or text")
    parser.add_argument("--anchors", type=int, default=6, metavar="N", help="blocks a sequence (default: %(default)s)")
    parser.add_argument(
        "--anchor-range", type=anchor_range, metavar="LO:HI", help="positions of anchors (default: all)"
    )
    parser.add_argument(
        "--seed", type=int, default=PUBLISHED_SEED, metavar="N", help="of the anchors (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="sequences to use (default: all)")
    parser.add_argument("--block-rows", type=int, metavar="N", help="rows of a block (default: as trained)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")


def anchor_range(text: str) -> tuple[int, int]:
    """LO:HI, both ends included, for argparse."""
    low, colon, high = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return int(low), int(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected LO:HI, two positions, found {text!r}") from None


def load_samples(args: argparse.Namespace, files: list[str], limit: int | None) -> list[Sample]:
    """The sequences, checked against the target's vocabulary before any weight is loaded."""
    gguf = _core.Gguf(check_path("target", args.target))
    architecture = gguf.get("general.architecture")
    if architecture != "minimax-m2":
        raise DFlashError(
            f"{args.target}: general.architecture: 'minimax-m2' expected for the target, found {architecture!r}; "
            "target and drafter may be exchanged"
        )
    n_vocab = gguf.get("minimax-m2.vocab_size")
    if n_vocab is None:
        n_vocab = next((t.shape[-1] for t in gguf.tensors if t.name == "token_embd.weight"), 0)
    try:
        tokenizer = Tokenizer(gguf)
    except DFlashError:
        tokenizer = None  # token ids need none; read_corpus() says so where there is text
    template = None if tokenizer is None else ChatTemplate.from_gguf(gguf, tokenizer)
    return read_corpus(files, tokenizer, int(n_vocab), template=template, limit=limit)


def run(args: argparse.Namespace) -> int:
    """Prints the table; 0."""
    if args.drafter is None:
        raise DFlashError("--drafter: expected the drafter to evaluate, found none")
    check_anchors(args.anchors, args.anchor_range, args.seed)
    if args.json is not None:
        check_writable("--json", args.json, [args.target, args.drafter, *args.data])
    samples = load_samples(args, args.data, args.limit)
    if args.n_ctx is None:
        args.n_ctx = max(2, *(len(s.tokens) for s in samples))
    console = common.stderr_console()
    with common.load_engine(args, console) as engine, common.count_progress(console, "sequences") as progress:
        result = evaluate(
            engine.session,
            engine.block_size,
            samples,
            anchors=args.anchors,
            anchor_range=args.anchor_range,
            seed=args.seed,
            block_rows=args.block_rows,
            on_progress=progress,
        )
    common.stdout_console().print(result.table())
    if args.json is not None:
        write_json_atomically(args.json, result.to_dict())
    return 0
