"""The memory a model will need is counted before it is loaded; on the CPU a lack of it is a warning."""

from __future__ import annotations

import subprocess
import sys
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


def test_more_threads_than_the_system_starts(nano_path: Path) -> None:
    """In a process of its own, whose address space has no room for so many stacks."""
    program = f"""
import resource
from dflash_cpp import DFlashError, Engine
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    Engine({str(nano_path)!r}, n_ctx=64, n_threads=4096)
except DFlashError as e:
    print(e)
print(len(Engine({str(nano_path)!r}, n_ctx=64, n_threads=1).generate("import ", max_tokens=2).tokens))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    message, tokens = done.stdout.splitlines()
    assert message.startswith("n_threads: 4096 threads expected"), done.stderr
    assert tokens == "2", "the process stays usable"
