"""Wrong input gives one clear ConvertError; an old output survives every failure; the loaders survive fuzzing."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert import ConvertError, ConvertProgress, convert
from convert.checkpoint import Checkpoint, read_safetensors_header

import convert_fixtures as cf

Q = "model.layers.0.self_attn.q_proj"
OLD = b"GGUF the old file"


def refused(tmp_path: Path, model: cf.Model, pattern: str, **options: Any) -> str:
    """Convert; expect a ConvertError of one line matching `pattern`, the old output intact and no leftovers."""
    out = tmp_path / "out" / "o.gguf"
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(OLD)
    with pytest.raises(ConvertError, match=pattern) as info:
        convert(model.save(tmp_path / "m"), out, **options)
    assert "\n" not in str(info.value)
    assert [p.name for p in out.parent.iterdir()] == ["o.gguf"] and out.read_bytes() == OLD
    return str(info.value)


def drop(name: str) -> Callable[[cf.Model], None]:
    return lambda m: m.tensors.__delitem__(name)


def put(name: str, dtype: str, *shape: int) -> Callable[[cf.Model], None]:
    return lambda m: m.tensors.__setitem__(name, (dtype, np.ones(shape, dtype=cf.SIZES[dtype])))


def conf(key: str, value: Any) -> Callable[[cf.Model], None]:
    """Set config.json's dotted `key`; None removes it."""

    def change(model: cf.Model) -> None:
        *path, last = key.split(".")
        node = model.config
        for part in path:
            node = node[part]
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value

    return change


def file(name: str, content: Any) -> Callable[[cf.Model], None]:
    return lambda m: m.files.__setitem__(name, content)


def fused_experts(model: cf.Model) -> None:
    """All experts of a layer in one tensor, as transformers 5 holds them in memory."""
    for name in [name for name in model.tensors if ".experts." in name]:
        del model.tensors[name]
    put("model.layers.0.mlp.experts.gate_up_proj", "BF16", 3, 256, 128)(model)


