"""Every sampling option under speculation, and the proof that each check would notice its rule broken.

The vocabulary is cut to four tokens by a bias of -inf, so that the joint distribution of three tokens is written out
exactly: the first from the prefill, the second and third from one round in which the draft usually stands. The same
draws are compared with the right distribution and with wrong ones, which the chi-square has to reject.

Catches: an option that speculation drops, penalties or hooks that do not see drafts accepted in their own round, and
rules that keep drafts too often or draw wrongly after a rejection.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from conftest import Ids
from dflash_cpp import Engine, _core
from test_sampling import Z_LIMIT, chi_square_z

N_DRAWS = 1500
# After the prompt (a module's first lines): "import" and "from"; then a name, which the drafter knows; then any.
ALLOWED = (326, 395, 623, 298)
HOT = 2.0  # temperature at which all four tokens get a share of the third position

Drawn = tuple[int, ...]
Seen = Callable[[Drawn], Drawn]


def hook(tokens: np.ndarray, row: np.ndarray) -> None:
    """Against repeating the last token, and for another token at each position: needs the exact history."""
    row[tokens[-1]] -= 3.0
    row[ALLOWED[len(tokens) % len(ALLOWED)]] += 2.0


OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 3.5},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.85},
    "min_p": {"min_p": 0.4},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "presence_penalty": {"presence_penalty": 2.5},
    "frequency_penalty": {"frequency_penalty": 2.0, "penalty_last_n": -1},  # the prompt has some of them already
    "all penalties": {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.8, "top_k": 3},
    "logit_bias": {"logit_bias": {326: -2.5, 298: 1.5}},
    "logits_hook": {"logits_hook": hook},
}
LOOK_BACK = ("repetition_penalty", "presence_penalty", "frequency_penalty", "all penalties", "logits_hook")


def make_params(options: dict[str, Any]) -> _core.SamplingParams:
    """The engine's record: the options, on a vocabulary of ALLOWED."""
    params = _core.SamplingParams()
    params.temperature = HOT
    params.penalty_last_n = 3
    for key, value in options.items():
        if key != "logit_bias":
            setattr(params, key, value)
    params.logit_bias = {i: -math.inf for i in range(1024) if i not in ALLOWED} | options.get("logit_bias", {})
    return params


@dataclass(frozen=True)
class Text:
    """A prompt, the target's row behind every beginning of an answer, and the first draft behind each first token."""

    session: _core.Session
    prompt: Ids
    rows: dict[Drawn, np.ndarray]
    drafts: dict[int, int]


@pytest.fixture(scope="module")
def text(make_engine: Callable[..., Engine], prompts: list[Ids]) -> Text:
    # f32 caches: the reference rows come from other batches. One thread: the model is small.
    session, prompt = make_engine("nano", n_threads=1, kv_type="f32").session, prompts[2][-24:]
    rows = {(): session.logits(prompt)[-1]}
    for pair in itertools.product(ALLOWED, ALLOWED):
        behind = session.logits([*prompt, *pair])
        rows[pair[:1]], rows[pair] = behind[-2], behind[-1]
    drafts = {a: int(session.draft_logits(prompt, a, 2)[0].argmax()) for a in ALLOWED}
    return Text(session, prompt, rows, drafts)


def row_distribution(text: Text, params: _core.SamplingParams, drawn: Drawn, seen: Drawn) -> dict[int, float]:
    """Of the token behind `drawn`, when the options see `seen` as the answer so far."""
    p = _core.sampling_distribution(text.rows[drawn], [*text.prompt, *seen], params)
    return {int(t): float(p[t]) for t in np.flatnonzero(p)}


def joint(text: Text, params: _core.SamplingParams, seen: Seen = lambda drawn: drawn) -> dict[Drawn, float]:
    """Of the first three tokens."""
    out: dict[Drawn, float] = {(): 1.0}
    for _ in range(3):
        out = {
            (*drawn, t): p * q
            for drawn, p in out.items()
            for t, q in row_distribution(text, params, drawn, seen(drawn)).items()
        }
    return out


def draw(text: Text, params: _core.SamplingParams) -> tuple[Counter[Drawn], int]:
    """Answers of the engine at depth 2, and in how many of them the third token's round had the second as a draft."""
    counts: Counter[Drawn] = Counter()
    together = 0
    for seed in range(N_DRAWS):
        params.seed = seed
        text.session.begin(text.prompt, params, max_tokens=4, depth=2, lookup=False)
        done, total = -1, 0
        while done < total:
            done, total = text.session.prefill()
        tokens = list(text.session.step().tokens)
        step = text.session.step()
        together += step.accepted > 0
        tokens += step.tokens
        while len(tokens) < 3:
            tokens += text.session.step().tokens
        counts[tuple(tokens[:3])] += 1
    return counts, together


