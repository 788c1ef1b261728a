"""What the engine makes of a file's metadata, against the definitions. Catches wrong rotations, windows and norms.

The embedded pair uses the plain form of each; drafters of other models do not.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from dflash_cpp.convert import convert

from conftest import checkpoint_dir
from dflash_cpp import Engine, _core


def drafter_config(nano_path: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """drafter_config of the embedded drafter with changes of its config.json."""
    source = folder / "checkpoint"
    shutil.copytree(checkpoint_dir("nano-m2-dflash"), source)
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    convert(source, folder / "drafter.gguf", target_model=checkpoint_dir("nano-m2"))
    found = _core.Model(str(nano_path), str(folder / "drafter.gguf")).drafter_config
    assert found is not None
    return found


def plain(n_rot: int, theta: float) -> np.ndarray:
    return theta ** (-np.arange(0, n_rot, 2) / n_rot)


def yarn(n_rot: int, theta: float, factor: float, original: int) -> np.ndarray:
    """arXiv 2309.00071, as transformers computes it: beta_fast 32, beta_slow 1."""
    low, high = (n_rot * math.log(original / (b * 2 * math.pi)) / (2 * math.log(theta)) for b in (32, 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), n_rot - 1)
    interpolated = np.clip((np.arange(n_rot // 2) - low) / (high - low), 0, 1)
    base = plain(n_rot, theta)
    return base / factor * interpolated + base * (1 - interpolated)


def test_plain_rotation(nano_path: Path, tmp_path: Path) -> None:
    c = drafter_config(nano_path, tmp_path, rope_theta=1e4)
    np.testing.assert_allclose(c["rope_inv_freq"], plain(c["head_dim"], 1e4), rtol=1e-6)
    assert c["rope_scale"] == 1.0


def test_half_of_a_head_rotates(nano_path: Path, tmp_path: Path) -> None:
    c = drafter_config(nano_path, tmp_path, rope_theta=1e4, partial_rotary_factor=0.5)
    np.testing.assert_allclose(c["rope_inv_freq"], plain(c["head_dim"] // 2, 1e4), rtol=1e-6)


def test_linear_scaling(nano_path: Path, tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    c = drafter_config(nano_path, tmp_path, rope_theta=1e4, rope_scaling=scaling)
    np.testing.assert_allclose(c["rope_inv_freq"], plain(c["head_dim"], 1e4) / 4, rtol=1e-6)
    assert c["rope_scale"] == 1.0


@pytest.mark.parametrize("attention_factor", [None, 1.25])
def test_yarn(attention_factor: float | None, nano_path: Path, tmp_path: Path) -> None:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
    if attention_factor is not None:
        scaling["attention_factor"] = attention_factor
    c = drafter_config(nano_path, tmp_path, rope_theta=1e4, rope_scaling=scaling)
    expected = yarn(c["head_dim"], 1e4, 8.0, 4096)
    np.testing.assert_allclose(c["rope_inv_freq"], expected, rtol=1e-6)
    assert not np.allclose(expected, plain(c["head_dim"], 1e4))
    assert c["rope_scale"] == pytest.approx(attention_factor or 0.1 * math.log(8.0) + 1.0)


def test_windows_and_norms(nano_path: Path, tmp_path: Path) -> None:
    n = drafter_config(nano_path, tmp_path / "plain")["n_layer"]
    kinds = ["sliding_attention", *["full_attention"] * (n - 1)]
    c = drafter_config(nano_path, tmp_path / "sliding", layer_types=kinds, sliding_window=24, rms_norm_eps=3e-5)
    assert c["sliding_window"] == [24] + [0] * (n - 1)
    assert c["causal"] == [True] + [False] * (n - 1), "a sliding layer is causal in the block"
    assert c["rms_eps"] == pytest.approx(3e-5)
    c = drafter_config(nano_path, tmp_path / "free", layer_types=kinds, sliding_window=24, is_causal=False)
    assert c["causal"] == [False] * n, "unless the file says otherwise"


def test_windows_reach_the_attention(nano_path: Path, nano_drafter_path: Path, tmp_path: Path) -> None:
    """A window wider than the context changes nothing, a narrow one does, and so does the causal block."""
    context = list(range(40, 80))

    def logits(path: Path) -> np.ndarray:
        with Engine(nano_path, path, n_ctx=64) as engine:
            return engine.draft_logits(context, 5, 4, block_rows=8)

    def sliding(name: str, **changes: Any) -> np.ndarray:
        kinds = ["sliding_attention"] * 3
        drafter_config(nano_path, tmp_path / name, layer_types=kinds, **changes)
        return logits(tmp_path / name / "drafter.gguf")

    full = logits(nano_drafter_path)
    np.testing.assert_array_equal(sliding("wide", sliding_window=48, is_causal=False), full)
    assert not np.array_equal(sliding("narrow", sliding_window=16, is_causal=False), full)
    assert not np.array_equal(sliding("causal", sliding_window=48), full)


def test_the_last_tap_is_what_the_final_norm_sees(nano_path: Path, tmp_path: Path) -> None:
    """Layer n_layer of dflash.target_layers: the logits follow from it by norm and head."""
    n_layer = _core.Model(str(nano_path)).target_config["n_layer"]
    extra = {"mask_token_id": 1023, "target_layer_ids": [1, 2, 3, 4, n_layer - 1]}  # z-lab: after its last layer
    assert drafter_config(nano_path, tmp_path, dflash_config=extra)["target_layers"][-1] == n_layer
    target = _core.Gguf(str(nano_path))
    norm, head = target.tensor("output_norm.weight"), target.tensor("output.weight")
    with Engine(nano_path, tmp_path / "drafter.gguf", n_ctx=64, precise=True) as engine:
        x, logits = engine.taps("import os")[:, -1].astype(np.float64), engine.logits("import os")
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * norm
    np.testing.assert_allclose(logits, normed @ head.T.astype(np.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_tensors_lie_where_the_files_alignment_says(alignment: int, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(2), tmp_path / "aligned.gguf"
    tensors = {name: rng.normal(size=(3, 5)).astype(np.float32) for name in ("one", "two")}
    w = gguf.GGUFWriter(path, "minimax-m2")
    w.add_custom_alignment(alignment)
    for name, values in tensors.items():
        w.add_tensor(name, values)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    for name, values in tensors.items():
        np.testing.assert_array_equal(_core.Gguf(str(path)).tensor(name), values)