QC = "quantization_config"
TARGET_ERRORS: list[tuple[Callable[[cf.Model], None], str]] = [
    # tensors
    (drop(f"{Q}.weight_scale"), r"q_proj.*weight_scale.*missing"),
    (drop(f"{Q}.weight_packed"), r"no weight for .*q_proj.*\[128, 128\].*expected .*weight_packed.*qweight"),
    (drop("model.layers.1.input_layernorm.weight"), r"input_layernorm.weight' \[128\] is missing"),
    (drop("model.layers.1.block_sparse_moe.gate.weight"), r"gate.weight' \[3, 128\] is missing"),
    (drop("lm_head.weight"), r"no weight for 'lm_head'"),
    (put(f"{Q}.weight_packed", "I32", 128, 15), r"weight_packed.*expected shape \[128, 16\].*found \[128, 15\]"),
    (put(f"{Q}.weight_packed", "F32", 128, 16), r"weight_packed.*expected type I32, found F32"),
    (put(f"{Q}.weight_scale", "BF16", 128, 8), r"weight_scale.*expected one scale per group of 32, 64 or 128"),
    (put(f"{Q}.weight_scale", "BF16", 128), r"weight_scale.*expected one scale per group"),
    (put(f"{Q}.weight_shape", "I64", 2), r"weight_shape.*expected \[128, 128\], found \[1, 1\]"),
    (put(f"{Q}.weight_zero_point", "I32", 15, 4), r"weight_zero_point.*expected shape \[16, 4\]"),
    (put(f"{Q}.weight", "BF16", 128, 128), r"q_proj.*twice, as weight_packed and as weight"),
    (put(f"{Q}.weight_g_idx", "I32", 128), r"weight_g_idx.*actorder"),
    (put(f"{Q}.bias", "BF16", 128), r"1 tensor\(s\) that the architecture does not have.*no bias"),
    (put("model.layers.2.input_layernorm.weight", "BF16", 128), r"does not have: 'model.layers.2.input_layernorm"),
    (put("model.mtp.0.weight", "BF16", 1), r"does not have.*mtp"),
    (put("model.layers.0.block_sparse_moe.gate.weight", "BF16", 4, 128), r"gate.weight.*\[3, 128\].*\[4, 128\]"),
    (put("model.layers.0.input_layernorm.weight", "F8_E4M3", 128), r"expected type .*found F8_E4M3.*fp8"),
    (put("model.embed_tokens.weight", "BF16", 47, 128), r"embed_tokens.*\[48, 128\].*found \[47, 128\]"),
    (fused_experts, r"experts.0.w1'.*Fused experts.*gate_up_proj.*one tensor for each expert"),
    # quantisation config
    (conf(f"{QC}.quant_method", "gptq"), r"quant_method: expected 'compressed-tensors' or 'awq', found 'gptq'"),
    (conf(f"{QC}.quant_method", "fp8"), r"found 'fp8'"),
    (conf(f"{QC}.format", "int-quantized"), r"quantization_config.format: expected 'pack-quantized'"),
    (conf(f"{QC}.config_groups.group_0.weights.num_bits", 8), r"group_0.weights.num_bits: expected 4, found 8"),
    (conf(f"{QC}.config_groups.group_0.weights.type", "float"), r"weights.type: expected 'int'"),
    (conf(f"{QC}.config_groups.group_0.weights.actorder", "group"), r"actorder: expected .*found 'group'"),
    (conf(f"{QC}.config_groups.group_0.weights.strategy", "block"), r"strategy: expected 'group'"),
    (conf(f"{QC}.config_groups.group_0.input_activations", {"num_bits": 8}), r"input_activations: expected null"),
    (conf(f"{QC}.config_groups.group_0.weights.symmetric", False), r"q_proj.weight_zero_point.*symmetric.*false"),
    (conf(QC, {"quant_method": "awq", "bits": 4, "version": "gemv"}), r"version: expected 'gemm', found 'gemv'"),
    (conf(QC, {"quant_method": "awq", "bits": 8, "version": "gemm"}), r"bits: expected 4, found 8"),
    # architecture
    (conf("model_type", "llama"), r""),
    (conf("hidden_size", None), r"config.json: hidden_size: expected an integer .*missing"),
    (conf("hidden_size", "128"), r"hidden_size: expected an integer .*found '128'"),
    (conf("hidden_size", True), r"hidden_size: expected an integer"),
    (conf("num_hidden_layers", 3), r"layers\.2.*missing"),
    (conf("num_hidden_layers", 1), r"does not have: 'model.layers.1"),
    (conf("num_local_experts", 4), r"\[4\].*|\[4, 128\]"),
    (conf("rope_theta", None), r"rope_theta: expected a positive number"),
    (conf("rotary_dim", 33), r"rotary_dim: expected an even number"),
    (conf("partial_rotary_factor", 0.25), r"rotary_dim: expected 16 .*found 32"),
    (conf("qk_norm_type", "per_head"), r"qk_norm_type: expected 'per_layer', found 'per_head'"),
    (conf("scoring_func", "softmax"), r"scoring_func: expected 'sigmoid'"),
    (conf("shared_intermediate_size", 64), r"shared_intermediate_size: expected 0"),
    (conf("attn_type_list", [1, 0]), r"attn_type_list"),
    (conf("rope_scaling", {"type": "yarn", "factor": 2.0}), r"rope_scaling: expected null"),
    (conf("num_experts_per_tok", 9), r"num_experts_per_tok: expected an integer from 1 to 3, found 9"),
    # tokenizer
    (file("tokenizer.json", "{"), r"tokenizer.json: not valid JSON"),
    (file("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"), r"tokenizer.json: .*git lfs pull"),
    (file("tokenizer.json", {"model": {"type": "Unigram"}}), r"tokenizer.json: expected a byte-level BPE"),
    (file("tokenizer.json", cf.tokenizer_json(60)), r"token .* has id 48; expected 0 to 47.*vocab_size"),
    (file("tokenizer_config.json", {"bos_token": "nope"}), r"bos_token: expected a token of tokenizer.json"),
    (file("generation_config.json", {"eos_token_id": 480}), r"eos_token_id: expected an integer from 0 to 47"),
    (file("generation_config.json", {"eos_token_id": [1, 480]}), r"eos_token_id: expected ids"),
    (file("config.json", "[]"), r"config.json: expected a JSON object"),
    (file("chat_template.jinja", "\udcff"), r"chat_template.jinja: cannot be read as UTF-8"),
    (file("tokenizer.json", {**cf.tokenizer_json(40), "added_tokens": [{"id": 41, "content": "\ud800"}]}), r"Unicode"),
]


