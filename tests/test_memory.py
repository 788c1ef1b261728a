"""The memory a model will need is counted before it is loaded; on the CPU a lack of it is a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from dflash_cpp import Engine, _core, api, doctor, inspect_gguf


def test_what_fits_is_not_warned_about(nano_path: Path, nano_drafter_path: Path) -> None:
    assert _core.Model(str(nano_path)).memory_warning == ""
    assert _core.Model(str(nano_path), str(nano_drafter_path), n_ctx=512).memory_warning == ""


def test_what_does_not_fit_is_named_part_by_part(nano_path: Path, nano_drafter_path: Path) -> None:
    n_ctx = 2**24
    summary = inspect_gguf.summarize(nano_path, n_ctx=n_ctx)
    cache = summary.memory[f"f32 cache of {n_ctx} tokens"]
    if cache < 2 * doctor.examine().memory["available"]:
        pytest.skip(f"this machine has memory for {cache >> 30} GiB")
    # nothing of that size is allocated: a Model is weights
    text = _core.Model(
        str(nano_path), str(nano_drafter_path), n_ctx=n_ctx, kv_type="f32", draft_head="q4_0"
    ).memory_warning
    assert text.startswith("memory: ")
    assert " short. Needed: target weights " in text
    assert f"cache of {n_ctx} tokens (F32) {cache / 2**30:.2f} GiB" in text
    for part in ("drafter weights", "drafter's cache", "working memory (n_batch 512)", "kv_type='q8_0' (saves"):
        assert part in text
    assert "draft head (Q4_0) 72.00 KiB" in text and "draft_head='target' (saves 72.00 KiB)" in text
    advised = int(text.split("What would help: n_ctx=")[1].split(";")[0])
    assert (
        _core.Model(str(nano_path), str(nano_drafter_path), n_ctx=advised * 9 // 10, kv_type="f32").memory_warning == ""
    )


def test_the_engine_passes_the_warning_on(nano_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tight(_core.Model):
        memory_warning = "memory: 2 GiB short"

    monkeypatch.setattr(api._core, "Model", Tight)
    with pytest.warns(RuntimeWarning, match="2 GiB short"):
        Engine(nano_path, n_ctx=64).close()
