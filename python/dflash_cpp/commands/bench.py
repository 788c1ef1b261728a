"""dflash-cpp bench"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from .. import _core, benchmark, plots
from ..corpus import check_writable, write_json_atomically
from ..errors import DFlashError
from ..options import BACKENDS, KV_TYPES, check_path
from . import common
from .eval import load_samples

_EXAMPLES = """\
  dflash-cpp bench --target m2.gguf --drafter m2-dflash.gguf --data chat.jsonl --plot speed.png
  dflash-cpp bench --synthetic m2.7-2layer --simulate-accept 0.638,0.373,0.191,0.087 --json card.json
  dflash-cpp bench --synthetic m2.7,n_layer=8 --depths 1,2,auto --contexts 128,4096"""

_T = TypeVar("_T")


def comma_list(item: Callable[[str], _T]) -> Callable[[str], tuple[_T, ...]]:
    """An argparse type of comma-separated items."""

    def parse(text: str) -> tuple[_T, ...]:
        try:
            return tuple(item(part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers separated by commas, found {text!r}") from None

    return parse


def add(subparsers: common.Subparsers) -> None:
    """Declares the command."""
    d = benchmark.BenchOptions()
    summary = "measure plain decoding, fixed depths and the automatic one side by side"
    parser = common.add_command(subparsers, "bench", run, summary, _EXAMPLES)
    source = parser.add_argument_group("model")
    common.add_model_flags(source, required=False, plain="only plain decoding is measured")
    shapes = ", ".join(benchmark.SHAPES)
    source.add_argument("--synthetic", metavar="SHAPE", help=f"random weights: {shapes}, and k=v,... to change a shape")
    source.add_argument("--backend", choices=BACKENDS, default="auto")
    common.add_threads_flag(source)
    source.add_argument("--kv-type", choices=KV_TYPES, default=d.kv_type, help="cache type (default: %(default)s)")
    common.add_draft_head_flag(source)
    group = parser.add_argument_group("measurement")
    group.add_argument("--depths", type=comma_list(common.depth_value), default=None, metavar="N,...,auto",
                       help="beside plain decoding (default: 1,2,3,4,7,15,auto)")  # fmt: skip
    group.add_argument("--contexts", type=comma_list(int), default=d.contexts, metavar="N,...", help="prompt lengths")
    group.add_argument("--rounds", type=int, default=d.rounds, metavar="N", help="turns (default: %(default)s)")
    group.add_argument("--max-tokens", "-n", type=int, default=d.max_tokens, metavar="N", help="default: %(default)s")
    group.add_argument("--temperature", type=float, default=d.temperature, metavar="T", help="0: greedy")
    group.add_argument("--seed", type=int, default=d.seed, metavar="N")
    group.add_argument("--lookup", action="store_true", help="let prompt lookup compete in auto")
    group.add_argument("--simulate-accept", type=comma_list(float), default=(), metavar="P,...",
                       help="impose the chance that drafts 1..n all stand")  # fmt: skip
    group.add_argument("--simulate-spread", type=float, default=d.simulate_spread, metavar="S",
                       help="0..1: how much imposed chances differ from round to round, which the drafter's "
                       "confidences then tell (default: 0, they tell nothing)")  # fmt: skip
    group.add_argument("--data", nargs="+", metavar="FILE", help="prompts are cut from here (default: random tokens)")
    group.add_argument("--json", metavar="FILE", help="write all numbers there")
    group.add_argument("--plot", metavar="PNG", help="draw them (needs matplotlib: pip install 'dflash-cpp[plot]')")


def load_model(args: argparse.Namespace) -> _core.Model:
    """The files' model, or a synthetic one."""
    if (args.target is None) == (args.synthetic is None):
        raise DFlashError("expected either --target or --synthetic")
    if args.synthetic is not None and args.drafter is not None:
        raise DFlashError("--drafter: expected only with --target; --synthetic brings a drafter of random weights")
    if args.synthetic is not None:
        target, drafter = benchmark.synthetic_shape(args.synthetic)
        own_head = {"auto": "Q4_0", "q4_0": "Q4_0", "q8_0": "Q8_0", "target": None}[args.draft_head]
        return _core.Model.synthetic(
            target, drafter, draft_head=own_head, backend=args.backend, n_threads=common.thread_count(args)
        )  # fmt: skip
    drafter_path = None if args.drafter is None else check_path("drafter", args.drafter)
    with common.byte_progress(common.stderr_console()) as progress:
        return _core.Model(
            check_path("target", args.target), drafter_path, backend=args.backend, n_threads=common.thread_count(args),
            progress=progress, kv_type=args.kv_type, draft_head=args.draft_head,
            n_ctx=2 * (max(args.contexts, default=1) + args.max_tokens),  # a session of fixed depths and one of auto
        )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prints tables; 0."""
    if args.plot is not None:
        plots.need_matplotlib()
        check_writable("--plot", args.plot)
    if args.json is not None:
        check_writable("--json", args.json)
    options = benchmark.BenchOptions(
        depths=args.depths or (),
        contexts=args.contexts,
        rounds=args.rounds,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
        simulate_accept=args.simulate_accept,
        simulate_spread=args.simulate_spread,
        lookup=args.lookup,
        kv_type=args.kv_type,
    )
    tokens: Any = None
    if args.data is not None:
        if args.target is None:
            raise DFlashError("--data: expected --target, whose tokens they are")
        tokens = np.concatenate([s.tokens for s in load_samples(args, args.data, None)])
    model = load_model(args)
    block = 1 if model.drafter_config is None else int(model.drafter_config["block_size"])
    if args.depths is None:
        default = benchmark.BenchOptions().depths
        options = replace(options, depths=tuple(d for d in default if block > 1 and (d == "auto" or d < block)))
    bench = benchmark.Benchmark(model, options, tokens)
    console = common.stderr_console()
    with common.count_progress(console, "measurements") as progress:
        result = bench.run(progress)
    for table in benchmark.tables(result):
        common.stdout_console().print(table)
    if args.json is not None:
        write_json_atomically(args.json, result)
    if args.plot is not None:
        plots.plot_bench(result, args.plot)
    return 0