@pytest.mark.parametrize(("change", "pattern"), TARGET_ERRORS)
def test_target_errors(tmp_path: Path, change: Callable[[cf.Model], None], pattern: str) -> None:
    model = cf.make_target(1)
    change(model)
    if pattern == "":
        model.config["architectures"] = ["LlamaForCausalLM"]
        pattern = r"expected a MiniMax-M2 model .* or a DFlash drafter.*found model_type 'llama'"
    message = refused(tmp_path, model, pattern)
    assert str(tmp_path / "m") in message or "tokenizer.ggml" in message  # every message says which file or key


DRAFTER_ERRORS: list[tuple[Callable[[cf.Model], None], str]] = [
    (conf("hidden_size", 64), r"hidden_size: expected 128.*another target"),
    (conf("vocab_size", 64), r"vocab_size: expected 48.*another target"),
    (conf("num_target_layers", 7), r"num_target_layers: expected 2.*another target"),
    (conf("dflash_config.target_layer_ids", [0, 2]), r"target_layer_ids: expected layers from 0 to 1.*another target"),
    (conf("dflash_config.target_layer_ids", [-1, 0]), r"target_layer_ids: expected layers from 0"),
    (conf("dflash_config.target_layer_ids", [0]), r"target_layer_ids: expected 2 layers"),
    (conf("dflash_config.mask_token_id", 48), r"mask_token_id: expected a token id from 0 to 47.*found 48"),
    (conf("dflash_config.mask_token_id", None), r"mask_token_id: expected a token id.*missing"),
    (conf("dflash_config.block_size", 4), r"block_size: expected 8"),
    (conf("dflash_config.selector_rank", 256), r"selector_rank: expected a DFlash v1 drafter"),
    (conf("block_size", None), r"block_size: expected an integer from 2 to 256"),
    (conf("block_size", 257), r"block_size: expected an integer from 2 to 256.*257"),
    (conf("layer_types", ["full_attention"]), r"layer_types: expected 2 of"),
    (conf("layer_types", ["full_attention", 1]), r"layer_types: expected 2 of"),
    (conf("layer_types", ["sliding_attention"] * 2), r"sliding_window: expected the window size"),
    (conf("rope_scaling", {"rope_type": "longrope"}), r"rope_type: expected 'default', 'linear' or 'yarn'"),
    (conf("rope_scaling", {"rope_type": "yarn"}), r"rope_scaling.factor: expected a positive number"),
    (drop("fc.weight"), r"'fc.weight' is missing; not a DFlash drafter"),
    (put("fc.weight", "BF16", 128, 200), r"fc.weight.*expected \[128, taps \* 128\]"),
    (drop("layers.1.mlp.up_proj.weight"), r"no weight for 'layers.1.mlp.up_proj'"),
    (put("d2t", "I64", 48), r"does not have: 'd2t'.*vocabulary of their own"),
    (put("layers.0.self_attn.q_proj.bias", "BF16", 128), r"no bias"),
    (file("tokenizer.json", {**cf.tokenizer_json(40), "added_tokens": [{"id": 3, "content": "x"}]}), r"token 3 is 'x'"),
]


@pytest.mark.parametrize(("change", "pattern"), DRAFTER_ERRORS)
def test_drafter_errors(tmp_path: Path, change: Callable[[cf.Model], None], pattern: str) -> None:
    target = cf.make_target(2).save(tmp_path / "t")
    model = cf.make_drafter(2)
    change(model)
    if "hidden_size: expected 128" in pattern:
        model.tensors["fc.weight"] = ("BF16", np.zeros((64, 128), np.uint16))
    assert str(tmp_path / "m") in refused(tmp_path, model, pattern, target_model=target)


def test_options_that_do_not_apply(tmp_path: Path) -> None:
    target, drafter = cf.make_target(3), cf.make_drafter(3)
    refused(tmp_path, target, r"--target-model is for drafters", target_model=tmp_path)
    refused(tmp_path, target, r"--tap-convention is for drafters", tap_convention="input")
    refused(tmp_path, target, r"outtype 'q5_k': expected one of f32", outtype="q5_k")
    refused(tmp_path, target, r"tap convention 'x': expected one of", tap_convention="x")
    folder = (tmp_path / "m").rename(tmp_path / "t")
    refused(tmp_path, drafter, r"--head: a drafter has none", head="q8_0", target_model=folder)
    refused(tmp_path, drafter, r"Pass --target-model DIR")
    refused(tmp_path, drafter, r"config.json: cannot be read", target_model=tmp_path / "nowhere")
    refused(tmp_path, drafter, r"expected the config of a MiniMax-M2 target", target_model=tmp_path / "m")
    quantised = copy.deepcopy(target)
    del quantised.tensors["lm_head.weight"]
    rng = np.random.default_rng(0)
    quantised.tensors.update(cf.make_linear(rng, "lm_head", cf.VOCAB, cf.HIDDEN, "sym32")[0])
    refused(tmp_path, quantised, r"'lm_head' is already quantised.*leave --head out", head="f16")


