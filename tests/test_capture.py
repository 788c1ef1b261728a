"""Shards for drafter training. Catches: wrong bits, overflow to NaN, misaligned masks, half-written or mixed shards."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from conftest import Ids
from dflash_cpp import CapacityError, DFlashError, Engine
from dflash_cpp import capture as module
from dflash_cpp.capture import FP8_MAX, CaptureOptions, capture, fp8_values, to_bf16, to_fp8
from dflash_cpp.cli import main
from dflash_cpp.corpus import Sample, read_corpus


def raw(path: Path, name: str) -> tuple[str, list[int], bytes]:
    """dtype, shape and bytes of a tensor, read from the format's definition."""
    blob = path.read_bytes()
    n = int.from_bytes(blob[:8], "little")
    entry = json.loads(blob[8 : 8 + n])[name]
    low, high = entry["data_offsets"]
    return entry["dtype"], entry["shape"], blob[8 + n + low : 8 + n + high]


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_fp8(bits: np.ndarray) -> np.ndarray:
    return np.where(bits & 0x80, -1.0, 1.0) * fp8_values()[bits & 0x7F]


def test_bf16_rounds_to_nearest_even() -> None:
    # 1 + 2^-8 lies halfway between 1 and 1 + 2^-7: the even mantissa is 1; 1 + 3 * 2^-8 goes up.
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -2260.0, 0.0], dtype=np.float32)
    np.testing.assert_array_equal(from_bf16(to_bf16(x)), np.float32([1, 1, 1 + 2**-6, 1 + 2**-7, -2256, 0]))


def test_fp8_values_are_e4m3s() -> None:
    v = fp8_values()
    assert v[1] == 2**-9
    assert v[8] == 2**-6
    assert v[0b0111000] == 1.0
    assert v[-1] == FP8_MAX
    assert (np.diff(v) > 0).all()


def test_every_fp8_code_survives_and_the_rest_rounds() -> None:
    v = fp8_values()
    bits, scale = to_fp8(np.concatenate([v, -v]).astype(np.float32))
    assert scale == 1.0
    np.testing.assert_array_equal(bits & 0x7F, np.tile(np.arange(127), 2))
    x = np.random.default_rng(0).normal(0, 30, 10_000).astype(np.float32)
    bits, scale = to_fp8(x)
    near = np.abs(from_fp8(bits) * scale - x)
    best = np.abs(np.abs(x)[:, None] / scale - v[None]).min(axis=1) * scale
    np.testing.assert_allclose(near, best, atol=1e-4)
    middle = np.array([FP8_MAX, (v[8] + v[9]) / 2, (v[9] + v[10]) / 2], dtype=np.float32)
    assert to_fp8(middle)[0].tolist() == [126, 8, 10], "halfway goes to the even code"


def test_fp8_saturates_where_a_plain_cast_gives_nan() -> None:
    x = np.array([2260.0, -2260.0, 1.0, 0.0], dtype=np.float32)  # MiniMax-M2.7's residual stream peaks there
    bits, scale = to_fp8(x)
    assert not np.isin(bits & 0x7F, [0x7F]).any()
    np.testing.assert_allclose(from_fp8(bits) * scale, x, rtol=0.07, atol=1e-6)
    assert to_fp8(np.zeros(3, np.float32))[1] == 1.0


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3"])
def test_a_shard_holds_what_the_target_did(dtype: str, engine: Engine, prompts: list[Ids], tmp_path: Path) -> None:
    prompt = Sample("p", np.array(prompts[0], dtype=np.int32))
    (path,) = capture(engine, [prompt], tmp_path, CaptureOptions(dtype=dtype, max_tokens=24, ignore_eos=True))
    with safe_open(str(path), framework="numpy") as shard:  # the library reads it
        tokens, mask = shard.get_tensor("input_ids"), shard.get_tensor("loss_mask")
        assert shard.metadata()["prompt_tokens"] == str(len(prompts[0]))
    assert tokens.tolist() == [*prompts[0], *engine.generate(prompts[0], max_tokens=24, ignore_eos=True).tokens]
    assert mask.tolist() == [0] * len(prompts[0]) + [1] * 24
    taps = engine.taps(tokens).reshape(len(tokens), -1)
    kind, shape, data = raw(path, "hidden_states")
    assert shape == list(taps.shape)
    if dtype == "bf16":
        assert kind == "BF16"
        found = from_bf16(np.frombuffer(data, np.uint16)).reshape(shape)
        np.testing.assert_allclose(found, taps, rtol=2**-8)
    else:
        assert kind == "F8_E4M3"
        scale = np.frombuffer(raw(path, "hidden_states_scale")[2], np.float32)[0]
        found = (from_fp8(np.frombuffer(data, np.uint8)) * scale).reshape(shape)
        np.testing.assert_allclose(found, taps, rtol=2**-4, atol=float(scale) * 2**-9)
    assert read_corpus([path], None, engine.n_vocab)[0].tokens.tolist() == tokens.tolist()


