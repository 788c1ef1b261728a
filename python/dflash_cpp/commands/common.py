"""What several commands share: consoles, engine and sampling flags, progress."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ..api import Engine
from ..errors import DFlashError
from ..options import BACKENDS, DRAFT_HEADS, KV_TYPES, NUMA, EngineOptions, GenerateOptions

if TYPE_CHECKING:
    from ..options import EngineKwargs, GenerateKwargs

_FILE_WIDTH: Final = 120  # columns

Subparsers = Any  # argparse has no public name for the type of add_subparsers()


def stdout_console() -> Console:
    """For results. A pipe or a file has no width: tables stay whole there."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    return console


def stderr_console() -> Console:
    """For progress, tables beside an answer, and messages."""
    return Console(stderr=True, highlight=False)


def add_command(
    subparsers: Subparsers, name: str, run: Callable[[argparse.Namespace], int], summary: str, examples: str
) -> argparse.ArgumentParser:
    """A subcommand whose help ends with examples."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def depth_value(text: str) -> int | Literal["auto"]:
    """ "auto" or a number, for argparse."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected 'auto' or a number, found {text!r}") from None


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """--target, --drafter and the fields of `EngineOptions`."""
    d = EngineOptions()
    group = parser.add_argument_group("model")
    add_model_flags(group)
    group.add_argument("--backend", choices=BACKENDS, default=d.backend)
    group.add_argument("--precise", action="store_true", help="f32 activations: the slower reference mode")
    group.add_argument(
        "--n-ctx", "-c", type=int, default=d.n_ctx, metavar="N", help="context in tokens (default: %(default)s)"
    )
    add_threads_flag(group)
    group.add_argument("--kv-type", choices=KV_TYPES, default=d.kv_type, help="cache type (default: %(default)s)")
    group.add_argument("--n-batch", type=int, default=d.n_batch, metavar="N",
                       help="prompt tokens of a prefill chunk (default: %(default)s)")  # fmt: skip
    group.add_argument("--cpu-isa", default=d.cpu_isa, metavar="NAME", help="one that doctor lists (default: the best)")
    group.add_argument("--no-repack", action="store_true", help="use the weights where the file is mapped: slower")
    group.add_argument("--numa", choices=NUMA, default=d.numa, help="memory over NUMA nodes (default: %(default)s)")
    add_draft_head_flag(group)


def add_model_flags(group: argparse._ActionsContainer, *, required: bool = True, plain: str = "") -> None:
    """--target and --drafter. plain: what happens without a drafter, for the help."""
    group.add_argument("--target", "-m", required=required, metavar="FILE", help="target GGUF")
    without = plain or "decoding is plain"
    group.add_argument("--drafter", "-md", metavar="FILE", help=f"drafter GGUF; without it {without}")


def add_threads_flag(group: argparse._ActionsContainer) -> None:
    """--threads."""
    group.add_argument("--threads", "--n-threads", "-t", type=int, metavar="N",
                       help="CPU threads (default: one for each usable core)")  # fmt: skip


def thread_count(args: argparse.Namespace) -> int:
    """--threads as the compiled engine takes it: 0 for the default. Raises DFlashError for values out of range."""
    return EngineOptions(n_threads=args.threads).n_threads or 0


def add_draft_head_flag(group: argparse._ArgumentGroup) -> None:
    """--draft-head."""
    group.add_argument(
        "--draft-head",
        choices=DRAFT_HEADS,
        default=EngineOptions().draft_head,
        help="head to draft with: the target's, or a smaller copy of it (default: %(default)s)",
    )


def add_generate_flags(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    """The fields of `GenerateOptions` that make sense in a shell."""
    d = GenerateOptions()
    group = parser.add_argument_group("generation")
    most = f"most tokens to generate (default: {max_tokens or 'until the context is full'})"
    group.add_argument("--max-tokens", "-n", type=int, default=max_tokens, metavar="N", help=most)
    group.add_argument("--depth", type=depth_value, default=d.depth, metavar="auto|N",
                       help="drafts per round (default: %(default)s)")  # fmt: skip
    group.add_argument("--temperature", type=float, default=d.temperature, metavar="T", help="0: greedy")
    group.add_argument("--top-k", type=int, default=d.top_k, metavar="K", help="0: off")
    group.add_argument("--top-p", type=float, default=d.top_p, metavar="P", help="1: off")
    group.add_argument("--min-p", type=float, default=d.min_p, metavar="P", help="0: off")
    group.add_argument("--seed", type=int, metavar="N", help="default: drawn, and shown by --stats")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    group.add_argument("--repetition-penalty", type=float, default=d.repetition_penalty, metavar="X", help="1: off")
    group.add_argument("--presence-penalty", type=float, default=d.presence_penalty, metavar="X", help="0: off")
    group.add_argument("--frequency-penalty", type=float, default=d.frequency_penalty, metavar="X", help="0: off")
    group.add_argument("--penalty-last-n", type=int, default=d.penalty_last_n, metavar="N",
                       help="tokens that the penalties look back at (default: %(default)s; -1: all)")  # fmt: skip
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    group.add_argument("--no-lookup", action="store_true", help="no drafts from n-gram matches")


def generate_options(args: argparse.Namespace) -> GenerateKwargs:
    """Checked keyword arguments for `Engine.stream`. Raises DFlashError for values out of range."""
    options: GenerateKwargs = {
        "max_tokens": args.max_tokens,
        "depth": args.depth,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "seed": args.seed,
        "stop": tuple(args.stop),
        "repetition_penalty": args.repetition_penalty,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "penalty_last_n": args.penalty_last_n,
        "ignore_eos": args.ignore_eos,
        "lookup": not args.no_lookup,
    }
    GenerateOptions(**options)  # before minutes of loading
    return options


@contextmanager
def byte_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A function of (stage, done bytes, total bytes) that draws one bar for each stage."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


def engine_options(args: argparse.Namespace) -> EngineKwargs:
    """Checked keyword arguments for `Engine`. Raises DFlashError for values out of range."""
    options: EngineKwargs = {
        "backend": args.backend,
        "precise": args.precise,
        "n_ctx": args.n_ctx,
        "n_threads": args.threads,
        "kv_type": args.kv_type,
        "n_batch": args.n_batch,
        "cpu_isa": args.cpu_isa,
        "repack": not args.no_repack,
        "numa": args.numa,
        "draft_head": args.draft_head,
    }
    EngineOptions(**options)
    return options


def load_engine(args: argparse.Namespace, console: Console) -> Engine:
    """The engine that the flags describe, with a bar while it loads."""
    options = engine_options(args)
    with byte_progress(console) as options["progress"]:
        return Engine(args.target, args.drafter, **options)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def write_text(text: str) -> None:
    """Text as it is, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def read_text_file(name: str, path: str) -> str:
    """A UTF-8 file. Raises DFlashError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DFlashError(f"{name}: expected a text file at {path}: {e}") from e


@contextmanager
def count_progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) that draws a bar with the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