@pytest.mark.parametrize("form", ["sym32", "asym32"])
def test_inexact_scales(tmp_path: Path, form: str) -> None:
    model = cf.make_target(4, form)
    model.tensors[f"{Q}.weight_scale"][1][5, 2] = cf.bf16(np.float32(1.0078125 * 2**-20))
    message = refused(tmp_path, model, r"1 of \d+ scales.*q_proj.weight_scale.*--allow-inexact")
    assert "2^" not in message
    report = convert(tmp_path / "m", tmp_path / "o.gguf", allow_inexact=True)
    assert report.scales_inexact == 1 and not report.exact


@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0x4800])  # inf, nan, 131072
def test_scales_that_no_rounding_saves(tmp_path: Path, bits: int) -> None:
    model = cf.make_target(5)
    model.tensors[f"{Q}.weight_scale"][1][0, 0] = bits
    refused(tmp_path, model, r"q_proj.weight_scale' has the scale .*f16 cannot hold", allow_inexact=True)


def test_values_beyond_f16(tmp_path: Path) -> None:
    model = cf.make_target(6, "BF16")
    model.tensors[f"{Q}.weight"][1][3, 3] = cf.bf16(np.float32(1e6))
    refused(tmp_path, model, r"q_proj.weight.*holds .*beyond f16's 65504; choose bf16 or f32", outtype="f16")
    model.tensors[f"{Q}.weight"][1][3, 3] = 0x7FC0
    refused(tmp_path, model, r"q_proj.weight.*not finite", outtype="q8_0")


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head", "model.norm"])
@pytest.mark.parametrize("form", ["BF16", "F16", "F32"])
def test_weights_that_are_not_finite(tmp_path: Path, name: str, form: str) -> None:
    model = cf.make_target(6, plain=form)
    weights = model.tensors[f"{name}.weight"][1]
    weights.flat[7] = 0x7F80 if form == "BF16" else np.nan
    refused(tmp_path, model, rf"{name}.weight' .*not finite")


def test_rows_that_blocks_do_not_divide(tmp_path: Path) -> None:
    model = cf.make_drafter(7)
    name = "layers.0.mlp.down_proj.weight"
    for i in range(2):
        for role, shape in (("gate", (100, 128)), ("up", (100, 128)), ("down", (128, 100))):
            put(f"layers.{i}.mlp.{role}_proj.weight", "BF16", *shape)(model)
    model.config["intermediate_size"] = 100
    target = cf.make_target(7).save(tmp_path / "t")
    refused(tmp_path, model, rf"{name}.*rows of 100; Q8_0 needs a multiple of 32", outtype="q8_0", target_model=target)


def test_output_paths(tmp_path: Path) -> None:
    folder = cf.make_target(8).save(tmp_path / "m")
    other = tmp_path / "notes.txt"
    other.write_text("precious")
    for out, pattern in (
        (tmp_path / "no" / "o.gguf", "does not exist"),
        (tmp_path, "is a folder"),
        (other, "not a GGUF file"),
        (Path(os.devnull), "not a regular file"),
    ):
        with pytest.raises(ConvertError, match=pattern):
            convert(folder, out)
    assert other.read_text() == "precious"
    with pytest.raises(ConvertError, match="not a folder"):
        convert(tmp_path / "nothing", tmp_path / "o.gguf")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("phase", ["check", "write"])
def test_interrupt_leaves_the_old_file(tmp_path: Path, failure: type[BaseException], phase: str) -> None:
    folder = cf.make_target(9).save(tmp_path / "m")
    out = tmp_path / "out" / "o.gguf"
    out.parent.mkdir()
    out.write_bytes(OLD)

    def fail(step: ConvertProgress) -> None:
        if step.phase == phase and step.done_bytes > step.total_bytes // 2:
            raise failure

    with pytest.raises(failure):
        convert(folder, out, progress=fail)
    assert [p.name for p in out.parent.iterdir()] == ["o.gguf"] and out.read_bytes() == OLD
    convert(folder, out)
    assert out.read_bytes()[:4] == b"GGUF" and len(out.read_bytes()) > len(OLD)