@pytest.mark.parametrize("name", OPTIONS)
def test_the_distribution_is_the_targets_and_no_wrong_one(name: str, text: Text) -> None:
    params = make_params(OPTIONS[name])
    counts, together = draw(text, params)
    assert N_DRAWS * 0.2 < together < N_DRAWS, "drafts stand often, and fall sometimes"

    def z(expected: dict[Drawn, float]) -> float:
        return chi_square_z(counts, expected, N_DRAWS)

    assert z(joint(text, params)) < Z_LIMIT
    assert z(joint(text, make_params({}))) > Z_LIMIT, "the option ignored"
    if name in LOOK_BACK:

        def committed(drawn: Drawn) -> Drawn:
            stood = len(drawn) == 2 and drawn[1] == text.drafts[drawn[0]]
            return drawn[:1] if stood else drawn

        assert z(joint(text, params, committed)) > Z_LIMIT, "drafts accepted in the same round not seen"
        assert z(joint(text, params, lambda drawn: ())) > Z_LIMIT, "only the prompt seen"


def test_frequencies_are_counted(text: Text) -> None:
    params = make_params(OPTIONS["frequency_penalty"])
    counts, _ = draw(text, params)
    once = make_params({"presence_penalty": 2.0, "penalty_last_n": -1})
    assert chi_square_z(counts, joint(text, once), N_DRAWS) > Z_LIMIT


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_each_penalty_is_told_from_the_others(name: str, text: Text) -> None:
    strong: dict[str, Any] = {"repetition_penalty": 3.0, "presence_penalty": 2.0, "frequency_penalty": 2.0}
    params = make_params(strong)
    counts, _ = draw(text, params)
    assert chi_square_z(counts, joint(text, params), N_DRAWS) < Z_LIMIT
    lacking = make_params({k: v for k, v in strong.items() if k != name})
    assert chi_square_z(counts, joint(text, lacking), N_DRAWS) > Z_LIMIT


# Acceptance rules: what is committed behind a draft, as a distribution. p: the target's; draft: a point-mass proposal.


def accepting(draft: int, chance: float, again: dict[int, float]) -> dict[int, float]:
    """The draft by chance, otherwise a draw from `again`."""
    mass = sum(again.values())
    out = {t: (1.0 - chance) * q / mass for t, q in again.items()} if mass > 0 else {}
    out[draft] = out.get(draft, 0.0) + (chance if mass > 0 else 1.0)
    return {t: q for t, q in out.items() if q > 0.0}


def without(p: dict[int, float], draft: int) -> dict[int, float]:
    return {t: q for t, q in p.items() if t != draft}


Rule = Callable[[dict[int, float], int], dict[int, float]]

RULES: dict[str, Rule] = {
    "right": lambda p, d: accepting(d, p.get(d, 0.0), without(p, d)),
    "half more often": lambda p, d: accepting(d, min(1.0, 1.5 * p.get(d, 0.0)), without(p, d)),
    "a third less often": lambda p, d: accepting(d, 0.67 * p.get(d, 0.0), without(p, d)),
    "a second draw from all": lambda p, d: accepting(d, p.get(d, 0.0), p),
    "whenever it is possible": lambda p, d: accepting(d, float(d in p), p),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_acceptance_rules_are_found(name: str, rule: str, text: Text) -> None:
    params = make_params(OPTIONS[name])
    simulated: dict[Drawn, float] = {}
    for a, p in row_distribution(text, params, (), ()).items():
        for b, q in RULES[rule](row_distribution(text, params, (a,), (a,)), text.drafts[a]).items():
            for c, r in row_distribution(text, params, (a, b), (a, b)).items():
                simulated[a, b, c] = p * q * r
    drawn = np.random.default_rng(11).multinomial(N_DRAWS, np.array([*simulated.values()]) / sum(simulated.values()))
    counts: Counter[Drawn] = Counter(dict(zip(simulated, drawn.tolist(), strict=True)))
    assert (chi_square_z(counts, joint(text, params), N_DRAWS) < Z_LIMIT) == (rule == "right")
