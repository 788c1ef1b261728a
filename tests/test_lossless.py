"""The crown test: speculation changes nothing, bit for bit. Catches results that depend on the rows of a batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Ids, assert_same, isas, record
from dflash_cpp import Engine

Make = Callable[..., Engine]
DEPTHS = range(16)


def random_prompt(n: int, seed: int, n_vocab: int = 960) -> Ids:
    rng = random.Random(seed)
    return [rng.randrange(n_vocab) for _ in range(n)]


def check(engine: Engine, prompt: Ids, depths: Any, **options: Any) -> None:
    options.setdefault("ignore_eos", True)
    engine.reset()
    plain = record(engine, prompt, depth=0, lookup=False, **options)
    assert plain.stats.drafted == 0
    for depth in depths:
        engine.reset()
        assert_same(record(engine, prompt, depth=depth, **options), plain, f"depth {depth}, {len(prompt)} tokens")


@pytest.mark.parametrize("pair", ["nano", "nano-weak", "mini", "mini-weak"])
@pytest.mark.parametrize("precise", [False, True])
def test_every_depth(pair: str, precise: bool, make_engine: Make, prompts: list[Ids]) -> None:
    check(make_engine(pair, precise=precise), prompts[0], [*DEPTHS, "auto"], max_tokens=40)


def test_drafts_are_in_fact_accepted(make_engine: Make, prompts: list[Ids]) -> None:
    stats = make_engine("nano").generate(prompts[2], depth=15, max_tokens=64, ignore_eos=True).stats
    assert stats.accepted > 0
    assert stats.tokens_per_step > 1.2


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "f32"])
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_cache_types_and_threads(kv_type: str, n_threads: int, make_engine: Make, prompts: list[Ids]) -> None:
    check(make_engine("nano", kv_type=kv_type, n_threads=n_threads), prompts[3], [1, 4, 15, "auto"], max_tokens=40)


def test_threads_do_not_change_the_answer(make_engine: Make, prompts: list[Ids]) -> None:
    one, *others = (
        record(make_engine("nano", n_threads=n), prompts[1], depth=15, max_tokens=32, ignore_eos=True)
        for n in (1, 2, 3)
    )
    for other in others:
        assert_same(other, one, "threads")


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("repack", [True, False])
def test_instruction_sets(isa: str, repack: bool, make_engine: Make, prompts: list[Ids]) -> None:
    check(make_engine("nano", cpu_isa=isa, repack=repack), prompts[2], [1, 2, 3, 7, 8, 15], max_tokens=40)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 48, 49])
def test_prompts_across_chunk_borders(length: int, make_engine: Make) -> None:
    check(make_engine("nano", n_batch=16), random_prompt(length, seed=length), [1, 7, 15], max_tokens=24)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.lists(st.integers(0, 1023), min_size=1, max_size=70),
    depth=st.one_of(st.integers(1, 15), st.just("auto")),
    n_batch=st.sampled_from([16, 512]),
)
def test_random_prompts(make_engine: Make, prompt: Ids, depth: Any, n_batch: int) -> None:
    check(make_engine("nano", n_batch=n_batch), prompt, [depth], max_tokens=24)


SAMPLED = {
    "temperature": {"temperature": 1.0},
    "cold": {"temperature": 0.3, "top_k": 20},
    "top_p": {"temperature": 1.2, "top_p": 0.8},
    "min_p": {"temperature": 1.5, "min_p": 0.1},
    "all": {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.02},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    "greedy penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "penalty_last_n": 16},
    "bias": {"temperature": 1.0, "logit_bias": {10: 3.0, 32: -float("inf"), 220: 1.5}},
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_with_a_seed(name: str, make_engine: Make, prompts: list[Ids]) -> None:
    for pair in ("nano", "nano-weak"):
        for seed in (1, 2**40 + 7):
            check(make_engine(pair), prompts[1], [1, 3, 8, 15, "auto"], max_tokens=40, seed=seed, **SAMPLED[name])


def test_a_hook_sees_accepted_drafts(make_engine: Make, prompts: list[Ids]) -> None:
    engine, answers = make_engine("nano"), []
    for depth in (0, 15):
        seen: list[Ids] = []

        def hook(tokens: Any, row: Any, seen: list[Ids] = seen) -> None:
            seen.append(tokens.tolist())
            row[int(tokens[-1])] -= 5.0  # discourage repeating the last token

        g = engine.generate(prompts[0], depth=depth, max_tokens=32, logits_hook=hook, ignore_eos=True)
        assert seen == [prompts[0] + g.tokens[:i] for i in range(len(g.tokens))]
        answers.append(g.tokens)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 17])
def test_max_tokens_cuts_alike(max_tokens: int, make_engine: Make, prompts: list[Ids]) -> None:
    engine = make_engine("nano")
    answers = [engine.generate(prompts[2], depth=d, max_tokens=max_tokens, ignore_eos=True) for d in (0, 2, 15, "auto")]
    for g in answers:
        assert g.finish_reason == "length"
        assert len(g.tokens) == max_tokens
        assert g.tokens == answers[0].tokens


def test_a_full_context_ends_alike(make_engine: Make, prompts: list[Ids]) -> None:
    engine = make_engine("nano", n_ctx=len(prompts[0]) + 21)
    answers = [record(engine, prompts[0], depth=d, max_tokens=None, ignore_eos=True) for d in (0, 4, 15, "auto")]
    for a in answers:
        assert a.finish_reason == "context"
        assert_same(a, answers[0], "context")


def test_the_end_of_sequence_ends_alike(make_engine: Make, prompts: list[Ids]) -> None:
    engine = make_engine("nano")
    eos = engine.tokenizer.eos_ids[0]
    for start in (3, 8, 20):  # the hook makes the model end after that many tokens

        def hook(tokens: Any, row: Any, end: int = len(prompts[2]) + start) -> None:
            if len(tokens) == end:
                row[eos] = 1e9

        answers = [engine.generate(prompts[2], depth=d, max_tokens=60, logits_hook=hook) for d in (0, 5, 15, "auto")]
        for g in answers:
            assert g.finish_reason == "stop"
            assert g.stop is None
            assert g.tokens == answers[0].tokens
            assert g.tokens[-1] == eos
            assert len(g.tokens) == start + 1


def test_stop_strings_end_alike(make_engine: Make, prompts: list[Ids]) -> None:
    engine = make_engine("nano")
    whole = engine.generate(prompts[3], depth=0, max_tokens=80, ignore_eos=True).text
    for at, n in ((5, 3), (20, 1), (40, 6)):
        stop = whole[at : at + n]
        if not stop.strip() or "\ufffd" in stop:
            continue
        answers = [
            engine.generate(prompts[3], depth=d, max_tokens=80, stop=stop, ignore_eos=True) for d in (0, 3, 15, "auto")
        ]
        for g in answers:
            assert g.finish_reason == "stop"
            assert g.stop == stop
            assert g.text == whole[: whole.index(stop)]
            assert g.tokens == answers[0].tokens
            assert stop in engine.detokenize(g.tokens)
            assert stop not in engine.detokenize(g.tokens[:-1])