def test_file_cut_during_the_conversion(tmp_path: Path) -> None:
    folder = cf.make_target(10).save(tmp_path / "m")

    def cut(step: ConvertProgress) -> None:
        if step.phase == "check" and step.done_bytes == step.total_bytes:
            os.truncate(folder / "model.safetensors", 60_000)

    with pytest.raises(ConvertError, match=r"ended inside tensor .* bytes short"):
        convert(folder, tmp_path / "o.gguf", progress=cut)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_write_error_is_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cf.make_target(11).save(tmp_path / "m")

    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConvertError, match=r"o.gguf: cannot be written: No space left on device"):
        convert(folder, tmp_path / "o.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_full_disk_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cf.make_target(11).save(tmp_path / "m")
    (tmp_path / ".o.gguf.123.part").write_bytes(b"left by a killed conversion")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 1000))
    steps: list[ConvertProgress] = []
    with pytest.raises(ConvertError, match=r"the disk has 0.0 MiB free; .*killed.*'\.o\.gguf\.123\.part'"):
        convert(folder, tmp_path / "o.gguf", progress=steps.append)
    assert not steps
    assert not (tmp_path / "o.gguf").exists()


def test_verification_notices_a_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cf.make_target(12).save(tmp_path / "m")
    import gguf

    padding = gguf.GGUFWriter.write_padding
    monkeypatch.setattr(gguf.GGUFWriter, "write_padding", lambda s, fp, n, align=None: padding(s, fp, n + 31, align))
    with pytest.raises(ConvertError, match="verification of the written file failed"):
        convert(folder, tmp_path / "o.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_shard_errors(tmp_path: Path) -> None:
    model = cf.make_target(13)
    index = "model.safetensors.index.json"

    def fresh(name: str) -> Path:
        return model.save(tmp_path / name, shards=3)

    folder = fresh("missing")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"missing shard.*00002-of-00003.*2 of 3 found"):
        Checkpoint(folder)
    folder = fresh("noindex")
    (folder / index).unlink()
    with pytest.raises(ConvertError, match=r"but no model.safetensors.index.json"):
        Checkpoint(folder)
    folder = fresh("both")
    cf.write_safetensors(folder / "model.safetensors", {})
    with pytest.raises(ConvertError, match=r"holds both"):
        Checkpoint(folder)
    folder = fresh("cut")
    shard = folder / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ConvertError, match=r"00003.*truncated: expected \d+ bytes, found \d+"):
        Checkpoint(folder)
    for key, value, pattern in (
        ("extra.weight", "model-00001-of-00003.safetensors", "names 1 tensor.*no shard holds: 'extra.weight'"),
        ("model.norm.weight", None, "does not name tensor 'model.norm.weight'"),
        ("model.norm.weight", "model-00001-of-00003.safetensors", "found it in model-00003"),
        ("model.norm.weight", "../x.safetensors", "expected a plain file name"),
        ("model.norm.weight", 5, "expected a plain file name"),
    ):
        folder = fresh("index")
        document = json.loads((folder / index).read_text())
        document["weight_map"].pop(key, None)
        if value is not None:
            document["weight_map"][key] = value
        (folder / index).write_text(json.dumps(document))
        with pytest.raises(ConvertError, match=pattern):
            Checkpoint(folder)
    for text, pattern in (("{", "not valid JSON"), ("[]", "weight_map"), ('{"weight_map": {}}', "weight_map")):
        (folder / index).write_text(text)
        with pytest.raises(ConvertError, match=pattern):
            Checkpoint(folder)
    folder = fresh("pointer")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4000000000\n"
    (folder / "model-00002-of-00003.safetensors").write_bytes(pointer)
    with pytest.raises(ConvertError, match=r"00002-of-00003.*Git LFS pointer.*git lfs pull"):
        Checkpoint(folder)
    folder = fresh("twice")
    part = {"model.norm.weight": model.tensors["model.norm.weight"]}
    cf.write_safetensors(folder / "model-00001-of-00003.safetensors", part)
    with pytest.raises(ConvertError, match=r"'model.norm.weight' is also in"):
        Checkpoint(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConvertError, match=r"no model.safetensors.*pytorch_model.bin.*not the safetensors format"):
        Checkpoint(empty)


