"""The written GGUF holds exactly the checkpoint's values, in every format the converter reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from convert import ConvertError, convert
from convert import quant_formats as qf
from gguf import GGMLQuantizationType as GGMLType
from hypothesis import given, settings
from hypothesis import strategies as st

import convert_fixtures as cf


def check_values(path: Path, expected: dict[str, np.ndarray], mins_tolerance: float = 0.0) -> None:
    _, tensors = cf.read_gguf(path)
    assert set(tensors) == set(expected)
    for name, values in expected.items():
        got = cf.values_of(tensors[name])
        assert got.shape == values.shape, name
        if tensors[name].tensor_type == GGMLType.Q4_1 and mins_tolerance:
            np.testing.assert_allclose(got, values, rtol=0, atol=mins_tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(got, values, err_msg=name)


@pytest.mark.parametrize("form", ["sym32", "sym64", "sym128"])
@pytest.mark.parametrize("scale_dtype", ["BF16", "F16"])
def test_symmetric_is_q4_0_exactly(tmp_path: Path, form: str, scale_dtype: str) -> None:
    model = cf.make_target(1, form, form, scale_dtype=scale_dtype)
    report = convert(model.save(tmp_path / "m"), tmp_path / "o.gguf")
    assert report.types["Q4_0"] == 7 * cf.LAYERS and "Q4_1" not in report.types
    assert report.exact and report.scales > 0
    check_values(tmp_path / "o.gguf", model.expected)


@pytest.mark.parametrize("form", ["asym32", "asym64", "asym128", "awq32", "awq64", "awq128"])
def test_asymmetric_is_q4_1_to_f16_minimums(tmp_path: Path, form: str) -> None:
    model = cf.make_target(2, form, form)
    report = convert(model.save(tmp_path / "m"), tmp_path / "o.gguf")
    assert report.types["Q4_1"] == 7 * cf.LAYERS
    assert report.scales_inexact == 0 and 0 < report.mins_rounded < report.mins
    # Scales are below 1e-2: 0.0074 of a step is the documented bound.
    check_values(tmp_path / "o.gguf", model.expected, mins_tolerance=0.0074e-2)


@pytest.mark.parametrize("form", ["asym32", "awq64"])
def test_asymmetric_nibbles_and_scales_are_kept(tmp_path: Path, form: str) -> None:
    """With power-of-two scales every minimum is exact, so the values must be too."""
    model = cf.make_target(3, form, form)
    for name, (dtype, array) in list(model.tensors.items()):
        if name.endswith(("scale", "scales")):
            raw = cf.bf16(np.full(array.shape, 2**-8)) if dtype == "BF16" else np.full(array.shape, 2**-8, np.float16)
            model.tensors[name] = (dtype, raw)
    report = convert(model.save(tmp_path / "m"), tmp_path / "o.gguf")
    assert report.exact and report.mins > 0
    _, tensors = cf.read_gguf(tmp_path / "o.gguf")
    got = cf.values_of(tensors["blk.1.attn_output.weight"])
    prefix = "model.layers.1.self_attn.o_proj"
    for row, col in np.random.default_rng(0).integers(0, [cf.HIDDEN, cf.HEADS * cf.HEAD_DIM], (200, 2)):
        assert got[row, col] == element(model.tensors, prefix, form, int(row), int(col))


def element(tensors: cf.Tensors, prefix: str, form: str, row: int, col: int) -> float:
    """One weight, straight from the formats' definitions, with power-of-two scales."""
    group = int(form[-2:])
    if form.startswith("awq"):
        slot = [0, 4, 1, 5, 2, 6, 3, 7][row % 8]
        q = int(tensors[f"{prefix}.qweight"][1][col, row // 8]) >> (4 * slot) & 15
        z = int(tensors[f"{prefix}.qzeros"][1][col // group, row // 8]) >> (4 * slot) & 15
    else:
        q = int(tensors[f"{prefix}.weight_packed"][1][row, col // 8]) >> (4 * (col % 8)) & 15
        z = int(tensors[f"{prefix}.weight_zero_point"][1][row // 8, col // group]) >> (4 * (row % 8)) & 15
    return (q - z) * 2.0**-8


@pytest.mark.parametrize("form", ["BF16", "F16", "F32"])
def test_unquantised_keeps_its_type(tmp_path: Path, form: str) -> None:
    model = cf.make_target(4, form, form, plain=form)
    report = convert(model.save(tmp_path / "m"), tmp_path / "o.gguf")
    assert report.exact
    check_values(tmp_path / "o.gguf", model.expected)
    _, tensors = cf.read_gguf(tmp_path / "o.gguf")
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_down_exps.weight", "token_embd.weight", "output.weight"):
        assert tensors[name].tensor_type.name == form
    for name in ("blk.0.ffn_gate_inp.weight", "blk.0.exp_probs_b.bias", "blk.0.attn_q_norm.weight"):
        assert tensors[name].tensor_type == GGMLType.F32


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_outtype_head_and_embedding(tmp_path: Path, outtype: str) -> None:
    model = cf.make_target(5, "BF16", "sym32")
    convert(model.save(tmp_path / "m"), tmp_path / "o.gguf", outtype=outtype, head="q8_0", embedding="F16")
    _, tensors = cf.read_gguf(tmp_path / "o.gguf")
    assert tensors["blk.0.attn_v.weight"].tensor_type.name == outtype.upper()
    assert tensors["blk.0.ffn_up_exps.weight"].tensor_type == GGMLType.Q4_0
    assert tensors["output.weight"].tensor_type == GGMLType.Q8_0
    assert tensors["token_embd.weight"].tensor_type == GGMLType.F16
    error = np.abs(cf.values_of(tensors["blk.0.attn_v.weight"]) - model.expected["blk.0.attn_v.weight"]).max()
    assert error <= {"f32": 0, "f16": 1e-4, "bf16": 0, "q8_0": 2e-3, "q4_0": 3e-2}[outtype]


def test_mixed_checkpoint_is_decided_tensor_by_tensor(tmp_path: Path) -> None:
    model = cf.make_target(6, "BF16", "sym32")
    rng = np.random.default_rng(60)
    for prefix, name, form in (
        ("model.layers.1.self_attn.q_proj", "blk.1.attn_q.weight", "asym64"),
        ("model.layers.1.self_attn.o_proj", "blk.1.attn_output.weight", "sym128"),
        ("lm_head", "output.weight", "sym32"),
    ):
        rows, cols = model.expected[name].shape
        model.tensors.pop(f"{prefix}.weight")
        tensors, model.expected[name] = cf.make_linear(rng, prefix, rows, cols, form)
        model.tensors.update(tensors)
    report = convert(model.save(tmp_path / "m"), tmp_path / "o.gguf")
    assert {k: report.types[k] for k in ("Q4_1", "Q4_0")} == {"Q4_1": 1, "Q4_0": 3 * cf.LAYERS + 2}
    check_values(tmp_path / "o.gguf", model.expected, mins_tolerance=0.0074e-2)


def test_symmetric_expert_in_an_asymmetric_stack(tmp_path: Path) -> None:
    model = cf.make_target(7, "sym32", "sym64")
    prefix = "model.layers.0.block_sparse_moe.experts.1.w2"
    for name in [n for n in model.tensors if n.startswith(prefix)]:
        del model.tensors[name]
    tensors, values = cf.make_linear(np.random.default_rng(70), prefix, cf.HIDDEN, cf.INTER, "asym32")
    model.tensors.update(tensors)
    model.expected["blk.0.ffn_down_exps.weight"][1] = values
    convert(model.save(tmp_path / "m"), tmp_path / "o.gguf")
    check_values(tmp_path / "o.gguf", model.expected, mins_tolerance=0.0074e-2)
    _, written = cf.read_gguf(tmp_path / "o.gguf")
    assert written["blk.0.ffn_down_exps.weight"].tensor_type == GGMLType.Q4_1
    # The symmetric experts of the stack stay exact: m = -8 d.
    got = cf.values_of(written["blk.0.ffn_down_exps.weight"])
    np.testing.assert_array_equal(got[0], model.expected["blk.0.ffn_down_exps.weight"][0])


def test_quantised_and_plain_experts_in_one_stack_are_refused(tmp_path: Path) -> None:
    model = cf.make_target(8, "sym32", "sym32")
    prefix = "model.layers.1.block_sparse_moe.experts.2.w1"
    for name in [n for n in model.tensors if n.startswith(prefix)]:
        del model.tensors[name]
    model.tensors.update(cf.make_linear(np.random.default_rng(80), prefix, cf.INTER, cf.HIDDEN, "BF16")[0])
    with pytest.raises(ConvertError, match=r"ffn_gate_exps.*experts\.2\.w1.*Quantise all experts"):
        convert(model.save(tmp_path / "m"), tmp_path / "o.gguf")


@pytest.mark.parametrize(("naming", "moe"), [("w", "mlp"), ("proj", "mlp"), ("proj", "block_sparse_moe")])
@pytest.mark.parametrize("shards", [1, 4])
def test_namings_and_shards(tmp_path: Path, naming: str, moe: str, shards: int) -> None:
    model = cf.make_target(9, naming=naming, moe=moe, n_experts=12)  # 12: "10" sorts before "2"
    convert(model.save(tmp_path / "m", shards), tmp_path / "o.gguf")
    check_values(tmp_path / "o.gguf", model.expected)


def test_tied_head_is_a_copy_of_the_embedding(tmp_path: Path) -> None:
    model = cf.make_target(10)
    del model.tensors["lm_head.weight"]
    model.config["tie_word_embeddings"] = True
    model.expected["output.weight"] = model.expected["token_embd.weight"]
    convert(model.save(tmp_path / "m"), tmp_path / "o.gguf")
    check_values(tmp_path / "o.gguf", model.expected)


@pytest.mark.parametrize("form", ["BF16", "F16", "F32"])
def test_drafter_values(tmp_path: Path, form: str) -> None:
    target = cf.make_target(11).save(tmp_path / "t")
    model = cf.make_drafter(11, form=form)
    if form == "F32":  # f16-exact except for one matrix, which must go to bf16
        for name, (_, raw) in model.tensors.items():
            model.tensors[name] = ("F32", raw.astype(np.float16).astype(np.float32))
        model.tensors["fc.weight"][1][0, 0] = 1e-7
        for key, source in (("fc", "fc"), ("blk.0.attn_q", "layers.0.self_attn.q_proj")):
            model.expected[f"{key}.weight"] = model.tensors[f"{source}.weight"][1]
    report = convert(model.save(tmp_path / "d"), tmp_path / "o.gguf", target_model=target)
    _, tensors = cf.read_gguf(tmp_path / "o.gguf")
    if form == "F32":
        assert tensors["fc.weight"].tensor_type == GGMLType.BF16 and report.values_rounded > 0
        assert tensors["blk.0.attn_q.weight"].tensor_type == GGMLType.F16
        np.testing.assert_array_equal(
            cf.values_of(tensors["blk.0.attn_q.weight"]), model.expected["blk.0.attn_q.weight"]
        )
    else:
        assert report.types == {form: 15, "F32": 10} and report.exact
        check_values(tmp_path / "o.gguf", model.expected)


@pytest.mark.parametrize("outtype", ["q8_0", "q4_0"])
def test_drafter_quantised(tmp_path: Path, outtype: str) -> None:
    target = cf.make_target(12).save(tmp_path / "t")
    model = cf.make_drafter(12)
    report = convert(model.save(tmp_path / "d"), tmp_path / "o.gguf", target_model=target, outtype=outtype)
    assert report.types == {outtype.upper(): 15, "F32": 10}
    _, tensors = cf.read_gguf(tmp_path / "o.gguf")
    step = {"q8_0": 0.01, "q4_0": 0.1}[outtype]
    np.testing.assert_allclose(cf.values_of(tensors["fc.weight"]), model.expected["fc.weight"], rtol=0, atol=step)


@pytest.mark.parametrize("pair", ["nano-m2", "mini-m2"])
def test_real_pair(tmp_path: Path, pair: str) -> None:
    """The real checkpoints, dequantised here from their safetensors files with the safetensors package's framing."""
    root = cf.SHARED if (cf.SHARED / pair).exists() else cf.real_models()
    if root is None or not (root / pair).exists():
        pytest.skip(f"{pair} is not here")
    convert(root / pair, tmp_path / "t.gguf")
    convert(root / f"{pair}-dflash", tmp_path / "d.gguf", target_model=root / pair)
    stored = load_dequantised(root / pair)
    _, tensors = cf.read_gguf(tmp_path / "t.gguf")
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blk."))
    assert len(tensors) == 13 * layers + 3
    names = {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"}
    for i in range(layers):
        for dst, src in names.items():
            got = cf.values_of(tensors[f"blk.{i}.{dst}.weight"])
            np.testing.assert_array_equal(got, stored[f"model.layers.{i}.{src}"])
        for role, w in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            got = cf.values_of(tensors[f"blk.{i}.ffn_{role}_exps.weight"])
            for e in range(got.shape[0]):
                np.testing.assert_array_equal(got[e], stored[f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}"])
    np.testing.assert_array_equal(cf.values_of(tensors["output.weight"]), stored["lm_head"])
    draft = load_dequantised(root / f"{pair}-dflash")
    _, tensors = cf.read_gguf(tmp_path / "d.gguf")
    np.testing.assert_array_equal(cf.values_of(tensors["fc.weight"]), draft["fc"])
    np.testing.assert_array_equal(cf.values_of(tensors["enc.output_norm.weight"]), draft["hidden_norm"])
    np.testing.assert_array_equal(cf.values_of(tensors["blk.2.ffn_down.weight"]), draft["layers.2.mlp.down_proj"])


def load_dequantised(directory: Path) -> dict[str, np.ndarray]:
    """Every weight of a symmetric group-32 checkpoint, by module name, through the safetensors package."""
    from safetensors import deserialize

    raw: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, info in deserialize(file.read_bytes()):
            raw[name] = np.frombuffer(info["data"], dtype=cf.SIZES[info["dtype"]]).reshape(info["shape"])
    values = {}
    for name, array in raw.items():
        if name.endswith(".weight"):
            values[name.removesuffix(".weight")] = cf.widen("BF16", array)
        elif name.endswith(".weight_packed"):
            base = name.removesuffix(".weight_packed")
            nibbles = (array.astype(np.int64)[..., None] >> (4 * np.arange(8))) & 15
            scale = np.repeat(cf.widen("BF16", raw[f"{base}.weight_scale"]), 32, axis=1)
            values[base] = (nibbles.reshape(scale.shape) - 8).astype(np.float32) * scale
    return values


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 5))
def test_reorder_sequential_moves_nibbles(seed: int, rows: int, blocks: int) -> None:
    nibbles = np.random.default_rng(seed).integers(0, 16, (rows, 32 * blocks))
    packed = cf.pack_words(nibbles, cf.SEQUENTIAL)
    qs = qf.reorder_sequential(packed.view(np.uint8)).view(np.uint8).reshape(rows, blocks, 16)
    unpacked = np.concatenate([qs & 15, qs >> 4], axis=2).reshape(rows, -1)
    np.testing.assert_array_equal(unpacked, nibbles)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 5))
def test_reorder_awq_moves_nibbles(seed: int, rows8: int, blocks: int) -> None:
    nibbles = np.random.default_rng(seed).integers(0, 16, (8 * rows8, 32 * blocks))
    qs = qf.reorder_awq(cf.pack_words(nibbles.T, cf.INTERLEAVED)).view(np.uint8).reshape(8 * rows8, blocks, 16)
    unpacked = np.concatenate([qs & 15, qs >> 4], axis=2).reshape(8 * rows8, -1)
    np.testing.assert_array_equal(unpacked, nibbles)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 4))
def test_zero_points_unpack(seed: int, rows: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    zeros = np.zeros((-(-rows // 8) * 8, groups), dtype=np.int64)
    zeros[:rows] = rng.integers(0, 16, (rows, groups))
    np.testing.assert_array_equal(
        qf.unpack_row_zero_points(cf.pack_words(zeros.T, cf.SEQUENTIAL).T, rows), zeros[:rows]
    )
    np.testing.assert_array_equal(qf.unpack_awq_zero_points(cf.pack_words(zeros.T, cf.INTERLEAVED)), zeros)


def test_every_bf16_scale_is_judged_like_numpy_does() -> None:
    """All 65536 bf16 patterns: exact ones are counted exact, the others inexact or refused."""
    patterns = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    values = cf.widen("BF16", patterns)
    fits = np.isfinite(values) & (np.abs(values) < 65520)
    _, inexact = qf.round_scales(patterns[fits], "BF16")
    assert inexact == np.count_nonzero(values[fits].astype(np.float16).astype(np.float32) != values[fits])
    window = fits & (np.abs(values) >= 2**-17)
    assert qf.round_scales(patterns[window], "BF16")[1] == 0
    for pattern in patterns[~fits][::97]:
        with pytest.raises(qf.UnrepresentableError):
            qf.round_scales(np.array([pattern]), "BF16")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_q4_1_minimum_stays_within_its_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scales = rng.choice([1, -1], (16, 4)) * 2.0 ** rng.uniform(-24, 11, (16, 4))
    scales = scales.astype(np.float16)
    zeros = rng.integers(0, 16, (16, 4)).astype(np.uint8)
    qs = np.zeros((16, 4), dtype=qf.QS)
    data, _ = qf.pack_q4_1(qs, scales, zeros)
    mins = data.view(qf.Q4_1_BLOCK)["m"].view(np.float16).reshape(16, 4).astype(np.float64)
    exact = -zeros.astype(np.float64) * scales.astype(np.float64)
    assert (np.abs(mins - exact) <= 0.0074 * np.abs(scales.astype(np.float64))).all()
