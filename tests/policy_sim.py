"""A simulator for the depth policy: acceptance and costs are known, so every decision can be priced exactly.

A round draws the chance that each slot's draft stands given that those before it stood; the policy sees confidences
that tell more or less of it, noisy timings, and which drafts stood. It is charged the true mean cost and credited the
expected tokens of what it chose, so that luck does not blur the comparison with fixed depths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dflash_cpp import _core

BLOCK = 16
SLOTS = BLOCK - 1

Floats = NDArray[np.float64]


def from_cumulative(*shares: float, tail: float = 0.5) -> Floats:
    """Chance of each slot given its prefix, from the shares of blocks whose slots 1..n all stand."""
    before = np.concatenate([[1.0], shares[:-1]])
    known = np.asarray(shares) / before
    return np.concatenate([known, np.full(SLOTS - len(known), tail)])


# Conditional acceptance by slot. "card": MirecX/MiniMax-M2.7-L3H5-DFlash; "strong", "weak": the mini pair's table.
ACCEPTANCE: dict[str, Floats] = {
    "none": np.full(SLOTS, 0.03),
    "poor": from_cumulative(0.35, 0.10, tail=0.25),
    "card": from_cumulative(0.638, 0.373, 0.191, 0.087, tail=0.45),
    "weak": from_cumulative(0.691, 0.463, 0.286, 0.163, tail=0.6),
    "strong": from_cumulative(0.936, 0.843, 0.662, 0.486, tail=0.73),
    "even": np.full(SLOTS, 0.8),
    "perfect": np.full(SLOTS, 0.985),
}


def moe(exponent: float, expert_share: float = 0.66) -> Floats:
    """Cost of w rows when only distinct experts are read, w ** exponent times one row's (docs/speculation.md)."""
    w = np.arange(1, BLOCK + 1, dtype=np.float64)
    return 1.0 + expert_share * (w**exponent - 1.0)


def linear(slope: float) -> Floats:
    """Cost of w rows where every further row costs the same."""
    return 1.0 + slope * np.arange(BLOCK, dtype=np.float64)


# Verify cost by width, relative to one row.
VERIFY: dict[str, Floats] = {
    "flat": linear(0.0),
    "dense": linear(0.02),
    "moe-0.66": moe(0.66),
    "moe-0.77": moe(0.77),
    "rows": linear(0.35),  # a CPU at its arithmetic limit
    "step": np.where(np.arange(BLOCK) < 4, linear(0.1), linear(0.3)),  # a kernel for few rows, then another one
}
DRAFT = (0.045, 0.1, 0.2, 0.4)


# A drafter that missed some text and heard of the last 16, 48, 128 tokens again accepts 71, 82, 85% in slot 1 instead
# of 86% (mini pair, strong): log-odds lost, by tokens heard.
FORGETFUL, RECOVERY = 1.9, 24.0
PROMPT = 128  # tokens, taken in before the first round


@dataclass(frozen=True)
class Noise:
    """Of timings: lognormal spread, share and largest factor of outliers, and a factor on everything by round."""

    spread: float = 0.05
    outliers: float = 0.03
    largest: float = 6.0
    load: Callable[[int], float] = field(default=lambda _: 1.0)

    def of(self, rng: np.random.Generator, seconds: float, at: int) -> float:
        """One measurement."""
        t = seconds * float(np.exp(self.spread * rng.standard_normal())) * self.load(at)
        return t * float(rng.uniform(1.5, self.largest)) if rng.random() < self.outliers else t


@dataclass(frozen=True)
class Extra:
    """What drafting costs beyond the drafter's run and the pass, relative to a pass of one row."""

    ingest: float = 0.0  # a token that the drafter takes in
    settling: float = 0.0  # caches left cold: what a plain round right after a drafted one takes longer


