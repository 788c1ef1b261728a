"""Statistics of a request and of a session: what is counted, what is derived, and what is shown.

Catches: figures lost between the core and `to_dict`, sums over generations that do not add up, a comparison with plain
decoding from nothing, and streams that report another answer's statistics.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from conftest import Ids
from dflash_cpp import DFlashError, Engine, Stats

KEYS = {
    "drafted_per_slot", "accepted_per_slot", "depth_histogram", "tokens_per_step", "seconds", "verify_by_width",
    "draft_by_count", "experts_by_width", "lookup_drafted", "lookup_accepted", "plain_seconds", "plain_round_seconds",
    "speedup", "proposed",
}  # fmt: skip


def raw(**changes: Any) -> dict[str, Any]:
    """Figures of a core with a block of 4 rows: 10 rounds, 12 drafts verified (3 of them lookup's), 6 accepted."""
    out: dict[str, Any] = {
        "prompt_tokens": 20,
        "cached_tokens": 8,
        "generated_tokens": 17,
        "steps": 10,
        "drafted": 12,
        "accepted": 6,
        "proposed": 15,
        "drafted_per_slot": [6, 3, 0],
        "accepted_per_slot": [3, 1, 0],
        "lookup_drafted": 3,
        "lookup_accepted": 2,
        "depth_histogram": [3, 3, 3, 1],
        "seconds": {"prefill": 0.5, "draft": 0.1, "verify": 0.6, "sample": 0.05, "ingest": 0.15},
        "verify_by_width": [tally(0, 0), tally(3, 0.15), tally(3, 0.24), tally(3, 0.3), tally(1, 0.12)],
        "draft_by_count": [tally(0, 0), tally(2, 0.02), tally(0, 0), tally(4, 0.08)],
        "experts_by_width": [0, 48, 90, 120, 48],
        "expert_calls_by_width": [0, 6, 6, 6, 2],
    }
    return out | changes


def tally(calls: int, seconds: float) -> dict[str, Any]:
    return {"calls": calls, "seconds": seconds}


def shown(stats: Stats) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(stats.table())
    return out.getvalue()


def test_derived_figures() -> None:
    stats = Stats.from_core(raw(), seed=3, generated_tokens=17, prompt_seconds=0.6)
    assert stats.tokens_per_step == pytest.approx(1.6)
    assert stats.acceptance == pytest.approx((1 / 2, 1 / 3))
    assert {w: t.ms for w, t in stats.verify_by_width.items()} == pytest.approx({1: 50, 2: 80, 3: 100, 4: 120})
    assert {n: t.ms for n, t in stats.draft_by_count.items()} == pytest.approx({1: 10, 3: 20})
    assert stats.experts_by_width == {1: 8.0, 2: 15.0, 3: 20.0, 4: 24.0}
    assert stats.decode_seconds == pytest.approx(0.8)
    # 16 tokens after the first, at 50 ms each
    assert stats.plain_seconds == pytest.approx(0.8)
    assert stats.speedup == pytest.approx(1.0)
    assert stats.more == {}


def test_plain_decoding_is_compared_for_the_tokens_kept_only() -> None:
    cut = Stats.from_core(raw(), generated_tokens=11)  # a stop string: plain decoding would have ended there
    assert cut.plain_seconds == pytest.approx(0.5)
    assert Stats.from_core(raw(), generated_tokens=0).plain_seconds == 0.0
    # a session of three generations: 3 of its 19 tokens came with their prompts
    assert Stats.from_core(raw(generated_tokens=19)).plain_seconds == pytest.approx(0.8)


def test_without_a_round_of_one_row() -> None:
    deep = raw(verify_by_width=[tally(0, 0), tally(0, 0), tally(10, 1.0)])
    unknown = Stats.from_core(deep, seed=3)
    assert unknown.plain_seconds is None
    assert unknown.speedup is None
    assert unknown.to_dict()["plain_seconds"] is None
    assert "not measured" in shown(unknown)
    assert Stats.from_core(deep, plain_round_seconds=0.02).plain_seconds == pytest.approx(0.32)
    assert Stats.from_core(raw(), plain_round_seconds=9.0).plain_round_seconds == pytest.approx(0.05), "its own first"


def test_the_table_shows_everything() -> None:
    table = shown(Stats.from_core(raw(), seed=3, prompt_seconds=0.6))
    for text in (
        *("6 of 12", "1: 3/6 (50%)", "2: 1/3 (33%)", "2 of 3", "0: 3  1: 3  2: 3  3: 1", "1.60"),
        *("time: draft", "time: verify", "time: sample", "time: ingest", "600.0 ms"),
        *("1: 50.00 ms", "4: 120.00 ms", "1: 10.00 ms", "3: 20.00 ms", "4: 24.0"),
        "800.0 ms; this took 800.0 ms (1.00x)",
    ):
        assert text in table
    assert "seed" not in shown(Stats.from_core(raw()))
    assert "acc" not in shown(Stats.from_core({})), "nothing happened"


def test_a_request(engine: Engine, prompts: list[Ids]) -> None:
    stats = engine.generate(prompts[2], max_tokens=40, depth=3, ignore_eos=True).stats
    found = stats.to_dict()
    assert found.keys() >= KEYS
    assert json.loads(json.dumps(found)) == found
    assert stats.more == {}, "every figure of the core has a place"
    assert stats.steps == sum(stats.depth_histogram) == sum(t.calls for t in stats.verify_by_width.values())
    assert stats.drafted == sum(n * count for n, count in enumerate(stats.depth_histogram))
    assert stats.drafted == sum(stats.drafted_per_slot)
    assert stats.accepted == sum(stats.accepted_per_slot)
    assert stats.steps + stats.accepted == 39
    assert stats.verify_by_width.keys() == {n + 1 for n, count in enumerate(stats.depth_histogram) if count}
    used = int(engine.model.target_config["n_expert_used"])
    for width, experts in stats.experts_by_width.items():
        assert used <= experts <= min(used * width, engine.model.target_config["n_expert"])
    assert shown(stats)


def test_a_session_adds_up(gguf_engine: Engine, prompts: list[Ids]) -> None:
    engine = gguf_engine
    assert engine.session_stats.steps == 0
    options: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
    each = [engine.generate(p, depth=d, **options).stats for p, d in zip(prompts[:3], (0, 4, "auto"), strict=True)]
    session = engine.session_stats
    for name in ("prompt_tokens", "cached_tokens", "generated_tokens", "steps", "drafted", "accepted", "proposed"):
        assert getattr(session, name) == sum(getattr(s, name) for s in each), name
    assert session.depth_histogram == tuple(map(sum, zip(*(s.depth_histogram for s in each), strict=True)))
    assert session.prompt_seconds == pytest.approx(sum(s.prompt_seconds for s in each))
    assert session.seconds["verify"] == pytest.approx(sum(s.seconds["verify"] for s in each))
    assert session.seed is None
    assert session.plain_round_seconds is not None
    json.dumps(session.to_dict())
    engine.close()
    with pytest.raises(DFlashError, match="closed"):
        _ = engine.session_stats


@pytest.fixture
def gguf_engine(gguf_path: Callable[[str], Any]) -> Engine:
    """An engine whose session has done nothing yet."""
    return Engine(gguf_path("nano-m2"), gguf_path("nano-m2-dflash"), n_ctx=256)


def test_plain_cost_comes_from_the_session(gguf_engine: Engine, prompts: list[Ids]) -> None:
    with gguf_engine as engine:
        # One round of exactly two rows: never one of one row.
        def one_round() -> Stats:
            stream = engine.stream(prompts[0], max_tokens=3, depth=1, ignore_eos=True)
            next(stream)
            next(stream)
            stream.close()
            return stream.result.stats

        first = one_round()
        assert first.verify_by_width.keys() == {2}
        assert first.plain_seconds is None
        assert first.to_dict()["speedup"] is None
        engine.generate(prompts[1], max_tokens=5, depth=0, ignore_eos=True)
        again = one_round()
        assert again.verify_by_width.keys() == {2}
        assert again.plain_round_seconds == engine.session_stats.plain_round_seconds
        assert again.plain_seconds is not None


def test_a_stream_reports_itself_whenever_it_is_asked(engine: Engine, prompts: list[Ids]) -> None:
    stream = engine.stream(prompts[0], max_tokens=20, depth=0, ignore_eos=True)
    assert stream.result.stats.prompt_tokens == 0, "not begun"
    next(stream)
    for rounds in (1, 2, 3):
        next(stream)
        assert stream.result.stats.steps == rounds
        assert engine.session_stats.steps >= rounds, "asking does not end the stream"
    other = engine.generate(prompts[1], max_tokens=9, depth=0, ignore_eos=True)
    assert stream.result.stats.steps == 3, "replaced: as it was then"
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.stats.prompt_tokens == len(prompts[0])
    assert other.stats.steps == 8
    closed = engine.stream(prompts[0], max_tokens=20, depth=0, ignore_eos=True)
    next(closed)
    next(closed)
    closed.close()
    engine.generate(prompts[1], max_tokens=9, depth=0, ignore_eos=True)
    assert closed.result.stats.steps == 1


def test_an_answer_that_ends_in_an_error_keeps_its_statistics(engine: Engine, prompts: list[Ids]) -> None:
    def hook(tokens: Any, row: Any) -> None:
        if len(tokens) == len(prompts[0]) + 4:
            raise KeyError("enough")

    stream = engine.stream(prompts[0], max_tokens=20, depth=0, ignore_eos=True, logits_hook=hook)
    with pytest.raises(KeyError):
        list(stream)
    assert stream.result.stats.prompt_tokens == len(prompts[0])
    assert stream.result.stats.steps == 3
    assert len(stream.result.tokens) == 4


def test_other_threads_may_ask(engine: Engine, prompts: list[Ids]) -> None:
    stream = engine.stream(prompts[0], max_tokens=60, ignore_eos=True)
    found: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            found.append(stream.result.stats.steps)
            found.append(engine.session_stats.prompt_tokens)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in stream:
            pass
    finally:
        done.set()
        thread.join(60)
    assert not thread.is_alive()
    assert found
    assert len(stream.result.tokens) == 60
