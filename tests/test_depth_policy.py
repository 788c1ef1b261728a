"""The depth policy never loses, by simulation: known acceptance and costs, so that every decision has a price.

Catches: drafting that does not pay, parking that never ends, outliers believed, widths never tried, stale beliefs.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dflash_cpp import _core
from policy_sim import (
    ACCEPTANCE,
    BLOCK,
    DRAFT,
    SLOTS,
    VERIFY,
    Extra,
    Lookup,
    Noise,
    Run,
    Text,
    linear,
    logit,
    moe,
    simulate,
)

SETTLED = 200  # rounds within which the policy has to have found its depth
MEASURED = 400  # rounds judged after that
LOSS, REGRET = 0.02, 0.05

GRID = list(itertools.product(ACCEPTANCE, ("flat", "dense", "moe-0.66", "moe-0.77"), DRAFT))
# Costs whose shape the policy's model does not have: it must not lose there either, but may find the best depth later.
ODD_GRID = list(itertools.product(ACCEPTANCE, ("rows", "step"), DRAFT))


def settled(run: Run, changes_at: int = 0) -> tuple[float, float]:
    """Loss against plain and regret, from SETTLED rounds after a change on."""
    window = slice(changes_at + SETTLED, changes_at + SETTLED + MEASURED)
    return run.loss(window), run.regret(window)


def check(cells: list[tuple[str, float, float]], loss: float, regret: float) -> None:
    bad = [f"{name}: loss {a:.1%}, regret {b:.1%}" for name, a, b in cells if a > loss or b > regret]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("informative", [0.0, 0.6, 0.95], ids="confidence-{}".format)
def test_grid_of_acceptances_and_costs(informative: float) -> None:
    cells = []
    for acceptance, verify, draft in GRID:
        text = Text(ACCEPTANCE[acceptance], informative=informative)
        # Medians of five: a session of 400 rounds is short enough for luck.
        runs = [simulate([(text, SETTLED + MEASURED)], VERIFY[verify], draft, seed=s) for s in range(5)]
        loss, regret = np.median([settled(r) for r in runs], axis=0)
        cells.append((f"{acceptance}, {verify}, draft {draft}", float(loss), float(regret)))
    check(cells, LOSS, REGRET)


@pytest.mark.parametrize("informative", [0.0, 0.95], ids="confidence-{}".format)
def test_costs_of_another_shape(informative: float) -> None:
    cells = []
    for acceptance, verify, draft in ODD_GRID:
        text = Text(ACCEPTANCE[acceptance], informative=informative)
        runs = [simulate([(text, SETTLED + MEASURED)], VERIFY[verify], draft, seed=s) for s in range(5)]
        loss, regret = np.median([settled(r) for r in runs], axis=0)
        cells.append((f"{acceptance}, {verify}, draft {draft}", float(loss), float(regret)))
    check(cells, LOSS, 0.08)


@pytest.mark.parametrize(
    ("first", "then"), [("none", "strong"), ("strong", "none"), ("poor", "even"), ("even", "card")]
)
@pytest.mark.parametrize("verify", ["flat", "moe-0.66", "moe-0.77"])
def test_text_changes(first: str, then: str, verify: str) -> None:
    cells = []
    for draft in (0.045, 0.2):
        texts = [(Text(ACCEPTANCE[name]), SETTLED + MEASURED) for name in (first, then)]
        runs = [simulate(texts, VERIFY[verify], draft, seed=s) for s in range(3)]
        loss, regret = np.median([settled(r, SETTLED + MEASURED) for r in runs], axis=0)
        cells.append((f"{first} to {then}, draft {draft}", float(loss), float(regret)))
    check(cells, LOSS, REGRET)


@pytest.mark.parametrize(
    ("first", "then", "verify", "draft"),
    [
        ("strong", "poor", "moe-0.77", 0.1),
        ("strong", "poor", "moe-0.66", 0.2),
        ("strong", "none", "flat", 0.4),
        ("weak", "none", "flat", 0.4),
        ("weak", "none", "flat", 0.1),
    ],
)
def test_confidences_that_stay_high_are_not_believed_for_long(first: str, then: str, verify: str, draft: float) -> None:
    before, after = ACCEPTANCE[first], ACCEPTANCE[then]
    shift = float(np.mean(logit(before[:3]) - logit(after[:3])))  # what the drafter says does not change
    texts = [(Text(before), SETTLED + MEASURED), (Text(after, shift=shift), SETTLED + MEASURED)]
    runs = [simulate(texts, VERIFY[verify], draft, seed=s) for s in range(3)]
    changed = SETTLED + MEASURED
    assert np.median([r.loss(slice(changed, changed + SETTLED)) for r in runs]) < 0.12
    assert np.median([settled(r, changed)[0] for r in runs]) < LOSS


def test_a_useless_drafter_is_parked_and_probed_ever_more_rarely() -> None:
    run = simulate([(Text(ACCEPTANCE["none"]), 800)], moe(0.75), 0.2, seed=1)
    drafted = np.flatnonzero(np.array(run.drafted) > 0)
    early, late = (drafted < 100).sum(), (drafted >= 600).sum()
    assert 1 <= late <= 10 < 100
    assert early >= 3, "it has to look before it decides"
    assert (np.diff(drafted[drafted >= 400]) >= 24).all()


def test_it_comes_back_when_the_text_changes() -> None:
    run = simulate([(Text(ACCEPTANCE["none"]), 500), (Text(ACCEPTANCE["strong"]), 400)], moe(0.75), 0.1, seed=2)
    assert np.mean(np.array(run.drafted[300:500]) > 0) < 0.1
    assert np.mean(np.array(run.drafted[700:]) > 0) > 0.9


def test_a_drafter_sleeps_between_probes_where_hearing_the_text_costs_more_than_looks_may() -> None:
    run = simulate([(Text(ACCEPTANCE["none"]), 1200)], moe(0.75), 0.4, seed=1, extra=Extra(ingest=0.02))
    asleep, drafted = np.array(run.asleep), np.array(run.drafted) > 0
    assert asleep[400:].mean() > 0.4
    for probe in np.flatnonzero(drafted):
        assert not asleep[max(0, probe - 20) : probe].any(), "it hears of the text before it is asked"
    cheap = simulate([(Text(ACCEPTANCE["none"]), 1200)], moe(0.75), 0.4, seed=1, extra=Extra(ingest=0.002))
    assert not any(cheap.asleep), "nor does it sleep where it would save next to nothing"


# The mini pair on a CPU, its drafter as dear as a plain pass.
MINI, MINI_EXTRA = np.array([1.0, 1.46, 1.9, 2.35, 2.8, *(3.25 + 0.45 * np.arange(11))]), Extra(0.02, 0.2)


@pytest.mark.parametrize("acceptance", ["weak", "poor"])
def test_a_look_is_charged_all_it_costs(acceptance: str) -> None:
    told = (list(moe(0.75)), 0.6)
    texts = [(Text(ACCEPTANCE[acceptance], spread=1.0, informative=0.5), 1200)]
    runs = [simulate(texts, MINI, 0.95, seed=s, unit=2e-4, prior=told, extra=MINI_EXTRA) for s in range(6)]
    assert np.mean([r.loss(slice(0, SETTLED)) for r in runs]) < 0.016, "first looks included"
    assert np.mean([r.loss(slice(SETTLED, 1200)) for r in runs]) < 0.006


@pytest.mark.parametrize("extra", [Extra(ingest=0.1), Extra(settling=2.0)], ids=["ingest", "settling"])
def test_what_looks_cost_besides_the_draft_makes_them_rarer(extra: Extra) -> None:
    def looks(extra: Extra) -> int:
        text = Text(ACCEPTANCE["none"])
        return sum(
            sum(n > 0 for n in simulate([(text, 2000)], VERIFY["rows"], 0.4, seed=s, extra=extra).drafted[200:])
            for s in range(3)
        )

    assert looks(extra) < 0.5 * looks(Extra())


def replay(policy: _core.DepthPolicy, plain: float, **told: float) -> bool:
    """One round at known costs, a drafter that is always wrong: whether it was asked."""
    source, n = policy.plan(SLOTS)
    confidence = [0.5] * n
    depth = policy.verify_depth(confidence) if n > 0 else 0
    policy.observe(
        source, verified=depth, accepted=0, confidence=confidence, draft_seconds=0.6 if n > 0 else 0.0,
        verify_seconds=plain * (1.0 + 0.4 * depth), **told,
    )  # fmt: skip
    if n > depth == 0:
        policy.observe_unverified(0, 0.5, False)
    return source == "dflash"


def test_the_second_look_waits_for_what_it_will_cost_itself() -> None:
    # The first look's tokens came with the prompt; a later one's are taken in for it.
    def second_look(ingest: float) -> int:
        policy = _core.DepthPolicy(list(moe(0.75)), 0.6)
        looks = [replay(policy, 1.0, ingested=100, ingest_seconds=100 * ingest)]
        while sum(looks) < 2:
            looks.append(replay(policy, 1.0))
        return len(looks)

    assert second_look(0.05) > 1.5 * second_look(1e-6)


def test_a_parked_policy_does_not_draft_because_the_machine_became_slow() -> None:
    policy = _core.DepthPolicy(list(moe(0.75)), 0.1)
    asked = [replay(policy, 1.0 if i < 400 or i % 200 > 100 else 4.0) for i in range(2000)]
    assert 1 <= sum(asked[400:]) <= 30


def test_plain_decoding_that_was_slow_just_before_drafting_is_measured_afresh() -> None:
    policy = _core.DepthPolicy(list(moe(0.75)), 0.6)
    asked: list[bool] = []
    for i in range(1000):
        source, n = policy.plan(SLOTS)
        asked.append(source == "dflash")
        confidence = ([0.9] + [0.05] * SLOTS)[:n]
        depth = policy.verify_depth(confidence) if n > 0 else 0
        accepted = min(depth, 1) if i >= 60 else 0  # then one draft stands, which gains nothing: 2 tokens for 0.6 + 1.4
        slow = i >= 60 and not any(asked[60:])  # until the first look at one
        policy.observe(
            source, verified=depth, accepted=accepted, confidence=confidence, draft_seconds=0.6 * (n > 0),
            verify_seconds=1.0 + 0.4 * depth + slow,
        )  # fmt: skip
        for slot in range(accepted, min(n, 2)) if accepted == depth else ():
            policy.observe_unverified(slot, confidence[slot], slot < 1 and i >= 60)
    began = asked.index(True, 60)
    assert sum(asked[began : began + 100]) < 20


def test_a_slow_stretch_of_the_machine_does_not_move_the_choice() -> None:
    noise = Noise(load=lambda i: 2.0 if 300 <= i < 450 else 1.0)
    run = simulate([(Text(ACCEPTANCE["strong"]), 900)], moe(0.66), 0.1, seed=3, noise=noise)
    assert run.regret(slice(350, 450)) < REGRET
    assert run.regret(slice(500, 900)) < REGRET


def stretches(seed: int, rounds: int) -> Noise:
    """Slow stretches of 15 rounds on average, one in 60 rounds: everything takes 1.2 to 2.5 times as long."""
    rng, load, factor = np.random.default_rng(seed), [], 1.0
    for _ in range(rounds):
        if rng.random() < (1 / 15 if factor > 1.0 else 1 / 60):
            factor = 1.0 if factor > 1.0 else float(rng.uniform(1.2, 2.5))
        load.append(factor)
    return Noise(load=lambda i: load[i])


def test_slow_stretches_one_after_the_other_do_not_park_a_drafter_that_pays() -> None:
    # Each of them moves the machine, never what a drafted round costs against a plain one.
    regrets = []
    for acceptance, verify, draft in itertools.product(("card", "weak", "strong"), ("dense", "moe-0.66"), (0.045, 0.2)):
        for seed in range(4):
            noise = stretches(seed, 1200)
            run = simulate([(Text(ACCEPTANCE[acceptance]), 1200)], VERIFY[verify], draft, seed=seed, noise=noise)
            regrets.append(run.regret(slice(SETTLED, 1200)))
            assert run.loss(slice(SETTLED, 1200)) < LOSS
    assert np.mean(regrets) < 0.02
    assert np.mean(np.array(regrets) > REGRET) < 0.1


def test_two_slow_plain_rounds_before_the_first_look_do_not_make_a_draft_look_cheap() -> None:
    # No pass of two rows is faster than a plain one: if it seems so, the machine was slow before.
    noise = Noise(spread=0.01, outliers=0.0, load=lambda i: 2.4 if 1 <= i < 3 else 1.0)
    for seed in range(3):
        run = simulate([(Text(ACCEPTANCE["poor"]), 200)], MINI, 0.95, seed=seed, noise=noise)
        assert sum(n > 0 for n in run.drafted) < 12


def test_a_good_copy_that_seems_too_dear_is_measured_again_now_and_then() -> None:
    # A width that only lookup uses, once measured in a bad moment, would otherwise never be measured again.
    policy = _core.DepthPolicy(list(linear(1.2)), 0.2)
    true, taken = 0.02 * linear(1.2), []
    for _ in range(600):
        source, n = policy.plan(SLOTS, False, 24, SLOTS)
        taken.append(source == "lookup")
        policy.observe(
            source, verified=n, accepted=n, confidence=[], draft_seconds=0.0, verify_seconds=true[n], lookup_match=24
        )
    assert 5 <= sum(taken[200:]) <= 12


def test_outliers_are_not_believed() -> None:
    noise = Noise(outliers=0.15, largest=20.0)
    runs = [simulate([(Text(ACCEPTANCE["strong"]), 600)], moe(0.66), 0.1, seed=s, noise=noise) for s in range(3)]
    assert np.median([settled(r)[1] for r in runs]) < 0.08


def test_an_outlier_at_the_first_look_does_not_park_for_good() -> None:
    noise = Noise(load=lambda i: 6.0 if i == 3 else 1.0)
    for seed in range(6):
        run = simulate([(Text(ACCEPTANCE["weak"]), 600)], VERIFY["flat"], 0.2, seed=seed, noise=noise)
        assert run.drafted[3] > 0, "the load has to fall on the first drafted round"
        assert settled(run)[1] < REGRET


def test_a_first_draft_that_was_late_is_corrected_by_the_second() -> None:
    # Delays only make slower: a draft much faster than the only one before it tells that the first was late.
    policy = _core.DepthPolicy(list(moe(0.75)), 0.2)
    looks = 0
    for _ in range(600):
        source, n = policy.plan(SLOTS)
        looks += source == "dflash"
        policy.observe(
            source, verified=0, accepted=0, confidence=[0.3] * n, draft_seconds=(1.2 if looks == 1 else 0.2) * (n > 0),
            verify_seconds=1.0,
        )  # fmt: skip
        if looks == 2:
            break
    assert looks == 2
    assert policy.draft_cost(2) < 0.3


def test_a_drafter_that_cannot_pay_is_looked_at_without_a_wider_pass() -> None:
    verified = []
    for seed in range(3):
        run = simulate([(Text(ACCEPTANCE["none"]), 1200)], VERIFY["rows"], 0.4, seed=seed)
        late = np.array(run.drafted[400:]) > 0
        assert 3 <= late.sum() <= 15
        verified += list(np.array(run.depth[400:])[late] > 0)
    assert np.mean(verified) < 0.4


def test_a_drafter_dearer_than_the_target_costs_little() -> None:
    runs = [simulate([(Text(ACCEPTANCE["card"]), 1200)], VERIFY["rows"], 5.0, seed=s) for s in range(3)]
    assert max(r.loss(slice(0, 256)) for r in runs) < 0.06, "the first looks included"
    assert max(r.loss(slice(200, 1200)) for r in runs) < 0.03


@pytest.mark.parametrize("shift", [-1.5, 1.5], ids=["modest", "boastful"])
def test_confidences_are_calibrated(shift: float) -> None:
    cells = []
    for acceptance in ("poor", "card", "weak", "strong"):
        text = Text(ACCEPTANCE[acceptance], shift=shift)
        runs = [simulate([(text, 600)], moe(0.77), 0.1, seed=s) for s in range(3)]
        loss, regret = np.median([settled(r) for r in runs], axis=0)
        cells.append((acceptance, float(loss), float(regret)))
    check(cells, LOSS, REGRET)


def test_informative_confidences_beat_every_fixed_depth() -> None:
    text = Text(ACCEPTANCE["weak"], spread=2.0, informative=0.95)
    runs = [simulate([(text, 800)], moe(0.77), 0.1, seed=s) for s in range(3)]
    assert np.median([r.regret(slice(200, 800)) for r in runs]) < -0.05


def test_lookup_wins_where_it_is_better_and_only_there() -> None:
    good, bad = Lookup(share=0.5, match=16, acceptance=0.95), Lookup(share=0.5, match=4, acceptance=0.05)
    text = Text(ACCEPTANCE["poor"])
    with_good = simulate([(text, 600)], moe(0.77), 0.2, seed=4, lookup=good)
    assert with_good.source[200:].count("lookup") > 150
    assert with_good.loss(slice(200, 600)) < -0.5
    with_bad = simulate([(text, 600)], moe(0.77), 0.2, seed=4, lookup=bad)
    assert with_bad.source[200:].count("lookup") < 40
    assert with_bad.loss(slice(200, 600)) < LOSS


def test_a_strong_drafter_is_preferred_to_a_weak_lookup() -> None:
    lookup = Lookup(share=1.0, match=4, acceptance=0.4)
    run = simulate([(Text(ACCEPTANCE["perfect"]), 600)], linear(0.02), 0.05, seed=5, lookup=lookup)
    assert run.source[200:].count("dflash") > 380
    assert run.regret(slice(200, 600)) < REGRET


def test_a_wrong_prior_is_unlearnt() -> None:
    for told in (([1.0] * BLOCK, 0.01), (list(linear(1.0)), 2.0)):
        runs = [simulate([(Text(ACCEPTANCE["weak"]), 600)], moe(0.66), 0.1, seed=s, prior=told) for s in range(3)]
        assert np.median([settled(r)[0] for r in runs]) < LOSS
        assert np.median([settled(r)[1] for r in runs]) < REGRET


def test_it_is_deterministic() -> None:
    runs = [simulate([(Text(ACCEPTANCE["card"]), 300)], moe(0.66), 0.1, seed=6) for _ in range(2)]
    assert runs[0].depth == runs[1].depth
    assert runs[0].drafted == runs[1].drafted


def test_bounds_are_respected() -> None:
    policy = _core.DepthPolicy(list(linear(0.0)), 0.01)
    for _ in range(4):
        policy.observe("none", verified=0, accepted=0, confidence=[], draft_seconds=0.0, verify_seconds=1.0)
    for room in (3, 1, 0, 2, SLOTS):
        for _ in range(30):
            source, n = policy.plan(room)
            assert 0 <= n <= room
            if source == "dflash":
                depth = policy.verify_depth([0.99] * n)
                assert 0 <= depth <= n
                told = {"confidence": [0.99] * n, "draft_seconds": 0.01, "verify_seconds": 1.0}
                policy.observe(source, verified=depth, accepted=depth, **told)
            else:
                policy.observe("none", verified=0, accepted=0, confidence=[], draft_seconds=0.0, verify_seconds=1.0)
    assert policy.plan(SLOTS, has_drafter=False) == ("none", 0)


def test_confidences_that_are_no_numbers_do_not_stay() -> None:
    policy = _core.DepthPolicy(list(linear(0.1)), 0.05)
    sources = []
    for round_ in range(400):
        source, n = policy.plan(SLOTS)
        confidence = [float("nan") if round_ < 200 else 0.9] * n
        drafting = 0.05 if n > 0 else 0.0
        told = {"confidence": confidence, "draft_seconds": drafting, "verify_seconds": 1.0 + 0.1 * n}
        policy.observe(source, verified=n, accepted=n, **told)
        sources.append(source)
    assert sources[200:].count("dflash") > 150


def test_wrong_input_is_refused() -> None:
    with pytest.raises(_core.DFlashError, match="verify_prior"):
        _core.DepthPolicy([1.0], 0.1)
    policy = _core.DepthPolicy(list(moe(0.75)), 0.1)
    with pytest.raises(_core.DFlashError, match="accepted"):
        policy.observe("dflash", verified=1, accepted=2, confidence=[0.5], draft_seconds=0.1, verify_seconds=1.0)
    with pytest.raises(_core.DFlashError, match="confidence"):
        policy.observe("dflash", verified=2, accepted=1, confidence=[0.5], draft_seconds=0.1, verify_seconds=1.0)
