"""dflash-cpp selftest"""

from __future__ import annotations

import argparse
import math

from .. import _core, selftest
from ..corpus import check_writable, write_json_atomically
from ..errors import DFlashError
from ..evaluate import check_anchors
from ..options import BACKENDS, check_path
from ..tokenizer import Tokenizer
from . import common
from .eval import load_samples

_EXAMPLES = """\
  dflash-cpp selftest --target m2.gguf --drafter m2-dflash.gguf
  dflash-cpp selftest --target m2.gguf --drafter m2-dflash.gguf --data heldout.npy --expect 1.38"""


def add(subparsers: common.Subparsers) -> None:
    """Declares the command."""
    summary = "say whether a drafter fits its target: tap numbering, mask token, acceptance"
    parser = common.add_command(subparsers, "selftest", run, summary, _EXAMPLES)
    parser.add_argument("--target", "-m", required=True, metavar="FILE", help="target GGUF")
    parser.add_argument("--drafter", "-md", required=True, metavar="FILE", help="drafter GGUF")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    common.add_threads_flag(parser)
    parser.add_argument("--data", nargs="+", metavar="FILE", help="held-out sequences (default: the target's own text)")
    parser.add_argument("--limit", type=int, default=6, metavar="N", help="sequences to use (default: %(default)s)")
    parser.add_argument("--anchors", type=int, default=12, metavar="N", help="blocks a sequence (default: %(default)s)")
    parser.add_argument("--expect", type=float, metavar="M", help="m_accept that the drafter's card promises")
    parser.add_argument(
        "--variants",
        action=argparse.BooleanOptionalAction,
        help="also try taps one layer off and the neighbouring mask ids, which loads the target again for each "
        f"(default: for targets up to {selftest.QUICK_BYTES >> 30} GiB, or when the acceptance looks wrong)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there")


def run(args: argparse.Namespace) -> int:
    """Prints variants and verdict; 0 when the drafter fits, 1 when not."""
    target, drafter = check_path("target", args.target), check_path("drafter", args.drafter)
    check_anchors(args.anchors, None, 0)
    if args.limit < 1:
        raise DFlashError(f"--limit: expected a number of at least 1, found {args.limit}")
    if args.expect is not None and not 0 <= args.expect < math.inf:
        raise DFlashError(f"--expect: expected a number of accepted tokens, found {args.expect}")
    if args.json is not None:
        check_writable("--json", args.json, [args.target, args.drafter, *(args.data or ())])
    samples, prompts = None, []
    if args.data is not None:
        samples = load_samples(args, args.data, args.limit)
    else:
        tokenizer = Tokenizer(_core.Gguf(target))
        prompts = [tokenizer.encode(p) for p in selftest.PROMPTS[: args.limit]]
    console = common.stderr_console()
    with common.count_progress(console, "variants") as progress:
        report = selftest.selftest(
            target,
            drafter,
            samples=samples,
            prompts=prompts,
            anchors=args.anchors,
            expected=args.expect,
            backend=args.backend,
            n_threads=common.thread_count(args),
            try_variants=args.variants,
            on_progress=progress,
        )
    out = common.stdout_console()
    out.print(report.table())
    for finding in report.findings:
        out.print(f"[red]does not fit:[/red] {finding}")
    if report.fits and report.complete:
        out.print("[green]the drafter fits its target[/green]")
    elif report.fits:
        out.print("[green]nothing looks wrong[/green]; taps off by one can hide so: --variants tries the neighbours")
    if args.json is not None:
        write_json_atomically(args.json, report.to_dict())
    return 0 if report.fits else 1
