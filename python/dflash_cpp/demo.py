"""The main job on the embedded pair: convert, generate without and with the drafter, compare."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from .api import Engine, Generation
from .errors import DFlashError
from .stats import Stats, format_acceptance

PROMPT: Final = '''"""A small module with a class for parsing configuration files.
"""
import os
import sys

class '''
N_CTX: Final = 2048


@dataclass(frozen=True)
class Pair:
    """Two GGUF files that belong together."""

    target: Path
    drafter: Path


@dataclass(frozen=True)
class Comparison:
    """The same prompt without and with the drafter."""

    plain: Generation
    speculative: Generation

    @property
    def identical(self) -> bool:
        """Whether both gave the same tokens and the same text."""
        return self.plain.tokens == self.speculative.tokens and self.plain.text == self.speculative.text

    @property
    def speed_up(self) -> float | None:
        """Decoding speed with the drafter over the speed without it; None: nothing was decoded after the prompt."""
        base, fast = (g.stats.decode_tokens_per_s for g in (self.plain, self.speculative))
        return fast / base if base and fast else None


def embedded_model_dir() -> Path:
    """The folder of the pair that comes with the package."""
    return Path(__file__).resolve().parent / "models"


def find_checkpoints(model_dir: Path) -> tuple[Path, Path]:
    """The target's and the drafter's checkpoint folders inside model_dir.

    Raises DFlashError when there is not one of each.
    """
    targets: list[Path] = []
    drafters: list[Path] = []
    for config in sorted(model_dir.glob("*/config.json")):
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise DFlashError(f"{config}: expected JSON: {e}") from e
        (drafters if "dflash_config" in values else targets).append(config.parent)
    if len(targets) != 1 or len(drafters) != 1:
        raise DFlashError(
            f"{model_dir}: expected one target's and one drafter's checkpoint folder, "
            f"found {len(targets)} and {len(drafters)}"
        )
    return targets[0], drafters[0]


def convert_pair(model_dir: Path, out_dir: Path, *, progress: Any = False) -> Pair:
    """Converts both checkpoints of model_dir. Raises DFlashError with the converter's message."""
    try:
        converter = importlib.import_module("dflash_cpp.convert")
    except ModuleNotFoundError as e:
        raise DFlashError(f"convert: the converter is not installed ({e}); pip install .") from e
    target, drafter = find_checkpoints(model_dir)
    pair = Pair(out_dir / f"{target.name}.gguf", out_dir / f"{drafter.name}.gguf")
    try:
        converter.convert(target, pair.target, progress=progress)
        converter.convert(drafter, pair.drafter, target_model=target, progress=progress)
    except converter.ConvertError as e:
        raise DFlashError(str(e)) from e
    return pair


def compare(
    pair: Pair,
    *,
    prompt: str = PROMPT,
    max_tokens: int = 256,
    depth: int | str = "auto",
    n_threads: int | None = None,
    announce: Callable[[str], None],
    write: Callable[[str], None],
) -> Comparison:
    """Generates greedily without and with the drafter.

    announce: gets a headline before each run; write: gets the text as it comes.
    """
    answers: list[Generation] = []
    for drafter, title in ((None, "without the drafter"), (pair.drafter, "with the drafter")):
        announce(title)
        with Engine(pair.target, drafter, n_ctx=N_CTX, n_threads=n_threads) as engine:
            # prompt lookup is off so that the comparison is about the drafter
            stream = engine.stream(
                prompt,
                max_tokens=max_tokens,
                depth=depth if drafter else 0,  # type: ignore[arg-type]
                lookup=False,
                ignore_eos=True,
            )
            for piece in stream:
                write(piece.text)
            answers.append(stream.result)
        write("\n")
    return Comparison(*answers)


def table(comparison: Comparison) -> Table:
    """Speed, tokens per verify step, acceptance by slot."""
    out = Table(title="the same tokens, two ways")
    out.add_column("")
    out.add_column("without drafter", justify="right")
    out.add_column("with drafter", justify="right")
    a, b = comparison.plain.stats, comparison.speculative.stats

    def row(name: str, text: Callable[[Stats], str]) -> None:
        out.add_row(name, text(a), text(b))

    row("generated tokens", lambda s: f"{s.generated_tokens}")
    row("decode tokens/s", lambda s: f"{s.decode_tokens_per_s:.1f}")
    row("tokens per verify step", lambda s: f"{s.tokens_per_step:.2f}")
    row("acceptance, slots 1, 2, ...", lambda s: format_acceptance(s.acceptance))
    speed_up = comparison.speed_up
    out.add_row("speed-up", "1.00x", "-" if speed_up is None else f"{speed_up:.2f}x")
    return out