def header_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "pattern"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "needs 8 bytes, data_offsets .* span 4"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "leaves a hole"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            "'b' overlaps",
        ),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "bytes that belong to no tensor"),
        ({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, "truncated"),
        ({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}, "unknown dtype 'Q9'"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "not a list of sizes"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "not a list of sizes"),
        ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, "not a list of sizes"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "not a pair"),
        ({"a": 3}, "expected the keys"),
        ([], "expected an object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON|expected the keys"),
    ],
)
def test_header_errors(tmp_path: Path, header: Any, pattern: str) -> None:
    with pytest.raises(ConvertError, match=pattern):
        read_safetensors_header(header_file(tmp_path / "x.safetensors", header, b"\0" * 16))


def test_fuzzed_headers_give_only_convert_errors(tmp_path: Path) -> None:
    """Thousands of truncations and bit flips: a list of in-bounds tensors, or a ConvertError, and nothing else."""
    rng = np.random.default_rng(0)
    tensors: cf.Tensors = {}
    for i in range(4):
        tensors.update(cf.make_linear(rng, f"layers.{i}", 8, 32, ["sym32", "asym32", "BF16", "awq32"][i])[0])
    path = tmp_path / "x.safetensors"
    cf.write_safetensors(path, tensors)
    good = path.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    accepted = 0
    cuts = [*range(0, length + 1, 7), *rng.integers(0, len(good), 300)]
    for i in range(4000):
        data = bytearray(good)
        if i < len(cuts):
            data = data[: int(cuts[i])]
        else:
            for _ in range(int(rng.integers(1, 4))):
                position = int(rng.integers(0, 8 if i % 8 == 0 else length))
                data[position] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(data)
        try:
            entries = read_safetensors_header(path)
        except ConvertError:
            continue
        accepted += 1
        assert all(entry.offset + entry.nbytes <= len(data) for entry in entries)
    assert 0 < accepted < 2500  # a flipped letter of a name is still a valid file


def test_fuzzed_checkpoints_give_only_convert_errors(tmp_path: Path) -> None:
    """Bit flips anywhere in config, tokenizer and header of a whole checkpoint, through the converter."""
    rng = np.random.default_rng(1)
    model = cf.make_target(14, n_experts=1)
    folder = model.save(tmp_path / "m")
    names = ["config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"]
    good = {name: (folder / name).read_bytes() for name in names}
    header = int.from_bytes(good["model.safetensors"][:8], "little")
    for i in range(250):
        name = names[i % len(names)]
        data = bytearray(good[name])
        end = header if name == "model.safetensors" else len(data)
        for _ in range(int(rng.integers(1, 3))):
            data[int(rng.integers(0, end))] ^= 1 << int(rng.integers(0, 7))
        (folder / name).write_bytes(data)
        with contextlib.suppress(ConvertError):
            convert(folder, tmp_path / "o.gguf")
        (folder / name).write_bytes(good[name])
    assert not list(tmp_path.glob(".*part"))


def test_verification_notices_any_changed_header_byte(tmp_path: Path) -> None:
    """Whatever byte of names, shapes, types, offsets or tensor edges changes on disk, the file is not accepted."""
    from convert.api import make_plan
    from convert.gguf_check import verify_gguf
    from convert.gguf_out import _write
    from convert.linear import Encoder
    from convert.plan import Options

    with Checkpoint(cf.make_target(15, n_experts=1).save(tmp_path / "m")) as checkpoint:
        plan = make_plan(checkpoint, Options(), None)
        path = tmp_path / "x.gguf"
        edges = _write(plan, path, Encoder(checkpoint, False), lambda count, name: None)
    verify_gguf(plan, path, edges)
    good = path.read_bytes()
    values_end = good.index(b"token_embd.weight") - 8
    infos_end = good.index(b"output.weight") + 40
    rng = np.random.default_rng(0)
    positions = [*range(24), *rng.integers(values_end, infos_end, 300), len(good) - 1]
    for position in positions:
        data = bytearray(good)
        data[int(position)] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(data)
        with pytest.raises(ConvertError, match="verification"):
            verify_gguf(plan, path, edges)
    for cut in (0, 3, 23, values_end - 5, infos_end, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(ConvertError, match="verification"):
            verify_gguf(plan, path, edges)
