"""Continuing equals starting over, and costs only the new tokens. Catches stale or misplaced cache entries."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from conftest import Ids
from dflash_cpp import Engine, _core

Make = Callable[..., Engine]


@pytest.mark.parametrize("depth", [0, 15, "auto"])
@pytest.mark.parametrize("precise", [False, True])
def test_continuing_equals_starting_over(depth: Any, precise: bool, make_engine: Make, prompts: list[Ids]) -> None:
    engine, options = make_engine("nano", precise=precise), {"max_tokens": 30, "depth": depth, "ignore_eos": True}
    engine.reset()
    text, answers = list(prompts[0]), []
    for extra in (prompts[1][:20], prompts[2][:7], [5]):
        g = engine.generate(text, **options)
        answers.append((list(text), g.tokens))
        # The last token's keys and values are computed when it is needed, and the last prompt token is run again.
        text = text + g.tokens + extra
        cached = engine.generate(text, **options).stats.cached_tokens
        assert cached >= len(text) - len(extra) - 1
    for prompt, tokens in answers:
        engine.reset()
        g = engine.generate(prompt, **options)
        assert g.stats.cached_tokens == 0
        assert g.tokens == tokens


def test_a_changed_past_is_recomputed(engine: Engine, prompts: list[Ids]) -> None:
    a = list(prompts[1][:60])
    b = [*a[:40], (a[40] + 1) % 900, *a[41:]]
    fresh = {}
    for name, prompt in (("a", a), ("b", b)):
        engine.reset()
        fresh[name] = engine.generate(prompt, max_tokens=20, ignore_eos=True).tokens
    engine.reset()
    for name, prompt in (("a", a), ("b", b), ("a", a), ("b", b)):
        g = engine.generate(prompt, max_tokens=20, ignore_eos=True)
        assert g.tokens == fresh[name]
    assert g.stats.cached_tokens == 40


def test_the_same_prompt_again_costs_one_token(engine: Engine, prompts: list[Ids]) -> None:
    first = engine.generate(prompts[1], max_tokens=10)
    again = engine.generate(prompts[1], max_tokens=10)
    assert again.tokens == first.tokens
    assert again.stats.cached_tokens == len(prompts[1]) - 1


def test_drafting_after_plain_turns_is_as_good_as_ever(engine: Engine, prompts: list[Ids]) -> None:
    # Depth 0 takes no taps: what the drafter did not see has to be run again, not drafted around.
    turn = {"max_tokens": 40, "ignore_eos": True}
    text = list(prompts[2])
    text = [*text, *engine.generate(text, depth=3, **turn).tokens]
    expected = engine.generate(text, depth=3, **turn)
    engine.reset()
    engine.generate(text[:20], depth=3, **turn)
    plain = engine.generate(text, depth=0, **turn)
    drafted = engine.generate(text, depth=3, **turn)
    assert plain.tokens == drafted.tokens == expected.tokens
    assert drafted.stats.accepted_per_slot == expected.stats.accepted_per_slot
    assert 0 < drafted.stats.cached_tokens < plain.stats.prompt_tokens - 1


def test_an_abandoned_stream_leaves_a_right_cache(engine: Engine, prompts: list[Ids]) -> None:
    expected = engine.generate(prompts[3], max_tokens=40, ignore_eos=True).tokens
    engine.reset()
    for depth in (15, 0, 3):
        with engine.stream(prompts[3], max_tokens=40, depth=depth, ignore_eos=True) as stream:
            for _ in range(5):
                next(stream)
        assert stream.result.finish_reason == "cancelled"
        assert stream.result.tokens == expected[: len(stream.result.tokens)]
        assert engine.generate(prompts[3], max_tokens=40, ignore_eos=True).tokens == expected


def test_numpy_access_leaves_a_right_cache(engine: Engine, prompts: list[Ids]) -> None:
    expected = engine.generate(prompts[0], max_tokens=20, ignore_eos=True).tokens
    for use in (
        lambda: engine.logits(prompts[0]),
        lambda: engine.taps(prompts[2]),
        lambda: engine.draft_logits(prompts[0], expected[0]),
        lambda: engine.session.rewind(3),
    ):
        use()
        for depth in (15, 0):
            assert engine.generate(prompts[0], max_tokens=20, depth=depth, ignore_eos=True).tokens == expected


def test_chat_turns_reuse_the_cache(engine: Engine) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Write the Python module `queue`."}]
    first = engine.chat(messages, max_tokens=24)
    assert first.stats.cached_tokens == 0
    assert first.message is not None
    messages += [first.message, {"role": "user", "content": "Now add a class."}]
    second = engine.chat(messages, max_tokens=24)
    assert second.stats.cached_tokens >= first.stats.prompt_tokens - 2
    engine.reset()
    assert engine.chat(messages, max_tokens=24).tokens == second.tokens


def test_drafting_after_a_sleep(engine: Engine, prompts: list[Ids]) -> None:
    # Imposed chances of nothing: the drafter is soon not told of the text. Later turns at depth "auto" draft around
    # what it missed.
    prompt = list(prompts[2])
    session = engine.session
    session.begin(prompt, _core.SamplingParams(), max_tokens=600, lookup=False, simulate_accept=[0.0])
    while (at := session.prefill())[0] < at[1]:
        pass
    while session.step().stop is None and session.stats()["left_out_tokens"] <= 250:
        pass  # when it sleeps is for the clock to say: a busy machine takes longer
    assert session.stats()["left_out_tokens"] > 100
    state = session.policy_state()
    assert 0.0 < state["ingest_seconds"] < state["verify_seconds"][0], "it sleeps because hearing the text has a price"
    middle = session.tokens[:-80]  # back into what it missed
    whole = [*session.tokens, *prompts[1][:30]]
    drafted = {}
    for depth, text in (("auto", whole), ("auto", [*middle, 7, 8]), (3, whole)):
        g = engine.generate(text, max_tokens=40, depth=depth, ignore_eos=True)
        drafted[tuple(text)] = g.tokens
        if depth == "auto":
            assert g.stats.cached_tokens >= len(text) - 31, "what was left out is not run again"
    accepted = g.stats.accepted_per_slot  # a fixed depth drafts from all of the text
    engine.reset()
    assert engine.generate(whole, max_tokens=40, depth=3, ignore_eos=True).stats.accepted_per_slot == accepted
    for text, tokens in drafted.items():
        assert engine.generate(list(text), max_tokens=40, depth=0, ignore_eos=True).tokens == tokens


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_any_history_equals_starting_over(kv_type: str, make_engine: Make) -> None:
    """Requests of all kinds in any order, abandoned streams and numbers in between, against a fresh plain engine."""
    rng = random.Random(11)
    engine = make_engine("nano", n_ctx=320, n_batch=23, kv_type=kv_type)
    plain = make_engine("nano", drafter=False, n_ctx=320, n_batch=23, kv_type=kv_type)
    text = [rng.randrange(900) for _ in range(200)]
    last = text[:30]
    for _ in range(40):
        more = [rng.randrange(900) for _ in range(rng.randint(1, 9))]
        prompt = rng.choice([text[: rng.randint(1, 200)], last + more])[:300]
        options: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 20, None]), "ignore_eos": rng.random() < 0.8}
        if rng.random() < 0.5:
            options |= {"temperature": 1.3, "seed": rng.randrange(3), "top_k": rng.choice([0, 5]), "top_p": 0.9}
        if rng.random() < 0.3:
            options |= {"repetition_penalty": 1.2, "penalty_last_n": rng.choice([-1, 3])}
        if rng.random() < 0.2:
            options |= {"stop": [rng.choice(["e", "self", "("])]}
        drafting = {"depth": rng.choice(["auto", 0, 1, 3, 15]), "lookup": rng.random() < 0.5}
        match rng.randrange(8):
            case 0:
                stream = engine.stream(prompt, **drafting, **options)
                for _ in range(rng.randint(0, 4)):
                    next(stream, None)
            case 1:
                plain.reset()
                assert engine.logits(prompt[:40]).tobytes() == plain.logits(prompt[:40]).tobytes()
            case 2:
                engine.draft_logits(prompt[:50], 5, rng.choice([1, 15]))
            case _:
                found = engine.generate(prompt, **drafting, **options)
                plain.reset()
                expected = plain.generate(prompt, depth=0, **options)
                assert found.tokens == expected.tokens, (prompt, drafting, options)
                assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
                last = (prompt + found.tokens)[:290]