@dataclass(frozen=True)
class Text:
    """What is drafted: acceptance by slot, how much rounds differ, how much the confidences tell."""

    acceptance: Floats
    spread: float = 1.2  # of a round's log-odds, half of it shared by all slots
    informative: float = 0.7  # 0: confidences say nothing about the round, 1: everything
    shift: float = 0.0  # over- (positive) or underconfidence, log-odds

    def rounds(self, rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
        """True conditional acceptance and the drafter's confidence, each [n, slots]."""
        base = logit(self.acceptance)[None]
        shared = rng.standard_normal((n, 1)) * np.sqrt(0.5)
        own = rng.standard_normal((n, SLOTS)) * np.sqrt(0.5)
        true = base + self.spread * (shared + own)
        noise = rng.standard_normal((n, SLOTS)) * self.spread
        k = self.informative
        seen = base + k * (true - base) + np.sqrt(1 - k * k) * noise + self.shift
        return expit(true), expit(seen)


def expected_tokens(true: Floats) -> Floats:
    """Tokens committed at each depth, [rounds, block], from the chances of the slots, [rounds, slots]."""
    reach = np.cumprod(true, axis=1)
    return 1.0 + np.concatenate([np.zeros((len(true), 1)), np.cumsum(reach, axis=1)], axis=1)


def logit(p: Floats) -> Floats:
    """Log-odds."""
    return np.log(p / (1.0 - p))


def expit(x: Floats) -> Floats:
    """Inverse of logit."""
    return 1.0 / (1.0 + np.exp(-x))


@dataclass(frozen=True)
class Lookup:
    """Prompt lookup: how often it has a candidate, how long a match, its acceptance per token, its length."""

    share: float = 0.0
    match: int = 8
    acceptance: float = 0.9


@dataclass
class Run:
    """Tokens and seconds of every round, the policy's and each fixed depth's ([rounds, block])."""

    tokens: Floats
    seconds: Floats
    fixed_tokens: Floats
    fixed_seconds: Floats
    source: list[str]
    depth: list[int]
    drafted: list[int]
    asleep: list[bool]  # the drafter was not told of the round's tokens

    def rate(self, window: slice) -> float:
        """The policy's tokens per second."""
        return float(self.tokens[window].sum() / self.seconds[window].sum())

    def fixed_rates(self, window: slice) -> Floats:
        """Tokens per second of each fixed depth, 0 first."""
        rates: Floats = self.fixed_tokens[window].sum(0) / self.fixed_seconds[window].sum(0)
        return rates

    def loss(self, window: slice) -> float:
        """Against plain decoding."""
        return 1.0 - self.rate(window) / float(self.fixed_rates(window)[0])

    def regret(self, window: slice) -> float:
        """Against the best fixed depth, chosen afterwards."""
        return 1.0 - self.rate(window) / float(self.fixed_rates(window).max())


def simulate(
    texts: Sequence[tuple[Text, int]],
    verify: Floats,
    draft: float,
    *,
    seed: int = 0,
    noise: Noise | None = None,
    lookup: Lookup | None = None,
    prior: tuple[Sequence[float], float] | None = None,
    unit: float = 0.02,
    policy: _core.DepthPolicy | None = None,
    forgetful: float = FORGETFUL,
    extra: Extra | None = None,
) -> Run:
    """Runs the policy through texts of (text, rounds). unit: seconds of one plain pass. prior: what the policy is
    told beforehand (default: the byte model of a mixture of experts, whatever the truth). forgetful: log-odds that a
    drafter loses which slept just before; fixed depths never sleep."""
    noise, lookup, extra = noise or Noise(), lookup or Lookup(), extra or Extra()
    rng = np.random.default_rng(seed)
    prior_verify, prior_draft = prior or (list(moe(0.75)), 0.2)
    policy = policy or _core.DepthPolicy(prior_verify, prior_draft)
    draft_cost = draft * (1.0 + 0.03 * np.arange(BLOCK)) * (np.arange(BLOCK) > 0)
    parts = [text.rounds(rng, n) for text, n in texts]
    true, seen = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    total = len(true)
    expected = expected_tokens(true)
    fixed_seconds = verify + draft_cost + extra.ingest * expected * (np.arange(BLOCK) > 0)
    luck = rng.random((total, SLOTS))
    heard = np.inf  # tokens since the drafter last slept
    waiting = float(PROMPT)  # tokens that the drafter has not taken in
    run = Run(np.zeros(total), np.zeros(total), expected, fixed_seconds, [], [], [], [])
    followed: list[tuple[int, float, bool]] = []

    def take_in(tokens: float, at: int) -> tuple[int, float]:
        """A backlog of so many tokens: what the policy is told of it."""
        seconds = unit * extra.ingest * tokens
        return (round(tokens), noise.of(rng, seconds, at)) if seconds > 0.0 else (0, 0.0)

    for i in range(total):
        has_match = rng.random() < lookup.share
        source, n = policy.plan(SLOTS, True, lookup.match if has_match else 0, SLOTS if has_match else 0)
        run.asleep.append(policy.asleep)
        run.source.append(source)
        if source == "lookup":
            a = lookup.acceptance ** np.arange(1, n + 1)
            run.tokens[i], run.seconds[i], depth = 1.0 + a.sum(), verify[n], n
            accepted = min(n, int(rng.geometric(1.0 - lookup.acceptance)) - 1)
            policy.observe(
                source, verified=n, accepted=accepted, confidence=[], draft_seconds=0.0,
                verify_seconds=noise.of(rng, unit * verify[n], i), lookup_match=lookup.match,
            )  # fmt: skip
        elif source == "dflash":
            lost = forgetful * np.exp(-heard / RECOVERY)
            here = expit(logit(true[i]) - lost)
            confidence = expit(logit(seen[i, :n]) - lost).tolist()
            stands = int((luck[i] < here).cumprod().sum())
            depth = policy.verify_depth(confidence)
            run.tokens[i], run.seconds[i] = expected_tokens(here[None])[0, depth], verify[depth] + draft_cost[n]
            accepted = min(depth, stands)
            hearing = extra.ingest * waiting
            backlog = waiting > BLOCK
            ingested, ingest_seconds = take_in(waiting if backlog else 0.0, i)
            policy.observe(
                source, verified=depth, accepted=accepted, confidence=confidence,
                draft_seconds=noise.of(rng, unit * (draft_cost[n] + (0.0 if backlog else hearing)), i),
                verify_seconds=noise.of(rng, unit * verify[depth], i),
                ingested=ingested, ingest_seconds=ingest_seconds,
            )  # fmt: skip
            waiting = 0.0
            # Slots not verified are told as the text goes on, the first of them at once.
            told = range(depth, min(n, stands + 1)) if accepted == depth else range(0)
            followed = [(k, confidence[k], k < stands) for k in told]
        else:
            depth = 0
            cold = extra.settling if run.drafted and run.drafted[-1] > 0 else 0.0
            run.tokens[i], run.seconds[i] = 1.0, verify[0] + cold
            ingested, ingest_seconds = take_in(waiting if i == 0 else 0.0, i)
            policy.observe(
                source, verified=0, accepted=0, confidence=[], draft_seconds=0.0,
                verify_seconds=noise.of(rng, unit * (verify[0] + cold), i),
                ingested=ingested, ingest_seconds=ingest_seconds,
            )  # fmt: skip
            waiting = 0.0 if i == 0 else waiting
        for _ in range(round(run.tokens[i]) if source == "lookup" else 1):
            if followed:
                policy.observe_unverified(*followed.pop(0))
        if run.asleep[i]:
            heard = waiting = 0.0
        else:
            heard, waiting = heard + run.tokens[i], waiting + run.tokens[i]
            run.seconds[i] += extra.ingest * run.tokens[i]
        run.depth.append(depth)
        run.drafted.append(n if source == "dflash" else 0)
    return run
