"""Fast mode (int8 activations) stays near the reference. Catches wrong scales and sums that still look plausible."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from conftest import PAIRS, SHARED, golden_of
from dflash_cpp import Engine

NMSE_LIMIT = 1e-3
PERPLEXITY_LIMIT = 0.01


@pytest.mark.parametrize("pair", ["nano", "mini"])
def test_logits_against_the_reference(pair: str, make_engine: Callable[..., Engine]) -> None:
    golden, engine = golden_of(PAIRS[pair][0]), make_engine(pair)
    error = power = 0.0
    for i, case in enumerate(golden.cases):
        expected = golden.arrays[f"logits_{i}"].astype(np.float64)
        found = engine.logits(case["prompt_ids"])[-4:].astype(np.float64)
        error += float(((found - expected) ** 2).sum())
        power += float((expected**2).sum())
    # the smaller model has fewer terms to average the rounding over
    assert error / power < (NMSE_LIMIT if pair == "mini" else 3 * NMSE_LIMIT)


def perplexity(engine: Engine, sequences: np.ndarray) -> float:
    total, count = 0.0, 0
    for tokens in sequences.astype(np.int64):
        logits = engine.logits(tokens.tolist())[:-1].astype(np.float64)
        peak = logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits - peak).sum(axis=1)) + peak[:, 0]
        total += float((log_sum - logits[np.arange(len(logits)), tokens[1:]]).sum())
        count += len(logits)
    return float(np.exp(total / count))


def test_perplexity_on_held_out_text(make_engine: Callable[..., Engine]) -> None:
    path = SHARED / "eval" / "mini-m2-heldout.npy"
    if not path.is_file():
        pytest.skip("needs ../shared/eval")
    sequences = np.load(path, mmap_mode="r")[::64, :256]
    fast, precise = (perplexity(make_engine("mini", precise=p), sequences) for p in (False, True))
    assert abs(fast / precise - 1) < PERPLEXITY_LIMIT
