"""Engines do not disturb each other, and one engine takes its callers in turn. Catches hidden global state."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Ids
from dflash_cpp import DFlashError, Engine

OPTIONS: list[dict[str, Any]] = [
    {"depth": 15, "max_tokens": 50, "ignore_eos": True},
    {"depth": 3, "max_tokens": 50, "temperature": 1.2, "seed": 4, "ignore_eos": True},
    {"depth": 0, "max_tokens": 50, "repetition_penalty": 1.3, "ignore_eos": True},
]


@pytest.fixture
def engines(nano_path: Path, nano_drafter_path: Path) -> list[Engine]:
    return [
        Engine(nano_path, nano_drafter_path, n_ctx=512),
        Engine(nano_path, nano_drafter_path, n_ctx=512, n_threads=1, kv_type="q8_0"),
        Engine(nano_path, n_ctx=512, precise=True),
    ]


def test_interleaved(engines: list[Engine], prompts: list[Ids]) -> None:
    expected = [e.generate(p, **o).tokens for e, p, o in zip(engines, prompts, OPTIONS, strict=False)]
    streams = [e.stream(p, **o) for e, p, o in zip(engines, prompts, OPTIONS, strict=False)]
    running = list(streams)
    while running:
        running = [s for s in running if next(s, None) is not None]
    assert [s.result.tokens for s in streams] == expected


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(jobs)

    def work(i: int) -> None:
        try:
            results[i] = jobs[i]()
        except Exception as e:
            results[i] = e

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


def test_one_stream_in_threads(engines: list[Engine], prompts: list[Ids]) -> None:
    """Threads that share a stream take its pieces in turn: each piece once, and nobody else gets in between."""
    expected = engines[0].generate(prompts[0], **OPTIONS[1]).tokens
    for _ in range(5):
        stream = engines[0].stream(prompts[0], **OPTIONS[1])
        shared = in_threads([lambda s=stream: [t for piece in s for t in piece.tokens] for _ in range(3)])
        assert all(isinstance(tokens, list) for tokens in shared), shared
        assert sorted(t for tokens in shared for t in tokens) == sorted(expected)
        assert stream.result.tokens == expected
        assert stream.result.finish_reason == "length"


def test_a_hook_that_asks_its_stream(engines: list[Engine], prompts: list[Ids]) -> None:
    stream = engines[0].stream(prompts[0], logits_hook=lambda tokens, row: next(stream), max_tokens=3)
    with pytest.raises(DFlashError, match="hook"):
        next(stream)
    assert engines[0].generate(prompts[0], max_tokens=3).tokens


def test_in_threads(engines: list[Engine], prompts: list[Ids]) -> None:
    expected = [e.generate(p, **o).tokens for e, p, o in zip(engines, prompts, OPTIONS, strict=False)]

    def job(i: int) -> Callable[[], list[Ids]]:
        return lambda: [engines[i].generate(prompts[i], **OPTIONS[i]).tokens for _ in range(4)]

    for i, answers in enumerate(in_threads([job(i) for i in range(3)])):
        assert answers == [expected[i]] * 4


def test_threads_share_one_engine(engine: Engine, prompts: list[Ids]) -> None:
    expected = [engine.generate(p, **OPTIONS[0]).tokens for p in prompts]

    def job(i: int) -> Callable[[], list[Ids]]:
        return lambda: [engine.generate(prompts[i], **OPTIONS[0]).tokens for _ in range(3)]

    assert in_threads([job(i) for i in range(4)]) == [[tokens] * 3 for tokens in expected]


def test_another_thread_waits_for_a_stream(engine: Engine, prompts: list[Ids]) -> None:
    expected = engine.generate(prompts[0], **OPTIONS[0]).tokens
    stream = engine.stream(prompts[1], **OPTIONS[0])
    next(stream)
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(engine.generate(prompts[0], **OPTIONS[0]).tokens))
    waiting.start()
    for _ in stream:
        assert not answers
    waiting.join()
    assert answers == [expected]
    assert len(stream.result.tokens) == 50


def test_a_later_call_of_the_same_thread_replaces_a_stream(engine: Engine, prompts: list[Ids]) -> None:
    stream = engine.stream(prompts[0], **OPTIONS[0])
    next(stream)
    assert engine.generate(prompts[1], **OPTIONS[0]).tokens
    with pytest.raises(DFlashError, match="later call"):
        next(stream)
    assert stream.result.finish_reason == "cancelled"


def test_a_dropped_stream_gives_the_engine_back(engine: Engine, prompts: list[Ids]) -> None:
    for _ in engine.stream(prompts[0], **OPTIONS[0]):
        break
    assert in_threads([lambda: len(engine.generate(prompts[0], **OPTIONS[0]).tokens)]) == [50]


def test_a_stream_is_closed_from_another_thread(engine: Engine, prompts: list[Ids]) -> None:
    stream = engine.stream(prompts[0], max_tokens=None, ignore_eos=True)
    next(stream)
    in_threads([stream.close])
    assert next(stream, None) is None
    assert stream.result.finish_reason == "cancelled"
    assert engine.generate(prompts[0], max_tokens=3).tokens


def test_a_stream_that_was_never_started_costs_nothing(engine: Engine, prompts: list[Ids]) -> None:
    stream = engine.stream(prompts[0])
    stream.close()
    assert stream.result.tokens == []
    assert list(stream) == []


def test_closing_waits_for_the_running_call(nano_path: Path, prompts: list[Ids]) -> None:
    engine = Engine(nano_path, n_ctx=2048)
    started = threading.Event()
    answers: list[Any] = []

    def work() -> None:
        for _ in (stream := engine.stream(prompts[0], max_tokens=400, ignore_eos=True)):
            started.set()
        answers.append(stream.result)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    engine.close()
    thread.join()
    assert len(answers[0].tokens) == 400