def test_an_interrupted_run_goes_on(
    engine: Engine, prompts: list[Ids], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [Sample(str(i), np.array(p, dtype=np.int32)) for i, p in enumerate(prompts[:3])]
    options = CaptureOptions(max_tokens=4, ignore_eos=True)
    whole = module._write_safetensors

    def interrupted(path: Path, *rest: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    capture(engine, samples[:1], tmp_path, options)
    monkeypatch.setattr(module, "_write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        capture(engine, samples, tmp_path, options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000.safetensors", "capture.json"]
    monkeypatch.setattr(module, "_write_safetensors", whole)
    first = (tmp_path / "000000.safetensors").stat().st_mtime_ns
    assert len(capture(engine, samples, tmp_path, options)) == 3
    assert (tmp_path / "000000.safetensors").stat().st_mtime_ns == first, "whole shards are kept"
    with pytest.raises(DFlashError, match="shards of another capture"):
        capture(engine, samples, tmp_path, CaptureOptions(max_tokens=5))


def test_every_prompt_has_a_seed_of_its_own(engine: Engine, prompts: list[Ids], tmp_path: Path) -> None:
    sample = Sample("p", np.array(prompts[0], dtype=np.int32))
    options = CaptureOptions(max_tokens=16, temperature=1.0, seed=7, ignore_eos=True)
    shards = read_corpus(capture(engine, [sample, sample], tmp_path, options), None, engine.n_vocab)
    for i, shard in enumerate(shards):
        answer = engine.generate(prompts[0], max_tokens=16, temperature=1.0, seed=7 + i, ignore_eos=True)
        assert shard.tokens.tolist() == [*prompts[0], *answer.tokens]
    assert shards[0].tokens.tolist() != shards[1].tokens.tolist()


def test_a_folder_of_other_prompts_is_refused(engine: Engine, prompts: list[Ids], tmp_path: Path) -> None:
    samples = [Sample(str(i), np.array(p, dtype=np.int32)) for i, p in enumerate(prompts[:2])]
    options = CaptureOptions(max_tokens=4, ignore_eos=True)
    capture(engine, samples, tmp_path, options)
    with pytest.raises(DFlashError, match=r"000000\.safetensors: it was made from another prompt than 1"):
        capture(engine, samples[::-1], tmp_path, options)


def test_a_run_that_failed_at_once_leaves_the_folder_usable(
    engine: Engine, prompts: list[Ids], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Sample("p", np.array(prompts[0], dtype=np.int32))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_capture_one", lambda *args: signal.raise_signal(signal.SIGINT))
        capture(engine, [sample], tmp_path, CaptureOptions(max_tokens=9))
    (path,) = capture(engine, [sample], tmp_path, CaptureOptions(max_tokens=4, ignore_eos=True))
    assert json.loads((tmp_path / "capture.json").read_text())["options"]["max_tokens"] == 4
    assert path.is_file()


def test_wrong_input_is_refused(engine: Engine, make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    with pytest.raises(DFlashError, match="dtype"):
        CaptureOptions(dtype="fp4")
    for options in ({"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"seed": -1}):
        with pytest.raises(DFlashError, match=next(iter(options))):
            CaptureOptions(**options)  # type: ignore[arg-type]
    long = [Sample("p0", np.ones(3, np.int32)), Sample("p1", np.ones(engine.n_ctx + 1, np.int32))]
    with pytest.raises(CapacityError, match=r"p1.*n_ctx"):
        capture(engine, long, tmp_path / "none", CaptureOptions())
    assert not (tmp_path / "none").exists()
    with pytest.raises(DFlashError, match="tapped"):
        capture(make_engine("nano", drafter=False), [], tmp_path, CaptureOptions())
    with pytest.raises(DFlashError, match="finite"):
        module.write_shard(
            tmp_path / "x", np.zeros(1, np.int32), np.ones(1, bool), np.array([[np.nan]], np.float32), "bf16", {}
        )


def test_the_command(
    nano_path: Path, nano_drafter_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "def f():"}\n{"prompt": "import os"}\n')
    args = ["capture", "--target", str(nano_path), "--drafter", str(nano_drafter_path), "-n", "8", "--n-ctx", "256"]
    assert main([*args, "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "s"), "--ignore-eos"]) == 0
    assert "2 shards" in capsys.readouterr().out
    assert len(list((tmp_path / "s").glob("*.safetensors"))) == 2
