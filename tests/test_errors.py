"""Wrong input gets one clear error before any work. Catches crashes, tracebacks from inside, and vague messages."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dflash_cpp
from conftest import checkpoint_dir
from dflash_cpp import CapacityError, DFlashError, Engine, _core

BAD_OPTIONS = [
    ({"max_tokens": 0}, "max_tokens.*at least 1.*0"),
    ({"max_tokens": 2.5}, "max_tokens.*2.5"),
    ({"temperature": -0.1}, "temperature.*-0.1"),
    ({"temperature": math.nan}, "temperature.*nan"),
    ({"temperature": "hot"}, "temperature.*hot"),
    ({"top_k": -1}, "top_k.*-1"),
    ({"top_p": 0}, "top_p.*0"),
    ({"top_p": 1.1}, "top_p.*1.1"),
    ({"min_p": 2}, "min_p.*2"),
    ({"seed": -1}, "seed.*-1"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ""}, "stop.*non-empty"),
    ({"stop": [3]}, "stop.*3"),
    ({"stop": 3}, "stop.*3"),
    ({"depth": -1}, "depth.*-1"),
    ({"depth": 16}, r"depth.*0\.\.15.*16"),
    ({"depth": "deep"}, "depth.*deep"),
    ({"depth": True}, "depth.*True"),
    ({"depth": np.array([1, 2])}, r"depth.*array\(\[1, 2\]\)"),
    ({"top_p": 1e-300}, "top_p.*1e-300"),
    ({"temperature": 1e300}, r"temperature.*1e\+300"),
    ({"repetition_penalty": 0}, "repetition_penalty.*0"),
    ({"repetition_penalty": 1e-40}, r"repetition_penalty.*1e-6\.\.1e6.*1e-40"),
    ({"repetition_penalty": 1e308}, r"repetition_penalty.*1e\+308"),
    ({"presence_penalty": math.inf}, "presence_penalty.*inf"),
    ({"presence_penalty": -1e308}, r"presence_penalty.*-1e\+308"),
    ({"frequency_penalty": 3e38}, r"frequency_penalty.*1e\+30.*3e\+38"),
    ({"frequency_penalty": None}, "frequency_penalty.*None"),
    ({"penalty_last_n": -2}, "penalty_last_n.*-2"),
    ({"logit_bias": [1]}, "logit_bias.*mapping"),
    ({"logit_bias": {1: math.nan}}, "logit_bias.*nan"),
    ({"logit_bias": {1: 1e39}}, r"logit_bias of token 1.*1e\+39"),
    ({"logit_bias": {-1: 0.0}}, "logit_bias.*-1"),
    ({"logit_bias": {2**40: 0.0}}, "logit_bias.*1099511627776"),
    ({"logit_bias": {5000: 1.0}}, "logit_bias.*5000"),
    ({"logits_hook": 3}, "logits_hook.*3"),
    ({"ignore_eos": 1}, "ignore_eos.*1"),
    ({"lookup": "yes"}, "lookup.*yes"),
    ({"max_token": 1}, "unknown option 'max_token'.*'max_tokens'"),
    ({"xyzzy": 1.0}, "unknown option 'xyzzy'.*max_tokens"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_generate_options(options: dict[str, Any], message: str, engine: Engine) -> None:
    with pytest.raises(DFlashError, match=message):
        engine.generate("def f(", **options)
    assert engine.generate("def f(", max_tokens=2).tokens, "the engine stays usable"


BAD_PROMPTS = [
    ("", "prompt.*empty"),
    ([], "prompt.*at least one token"),
    ([1024], r"prompt.*0\.\.1023.*1024 at position 0"),
    ([1, 2, -3], "prompt.*-3 at position 2"),
    ([1, 2**40], "prompt.*position 1"),
    ([1.5], "prompt.*integer.*1.5"),
    ([True], "prompt.*integer.*True"),
    (["a"], "prompt.*integer.*'a'"),
    (b"bytes", "prompt.*bytes"),
    (7, "prompt.*int"),
    (None, "prompt.*none"),
    (np.zeros((2, 2), dtype=np.int32), "prompt.*one dimension"),
    (np.zeros(3, dtype=np.float32), "prompt.*integer"),
    ("\ud800", "Unicode"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS, ids=lambda v: ascii(v)[:30])
def test_prompts(prompt: Any, message: str, engine: Engine) -> None:
    with pytest.raises(DFlashError, match=message):
        engine.generate(prompt, max_tokens=2)


def test_a_prompt_longer_than_the_context(engine: Engine) -> None:
    with pytest.raises(CapacityError, match=r"prompt.*n_ctx = 1024.*1025"):
        engine.generate([5] * 1025)
    with pytest.raises(CapacityError, match=r"tokens.*n_ctx = 1024.*1025"):
        engine.logits([5] * 1025)
    assert engine.generate([5] * 1024).finish_reason == "context"


def test_extreme_values_that_are_in_range(engine: Engine) -> None:
    expected = engine.generate("def f(", max_tokens=8)
    extreme = {"repetition_penalty": 1e6, "presence_penalty": -1e30, "frequency_penalty": -1e30}
    for options in (extreme, {"logit_bias": {5: 1e30}}, {"temperature": 1e38, "seed": 1}, {"top_k": 2**31 - 1}):
        assert len(engine.generate("def f(", max_tokens=8, ignore_eos=True, **options).tokens) == 8
    assert engine.generate("def f(", max_tokens=2**70).finish_reason in ("stop", "context")
    assert engine.generate("def f(", max_tokens=8).tokens == expected.tokens


def test_prompt_and_messages(engine: Engine) -> None:
    with pytest.raises(DFlashError, match="both"):
        engine.generate("a", messages=[{"role": "user", "content": "b"}])
    with pytest.raises(DFlashError, match="tools"):
        engine.generate("a", tools=[])
    for tools in (3, "f", {"name": "f"}, [3]):
        with pytest.raises(DFlashError, match="tools: expected a list of mappings"):
            engine.chat([{"role": "user", "content": "a"}], tools=tools)  # type: ignore[arg-type]


def test_detokenize(engine: Engine) -> None:
    assert engine.detokenize([]) == ""
    assert engine.detokenize(np.array(engine.tokenize("import os"))) == "import os"
    for ids, message in (
        ("abc", "tokens.*str"),
        ([-1], "tokens.*-1"),
        ([1024], "tokens.*1024"),
        ([1.5], "tokens.*1.5"),
    ):
        with pytest.raises(DFlashError, match=message):
            engine.detokenize(ids)  # type: ignore[arg-type]


BAD_ENGINE_OPTIONS = [
    ({"backend": "cuda"}, "backend.*'cpu'.*cuda"),
    ({"backend": np.array(["cpu", "hip"])}, "backend.*'cpu'.*array"),
    ({"precise": 1}, "precise.*1"),
    ({"n_ctx": 1}, "n_ctx.*1"),
    ({"n_ctx": "8k"}, "n_ctx.*8k"),
    ({"n_threads": 0}, "n_threads.*0"),
    ({"kv_type": "q4_0"}, "kv_type.*'f16'.*q4_0"),
    ({"n_batch": 0}, "n_batch.*0"),
    ({"cpu_isa": "sse9"}, "cpu_isa.*sse9"),
    ({"cpu_isa": "neon_i8mm" if "avx2" in _core.cpu_isas() else "avx2"}, "cpu_isa.*'plain'.*(neon_i8mm|avx2)"),
    ({"numa": "some"}, "numa.*'interleave'.*some"),
    ({"progress": 3}, "progress.*3"),
    ({"n_thread": 3}, "unknown option 'n_thread'.*'n_threads'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_ENGINE_OPTIONS, ids=lambda v: str(v)[:40])
def test_engine_options(options: dict[str, Any], message: str, nano_path: Path) -> None:
    with pytest.raises(DFlashError, match=message):
        Engine(nano_path, **options)


def test_more_context_than_memory(nano_path: Path) -> None:
    with pytest.raises(DFlashError):
        Engine(nano_path, n_ctx=2**25)


@pytest.mark.parametrize("n_threads", [-1, 4097])
def test_threads_of_the_compiled_model(n_threads: int, nano_path: Path) -> None:
    with pytest.raises(DFlashError, match=f"n_threads: 0 .* to 4096 expected, found {n_threads}"):
        _core.Model(str(nano_path), n_threads=n_threads)


def test_files_that_are_not_there(nano_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DFlashError, match=r"target.*nothing\.gguf.*found nothing"):
        Engine(tmp_path / "nothing.gguf")
    with pytest.raises(DFlashError, match=r"target.*folder.*convert"):
        Engine(tmp_path)
    with pytest.raises(DFlashError, match=r"drafter.*no\.gguf"):
        Engine(nano_path, tmp_path / "no.gguf")
    with pytest.raises(DFlashError, match=r"target.*path"):
        Engine(3)  # type: ignore[arg-type]


def test_files_that_are_not_gguf(nano_path: Path, tmp_path: Path) -> None:
    for content in (b"", b"GGUF", b"PK\x03\x04" + bytes(100), b"GGUF" + struct.pack("<IQQ", 99, 0, 0)):
        path = tmp_path / "wrong.gguf"
        path.write_bytes(content)
        with pytest.raises(DFlashError, match=r"wrong\.gguf"):
            Engine(path)
        with pytest.raises(DFlashError, match=r"wrong\.gguf"):
            Engine(nano_path, path)
        path.unlink()


def test_a_truncated_file(nano_path: Path, tmp_path: Path) -> None:
    data = nano_path.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 5000, 1000, 30):
        path = tmp_path / f"cut{size}.gguf"
        path.write_bytes(data[:size])
        with pytest.raises(DFlashError, match=rf"cut{size}\.gguf: truncated.*copy or convert the file again"):
            Engine(path)


def test_a_part_of_a_split_file(tmp_path: Path) -> None:
    """Large files of other converters come in parts; the second one has neither architecture nor tokenizer."""
    path = tmp_path / "m2-00002-of-00003.gguf"
    keys = b"".join(
        struct.pack("<Q", len(name)) + name + struct.pack("<IH", 2, value)  # uint16
        for name, value in ((b"split.no", 1), (b"split.count", 3))
    )
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + keys)
    with pytest.raises(DFlashError, match=r"m2-00002.*part 2 of 3.*llama-gguf-split --merge"):
        Engine(path)


def test_swapped_roles(nano_path: Path, nano_drafter_path: Path) -> None:
    with pytest.raises(DFlashError, match=r"minimax-m2.*dflash|tokenizer"):
        Engine(nano_drafter_path)
    with pytest.raises(DFlashError, match=r"dflash.*minimax-m2"):
        Engine(nano_path, nano_path)


def patched(source: Path, out: Path, key: str, old: bytes, new: bytes) -> Path:
    """A copy with a metadata value changed in place."""
    data = bytearray(source.read_bytes())
    at = data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key)
    value = data.index(old, at, at + 64)
    data[value : value + len(old)] = new
    out.write_bytes(data)
    return out


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def value(n: int) -> bytes:
    """A u32 as the file holds it: its type, then itself."""
    return struct.pack("<II", 4, n)


DRAFTER_PATCHES = [
    ("dflash.embedding_length", value(128), value(256), "embedding_length|n_embd|shape|hidden"),
    ("dflash.block_count", value(3), value(4), "blk.3|block_count"),
    ("dflash.block_size", value(16), value(0), "block_size"),
    ("dflash.target_layers", u32(4) + u32(5), u32(4) + u32(9), "target_layers.*9|tap.*9|layer.*9"),
    ("tokenizer.ggml.mask_token_id", value(1023), value(1024), "mask_token_id.*1024"),
    ("dflash.attention.head_count_kv", value(1), value(0), "head_count_kv"),
]


@pytest.mark.parametrize(("key", "old", "new", "message"), DRAFTER_PATCHES, ids=[p[0] for p in DRAFTER_PATCHES])
def test_a_drafter_that_does_not_fit(
    key: str, old: bytes, new: bytes, message: str, nano_path: Path, nano_drafter_path: Path, tmp_path: Path
) -> None:
    wrong = patched(nano_drafter_path, tmp_path / "wrong.gguf", key, old, new)
    with pytest.raises(DFlashError, match=message) as error:
        Engine(nano_path, wrong)
    assert "wrong.gguf" in str(error.value)


TARGET_PATCHES = [
    ("minimax-m2.block_count", value(6), value(7), "blk.6"),
    ("minimax-m2.block_count", value(6), value(5), "blk.5"),
    ("minimax-m2.expert_count", value(16), value(15), "16.*15|15.*16"),
    ("minimax-m2.expert_used_count", value(4), value(17), "expert_used_count"),
    ("minimax-m2.attention.head_count", value(4), value(3), "head_count"),
    ("minimax-m2.rope.dimension_count", value(64), value(63), "dimension_count"),
    ("general.architecture", b"minimax-m2", b"minimax-m9", "minimax-m9"),
]


@pytest.mark.parametrize(
    ("key", "old", "new", "message"), TARGET_PATCHES, ids=[f"{p[0]}={p[2]!r}" for p in TARGET_PATCHES]
)
def test_a_target_that_contradicts_itself(
    key: str, old: bytes, new: bytes, message: str, nano_path: Path, tmp_path: Path
) -> None:
    wrong = patched(nano_path, tmp_path / "wrong.gguf", key, old, new)
    with pytest.raises(DFlashError, match=message) as error:
        Engine(wrong)
    assert "wrong.gguf" in str(error.value)


def test_a_drafter_of_another_target(gguf_path: Callable[[str], Path], nano_path: Path) -> None:
    checkpoint_dir("mini-m2")
    with pytest.raises(DFlashError, match="mini-m2-dflash"):
        Engine(nano_path, gguf_path("mini-m2-dflash"))


@pytest.mark.parametrize(
    ("key", "old", "new", "message"),
    [
        ("dflash.target.block_count", 6, 48, r"target\.block_count.*6 expected, found 48.*another target"),
        ("dflash.vocab_size", 1024, 200064, r"vocab_size.*1024 expected, found 200064.*another target"),
    ],
)
def test_a_drafter_of_a_target_of_the_same_width(
    key: str, old: int, new: int, message: str, nano_path: Path, nano_drafter_path: Path, tmp_path: Path
) -> None:
    path = patched(nano_drafter_path, tmp_path / "other.gguf", key, u32(old), u32(new))
    with pytest.raises(DFlashError, match=message):
        Engine(nano_path, path)


def test_paths_of_any_bytes(nano_path: Path, nano_drafter_path: Path, tmp_path: Path) -> None:
    names = [tmp_path / "żółć 日本 ☃.gguf", Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf"))]
    for path, source in zip(names, (nano_drafter_path, nano_path), strict=True):
        path.write_bytes(source.read_bytes())
    with Engine(names[1], names[0], n_ctx=64) as engine:
        assert engine.generate("import ", max_tokens=2).tokens
    with pytest.raises(DFlashError, match=r"general\.architecture"):
        Engine(nano_path, names[1])


@pytest.mark.parametrize("options", [{}, {"depth": 0}, {"temperature": 1.0}, {"repetition_penalty": 1.1}])
@pytest.mark.parametrize("name", ["output_norm.weight", "token_embd.weight"])
def test_weights_that_are_no_numbers(
    name: str, options: dict[str, Any], nano_path: Path, nano_drafter_path: Path, tmp_path: Path
) -> None:
    """A damaged file must not answer with token 0 for ever."""
    data = bytearray(nano_path.read_bytes())
    tensor = next(t for t in _core.Gguf(str(nano_path)).tensors if t.name == name)
    nan = {"F32": struct.pack("<f", math.nan), "BF16": b"\xc0\x7f"}[tensor.type]
    data[tensor.offset : tensor.offset + tensor.nbytes] = nan * (tensor.nbytes // len(nan))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with Engine(path, nano_drafter_path, n_ctx=64) as engine, pytest.raises(DFlashError, match=r"NaN.*damaged"):
        engine.generate("import ", max_tokens=3, **options)


def test_a_tensor_that_is_missing_is_named(nano_path: Path, tmp_path: Path) -> None:
    data = nano_path.read_bytes()
    name = b"blk.2.attn_k.weight"
    assert data.count(name) == 1
    path = tmp_path / "renamed.gguf"
    path.write_bytes(data.replace(name, b"blk.2.attn_X.weight"))
    with pytest.raises(DFlashError, match=r"renamed\.gguf.*blk\.2\.attn_k\.weight"):
        Engine(path)


def test_names_that_appear_twice(nano_path: Path, tmp_path: Path) -> None:
    data, path = nano_path.read_bytes(), tmp_path / "twice.gguf"
    for name, other in (
        (b"blk.2.attn_k.weight", b"blk.1.attn_k.weight"),
        (b"minimax-m2.attention.head_count_kv", b"minimax-m2.attention.head_count"),
    ):
        old, new = (struct.pack("<Q", len(n)) + n for n in (name, other))
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))
        with pytest.raises(DFlashError, match=f"{other.decode()}' appears twice"):
            Engine(path)


def test_a_missing_tensor_by_name(nano_path: Path) -> None:
    with pytest.raises(DFlashError, match="nothing_here"):
        _core.Gguf(str(nano_path)).tensor("nothing_here")


def test_no_drafter(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("nano", drafter=False)
    assert engine.block_size == 1
    with pytest.raises(DFlashError, match=r"depth.*without a drafter.*3"):
        engine.generate("a", depth=3)
    with pytest.raises(DFlashError, match=r"taps.*drafter"):
        engine.taps("a")
    with pytest.raises(DFlashError, match=r"draft_logits.*drafter"):
        engine.draft_logits("a", 1)


def test_draft_logits_arguments(engine: Engine) -> None:
    for n in (0, 16, 1.5, True):
        with pytest.raises(DFlashError, match=r"n:.*1\.\.15"):
            engine.draft_logits("a", 1, n)  # type: ignore[arg-type]
    with pytest.raises(DFlashError, match=r"anchor.*1024"):
        engine.draft_logits("a", 1024)
    with pytest.raises(DFlashError, match="block_rows"):
        engine.draft_logits("a", 1, 4, block_rows=3)


def test_a_closed_engine(nano_path: Path) -> None:
    engine = Engine(nano_path, n_ctx=64)
    engine.close()
    engine.close()
    uses = [lambda: engine.generate("a"), lambda: engine.logits("a"), engine.reset, lambda: engine.n_ctx]
    for use in (*uses, lambda: engine.block_size, lambda: engine.session_stats, lambda: engine.taps("a")):
        with pytest.raises(DFlashError, match="closed"):
            use()


def test_the_one_liner(nano_path: Path, nano_drafter_path: Path) -> None:
    g = dflash_cpp.generate(nano_path, "import ", nano_drafter_path, n_ctx=64, max_tokens=4, depth=3)
    assert len(g.tokens) == 4
    with pytest.raises(DFlashError, match=r"unknown option 'n_ctxx'.*'n_ctx'"):
        dflash_cpp.generate(nano_path, "import ", n_ctxx=64)


def test_an_error_in_a_hook_comes_through(engine: Engine) -> None:
    def hook(tokens: Any, row: Any) -> None:
        raise ZeroDivisionError("mine")

    expected = engine.generate("import ", max_tokens=5).tokens
    with pytest.raises(ZeroDivisionError, match="mine"):
        engine.generate("import ", logits_hook=hook)
    assert engine.generate("import ", max_tokens=5).tokens == expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_hook_that_writes_no_numbers(value: float, temperature: float, engine: Engine) -> None:
    def hook(tokens: Any, row: np.ndarray) -> None:
        row[7] = value

    with pytest.raises(DFlashError, match=f"logits_hook.*{value}.*token 7"):
        engine.generate("import ", logits_hook=hook, temperature=temperature)


def test_a_hook_may_keep_its_rows(nano_path: Path) -> None:
    rows: list[np.ndarray] = []
    with Engine(nano_path, n_ctx=64) as engine:
        engine.generate("import ", max_tokens=3, logits_hook=lambda tokens, row: rows.append(row), ignore_eos=True)
    copies = [row.copy() for row in rows]
    del engine
    assert all(row.flags.owndata for row in rows), "a view would point into memory that is freed"
    assert len({row.tobytes() for row in rows}) == 3, "each row is its own"
    assert [row.tobytes() for row in rows] == [row.tobytes() for row in copies]


def test_a_hook_that_calls_its_engine(engine: Engine) -> None:
    with pytest.raises(DFlashError, match="hook"):
        engine.generate("import ", logits_hook=lambda tokens, row: engine.reset())
    assert engine.generate("import ", max_tokens=5).tokens


def test_progress_of_loading(nano_path: Path, nano_drafter_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    Engine(nano_path, nano_drafter_path, n_ctx=64, progress=lambda *args: seen.append(args)).close()
    assert [*dict.fromkeys(stage for stage, _, _ in seen)] == ["target", "drafter", "draft head"]
    assert all(0 <= done <= total for _, done, total in seen)

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine(nano_path, n_ctx=64, progress=stop)


def test_a_stream_of_a_closed_engine(nano_path: Path) -> None:
    with Engine(nano_path, n_ctx=64) as engine:
        stream = engine.stream("import ", max_tokens=9, ignore_eos=True)
        next(stream)
    with pytest.raises(DFlashError, match="engine: it is closed"):
        next(stream)
