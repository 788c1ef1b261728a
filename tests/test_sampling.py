"""Speculative sampling has the target's distribution. Catches wrong acceptance rules and wrong option arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from conftest import Ids
from dflash_cpp import Engine, Generation, _core

N_DRAWS = 1500
Z_LIMIT = 4.5  # a correct sampler passes it but once in 300 000 times; the seeds are fixed besides

OPTIONS: dict[str, dict[str, Any]] = {
    "top_k": {"temperature": 1.0, "top_k": 4},
    "hot": {"temperature": 1.6, "top_k": 5},
    "top_p": {"temperature": 1.2, "top_k": 12, "top_p": 0.7},
    "min_p": {"temperature": 1.3, "min_p": 0.15},
    "penalties": {
        "temperature": 1.0,
        "top_k": 4,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.25,
        "penalty_last_n": 8,
    },
    "bias": {"temperature": 1.0, "top_k": 4, "logit_bias": {82: 2.0, 220: -1.0}},
}


def distribution(logits: np.ndarray, history: Ids, o: dict[str, Any]) -> np.ndarray:
    """The processed target distribution, written down from the definitions and not from the engine."""
    x = logits.astype(np.float64).copy()
    for token, bias in o.get("logit_bias", {}).items():
        x[token] += bias
    last_n = o.get("penalty_last_n", 64)
    window = history if last_n < 0 else history[-last_n:] if last_n else []
    for token, count in Counter(window).items():
        r = o.get("repetition_penalty", 1.0)
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
        x[token] -= o.get("presence_penalty", 0.0) + count * o.get("frequency_penalty", 0.0)
    p = np.exp((x - x.max()) / o["temperature"])
    p /= p.sum()
    keep = p >= o.get("min_p", 0.0) * p.max()
    order = np.argsort(-p, kind="stable")
    if o.get("top_k"):
        keep[order[o["top_k"] :]] = False
    p = np.where(keep, p, 0.0)
    p /= p.sum()
    if o.get("top_p", 1.0) < 1.0:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= o["top_p"]]] = 0.0
        p /= p.sum()
    return p


def chi_square_z(counts: Counter[Any], expected: dict[Any, float], n: int) -> float:
    """Chi-square against expected probabilities as a normal deviate (Wilson and Hilferty 1931)."""
    rare = [k for k, p in expected.items() if p * n < 5]
    cells = [(counts[k], p * n) for k, p in expected.items() if p * n >= 5]
    rest = sum(expected[k] for k in rare) * n
    found_rest = n - sum(c for c, _ in cells)  # tokens the target forbids are counted here too
    if rest >= 5:
        cells.append((found_rest, rest))
    elif found_rest > rest + 10 * math.sqrt(rest + 1):
        return math.inf
    dof = len(cells) - 1
    x2 = sum((c - e) ** 2 / e for c, e in cells)
    return ((x2 / dof) ** (1 / 3) - (1 - 2 / (9 * dof))) / math.sqrt(2 / (9 * dof))


def expected_pairs(engine: Engine, prompt: Ids, o: dict[str, Any]) -> dict[tuple[int, int], float]:
    """Probabilities of the first two tokens together."""
    out: dict[tuple[int, int], float] = {}
    first = distribution(engine.logits(prompt)[-1], prompt, o)
    for a in np.flatnonzero(first).tolist():
        second = distribution(engine.logits([*prompt, a])[-1], [*prompt, a], o)
        for b in np.flatnonzero(second).tolist():
            out[a, b] = float(first[a] * second[b])
    return out


@pytest.mark.parametrize("name", OPTIONS)
def test_speculative_sampling_has_the_targets_distribution(
    name: str, make_engine: Callable[..., Engine], prompts: list[Ids]
) -> None:
    # Precise mode: the reference rows come from engine.logits, whose batch is another one.
    engine, o, prompt = make_engine("nano", precise=True), OPTIONS[name], prompts[2][-24:]
    expected = expected_pairs(engine, prompt, o)
    counts: Counter[Any] = Counter()
    drafted = accepted = 0
    for seed in range(N_DRAWS):
        g = engine.generate(prompt, max_tokens=3, depth=2, seed=seed, lookup=False, ignore_eos=True, **o)
        counts[g.tokens[0], g.tokens[1]] += 1
        drafted += g.stats.drafted
        accepted += g.stats.accepted
    assert drafted > 0
    assert accepted > 0
    assert chi_square_z(counts, expected, N_DRAWS) < Z_LIMIT


def broken_accepts_every_draft(p: np.ndarray, draft: int, rng: np.random.Generator) -> int:
    return draft


def broken_draws_again_from_all(p: np.ndarray, draft: int, rng: np.random.Generator) -> int:
    return draft if rng.random() < p[draft] else int(rng.choice(len(p), p=p))


def broken_accepts_half_more(p: np.ndarray, draft: int, rng: np.random.Generator) -> int:
    if rng.random() < min(1.0, 1.5 * p[draft]):
        return draft
    q = p.copy()
    q[draft] = 0.0
    return int(rng.choice(len(q), p=q / q.sum()))


def right(p: np.ndarray, draft: int, rng: np.random.Generator) -> int:
    if rng.random() < p[draft]:
        return draft
    q = p.copy()
    q[draft] = 0.0
    return int(rng.choice(len(q), p=q / q.sum()))


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        (right, True),
        (broken_accepts_every_draft, False),
        (broken_draws_again_from_all, False),
        (broken_accepts_half_more, False),
    ],
)
def test_the_test_finds_broken_acceptance_rules(
    rule: Callable[[np.ndarray, int, np.random.Generator], int],
    passes: bool,
    make_engine: Callable[..., Engine],
    prompts: list[Ids],
) -> None:
    engine, o, prompt = make_engine("nano", precise=True), OPTIONS["top_k"], prompts[2][-24:]
    rng = np.random.default_rng(5)
    expected = expected_pairs(engine, prompt, o)
    first = distribution(engine.logits(prompt)[-1], prompt, o)
    anchors = np.flatnonzero(first).tolist()
    seconds = {a: distribution(engine.logits([*prompt, a])[-1], [*prompt, a], o) for a in anchors}
    drafts = {a: int(engine.draft_logits(prompt, a, 1)[0].argmax()) for a in anchors}
    counts: Counter[Any] = Counter()
    for _ in range(N_DRAWS):
        a = int(rng.choice(len(first), p=first))
        counts[a, rule(seconds[a], drafts[a], rng)] += 1
    assert (chi_square_z(counts, expected, N_DRAWS) < Z_LIMIT) == passes


@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_what_their_definitions_say(name: str) -> None:
    rng, o = np.random.default_rng(3), OPTIONS[name]
    params = _core.SamplingParams()
    for key, value in o.items():
        setattr(params, key, value)
    params.penalty_last_n = o.get("penalty_last_n", 64)
    for center in (0, -20) * 10:  # the most probable tokens above zero, and below: penalties tell them apart
        logits = rng.normal(center, 3, 300).astype(np.float32)
        history = rng.integers(0, 300, 20).tolist()
        found = _core.sampling_distribution(logits, history, params)
        np.testing.assert_allclose(found, distribution(logits, history, o), atol=1e-5)


def test_the_seed_decides(engine: Engine, prompts: list[Ids]) -> None:
    def draw(seed: int | None) -> Generation:
        return engine.generate(prompts[0], temperature=1.5, max_tokens=24, seed=seed, ignore_eos=True)

    assert draw(7).tokens == draw(7).tokens
    assert draw(7).tokens != draw(8).tokens
    drawn = draw(None)
    assert draw(drawn.stats.seed).tokens == drawn.tokens, "the seed that was drawn is reported"
    assert draw(None).stats.seed != drawn.stats.seed, "and it is drawn anew each time"
