"""Fixtures: the embedded pair (and the larger ones of ../shared, where that is), converted once; engines by options."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dflash_cpp
from dflash_cpp import Engine, _core, demo

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
DATA = Path(__file__).resolve().parent / "data"

PAIRS = {
    "nano": ("nano-m2", "nano-m2-dflash"),
    "nano-weak": ("nano-m2", "nano-m2-dflash-weak"),
    "mini": ("mini-m2", "mini-m2-dflash"),
    "mini-weak": ("mini-m2", "mini-m2-dflash-weak"),
}
TARGET_OF = {drafter: target for target, drafter in PAIRS.values()}

Ids = list[int]

# A shell starts its background jobs (`pytest &`, some CI runners) with SIGINT ignored, and so would be what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Golden:
    """Answers of the reference implementations."""

    cases: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]


def checkpoint_dir(name: str) -> Path:
    """A checkpoint folder: embedded in the package, else in ../shared; skips the test where it is in neither."""
    for base in (demo.embedded_model_dir(), SHARED / "models"):
        if (base / name / "config.json").is_file():
            return base / name
    pytest.skip(f"needs ../shared/models/{name}")


def golden_of(name: str) -> Golden:
    """Golden answers by target; skips where they are not there."""
    for base in (DATA, SHARED / "golden"):
        if (base / name / "cases.json").is_file():
            cases = json.loads((base / name / "cases.json").read_text())["cases"]
            with np.load(base / name / "arrays.npz") as arrays:
                return Golden(cases, dict(arrays))
    pytest.skip(f"needs ../shared/golden/{name}")


@pytest.fixture(scope="session")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a checkpoint -> its GGUF file, converted when first asked for."""
    folder = tmp_path_factory.mktemp("gguf")

    def path_of(name: str) -> Path:
        from dflash_cpp.convert import convert

        checkpoint, out = checkpoint_dir(name), folder / f"{name}.gguf"
        if not out.exists():
            target = checkpoint_dir(TARGET_OF[name]) if name in TARGET_OF else None
            convert(checkpoint, out, target_model=target)
        return out

    return path_of


@pytest.fixture(scope="session")
def make_engine(gguf_path: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """make_engine(pair, drafter=True, **options) -> an engine, shared by all tests that ask for the same one."""
    made: dict[Any, Engine] = {}

    def make(pair: str = "nano", *, drafter: bool = True, **options: Any) -> Engine:
        target, draft = PAIRS[pair]
        options.setdefault("n_ctx", 1024)
        key = (pair, drafter, *sorted(options.items()))
        if key not in made:
            made[key] = Engine(gguf_path(target), gguf_path(draft) if drafter else None, **options)
        return made[key]

    yield make
    for engine in made.values():
        engine.close()


@pytest.fixture(scope="session")
def nano_path(gguf_path: Callable[[str], Path]) -> Path:
    """The embedded target."""
    return gguf_path("nano-m2")


@pytest.fixture(scope="session")
def nano_drafter_path(gguf_path: Callable[[str], Path]) -> Path:
    """The embedded drafter."""
    return gguf_path("nano-m2-dflash")


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    """The embedded pair with default options, starting from nothing."""
    e = make_engine("nano")
    e.reset()
    return e


@pytest.fixture(scope="session")
def prompts() -> list[Ids]:
    """The golden prompts of the embedded pair."""
    return [case["prompt_ids"] for case in golden_of("nano-m2").cases]


@dataclass(frozen=True)
class Recorded:
    """Tokens, the target's logits that chose each, and drafts per round."""

    tokens: Ids
    logits: np.ndarray
    text: str
    finish_reason: str
    stats: dflash_cpp.Stats


def record(engine: Engine, prompt: Any, **options: Any) -> Recorded:
    """Generates and keeps the row of logits behind every token: the hook sees each target row in order."""
    rows: list[np.ndarray] = []
    g = engine.generate(prompt, logits_hook=lambda tokens, row: rows.append(row.copy()), **options)
    return Recorded(g.tokens, np.array(rows), g.text, g.finish_reason, g.stats)


def assert_same(a: Recorded, b: Recorded, what: str) -> None:
    """Bit for bit: tokens, text, end, and logits."""
    assert a.tokens == b.tokens, what
    assert a.text == b.text, what
    assert a.finish_reason == b.finish_reason, what
    assert a.logits.shape == b.logits.shape, what
    assert a.logits.tobytes() == b.logits.tobytes(), f"{what}: logits differ"


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected| in the 2-norm, f64."""
    e = np.asarray(expected, dtype=np.float64)
    return float(np.linalg.norm(np.asarray(found, dtype=np.float64) - e) / np.linalg.norm(e))


def isas() -> list[str]:
    """Instruction sets that this machine can test."""
    return _core.cpu_isas()
