"""Precise mode answers as transformers and z-lab's dflash do. Catches wrong arithmetic: norms, rope, routing, taps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from conftest import PAIRS, golden_of, relative_error
from dflash_cpp import Engine

TOLERANCE = 1e-5  # found: 1e-6


@pytest.fixture(params=["nano", "mini"])
def pair(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def precise(pair: str, make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(pair, precise=True)


def test_prompts_tokenize_as_the_reference_did(pair: str, precise: Engine) -> None:
    for case in golden_of(PAIRS[pair][0]).cases:
        assert precise.tokenize(case["prompt"]) == case["prompt_ids"]


def test_logits(pair: str, precise: Engine) -> None:
    golden = golden_of(PAIRS[pair][0])
    for i, case in enumerate(golden.cases):
        found = precise.logits(case["prompt_ids"])
        assert found.shape == (len(case["prompt_ids"]), precise.n_vocab)
        assert relative_error(found[-4:], golden.arrays[f"logits_{i}"]) < TOLERANCE, f"case {i}"


def test_taps(pair: str, precise: Engine) -> None:
    golden = golden_of(PAIRS[pair][0])
    for i, case in enumerate(golden.cases):
        found = precise.taps(case["prompt_ids"])[-4:]  # [4, n_taps, n_embd]
        expected = golden.arrays[f"taps_{i}"]
        for tap in range(expected.shape[0]):
            assert relative_error(found[:, tap], expected[tap]) < TOLERANCE, f"case {i}, tap {tap}"


@pytest.mark.parametrize("strength", ["", "-weak"])
def test_draft_logits(pair: str, strength: str, make_engine: Callable[..., Engine]) -> None:
    target, drafter = PAIRS[pair + strength]
    engine = make_engine(pair + strength, precise=True)
    golden = golden_of(target)
    for i, case in enumerate(golden.cases):
        found = engine.draft_logits(case["prompt_ids"], case["greedy"][0], 15).astype(np.float64)
        stored = golden.arrays[f"draft_{drafter}_{i}"]
        expected = stored.astype(np.float64)
        # The reference was stored as f16: only what lies beyond its rounding is a difference.
        beyond = np.maximum(np.abs(found - expected) - 0.5 * np.spacing(np.abs(stored)).astype(np.float64), 0.0)
        assert np.linalg.norm(beyond) / np.linalg.norm(expected) < TOLERANCE, f"case {i}"


@pytest.mark.parametrize("depth", [0, 15, "auto"])
def test_every_greedy_token(pair: str, depth: int | str, precise: Engine) -> None:
    for i, case in enumerate(golden_of(PAIRS[pair][0]).cases):
        g = precise.generate(case["prompt_ids"], max_tokens=96, depth=depth, ignore_eos=True)
        assert g.tokens == case["greedy"], f"case {i}"


@pytest.mark.parametrize("strength", ["", "-weak"])
def test_tokens_of_every_verify_step(pair: str, strength: str, make_engine: Callable[..., Engine]) -> None:
    target, drafter = PAIRS[pair + strength]
    engine = make_engine(pair + strength, precise=True)
    for i, case in enumerate(golden_of(target).cases):
        expected = case["spec"][drafter]["produced"]
        # 96 tokens exactly: near the end the reference shortens its blocks, and so does the engine.
        pieces = list(engine.stream(case["prompt_ids"], max_tokens=96, depth=15, lookup=False, ignore_eos=True))
        found = [len(p.tokens) for p in pieces]
        assert found == [1, *expected], f"case {i}; the first token comes from the prefill"
