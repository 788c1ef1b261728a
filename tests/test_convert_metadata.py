"""Metadata, tensor names and the command line of the converter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert import ConvertError, ConvertProgress, convert
from convert.convert_awq_to_gguf import main
from convert.drafter import default_target_layer_ids

import convert_fixtures as cf

SCRIPT = cf.REPO / "convert" / "convert_awq_to_gguf.py"


def metadata(model: cf.Model, tmp_path: Path, **options: Any) -> dict[str, Any]:
    convert(model.save(tmp_path / "m"), tmp_path / "o.gguf", **options)
    return cf.read_gguf(tmp_path / "o.gguf")[0]


def test_target_metadata(tmp_path: Path) -> None:
    meta = metadata(cf.make_target(1), tmp_path)
    expected = {
        "general.architecture": "minimax-m2",
        "general.type": "model",
        "general.name": "m",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "general.sampling.top_k": 7,
        "general.sampling.top_p": np.float32(0.9),
        "general.sampling.temp": 0.5,
        "minimax-m2.block_count": cf.LAYERS,
        "minimax-m2.context_length": 1024,
        "minimax-m2.embedding_length": cf.HIDDEN,
        "minimax-m2.feed_forward_length": cf.INTER,
        "minimax-m2.attention.head_count": cf.HEADS,
        "minimax-m2.attention.head_count_kv": cf.KV_HEADS,
        "minimax-m2.attention.key_length": cf.HEAD_DIM,
        "minimax-m2.attention.value_length": cf.HEAD_DIM,
        "minimax-m2.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "minimax-m2.rope.freq_base": 5e6,
        "minimax-m2.rope.dimension_count": 32,
        "minimax-m2.expert_count": cf.EXPERTS,
        "minimax-m2.expert_used_count": 2,
        "minimax-m2.expert_feed_forward_length": cf.INTER,
        "minimax-m2.expert_gating_func": 2,
        "minimax-m2.vocab_size": cf.VOCAB,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "minimax-m2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 38,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.merges": ["A B", "C D"],
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: meta.get(key) for key in expected} == expected
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == cf.VOCAB
    assert tokens[37:42] == [chr(ord("A") + 37), "<eos>", "<tool>", "[PAD40]", "[PAD41]"]
    assert types[37:42] == [1, 3, 4, 5, 5]
    assert meta["tokenizer.huggingface.json"] == (tmp_path / "m" / "tokenizer.json").read_text()
    assert "dflash_cpp.eos_token_ids" not in meta


def test_what_the_defaults_hide(tmp_path: Path) -> None:
    model = cf.make_target(1, plain="F32")  # most tensors are F32, most bytes are Q4_0
    model.config["rope_parameters"] = {"rope_theta": 1e4}
    model.files["tokenizer_config.json"] |= {"add_eos_token": True}
    model.files["tokenizer.json"]["model"]["merges"] = [["A ", "B"], "C D"]
    meta = metadata(model, tmp_path)
    assert meta["general.file_type"] == 2
    assert meta["minimax-m2.rope.freq_base"] == 5e6, "the top level says it, too"
    assert meta["tokenizer.ggml.add_eos_token"] is True
    assert meta["tokenizer.ggml.merges"] == ["A\u0120 B", "C D"], "a space inside a half is shifted"


def test_tensor_names_are_llama_cpps(tmp_path: Path) -> None:
    """The gguf package's own table for the architecture names every tensor that is written."""
    import gguf

    metadata(cf.make_target(1), tmp_path)
    names = set(cf.read_gguf(tmp_path / "o.gguf")[1])
    known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.MINIMAXM2]}
    for name in names:
        base = name.rsplit(".", 1)[0]
        parts = base.split(".")
        assert (base if parts[0] != "blk" else ".".join(["blk", "{bid}", *parts[2:]])) in known, name


def test_eos_list_and_fallbacks(tmp_path: Path) -> None:
    model = cf.make_target(2)
    model.files["generation_config.json"] = {"eos_token_id": [38, 3]}
    meta = metadata(model, tmp_path)
    assert meta["tokenizer.ggml.eos_token_id"] == 38 and meta["dflash_cpp.eos_token_ids"] == [38, 3]
    assert not any(key.startswith("general.sampling") for key in meta)
    model.files["generation_config.json"] = {}
    model.config["eos_token_id"] = 5
    assert metadata(model, tmp_path)["tokenizer.ggml.eos_token_id"] == 5
    del model.config["eos_token_id"]
    model.files["tokenizer_config.json"] = {"eos_token": {"content": "<eos>"}, "chat_template": "T"}
    del model.files["chat_template.jinja"]
    (tmp_path / "m" / "chat_template.jinja").unlink()
    meta = metadata(model, tmp_path)
    assert meta["tokenizer.ggml.eos_token_id"] == 38 and meta["tokenizer.chat_template"] == "T"
    named = [{"name": "default", "template": "T"}, {"name": "tool_use", "template": "U"}]
    model.files["tokenizer_config.json"] = {"chat_template": named}
    meta = metadata(model, tmp_path)
    assert meta["tokenizer.chat_template.tool_use"] == "U" and meta["tokenizer.chat_templates"] == ["tool_use"]


def test_rotary_dim_forms(tmp_path: Path) -> None:
    key = "minimax-m2.rope.dimension_count"
    model = cf.make_target(3)
    del model.config["rotary_dim"], model.config["rope_theta"]
    model.config["rope_parameters"] = {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "rope_type": "default"}
    meta = metadata(model, tmp_path)
    assert meta[key] == 16 and meta["minimax-m2.rope.freq_base"] == 1e4
    del model.config["rope_parameters"]["partial_rotary_factor"]
    report = convert(model.save(tmp_path / "m"), tmp_path / "o.gguf")
    assert cf.read_gguf(tmp_path / "o.gguf")[0][key] == 64
    assert len(report.notes) == 1 and "neither rotary_dim nor partial_rotary_factor; using 64" in report.notes[0]


def test_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    model = cf.make_target(4)
    model.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", np.ones(16, np.float32))
    metadata(model, tmp_path)


def drafter_metadata(model: cf.Model, tmp_path: Path, **options: Any) -> dict[str, Any]:
    target = cf.make_target(5).save(tmp_path / "t")
    return metadata(model, tmp_path, target_model=target, **options)


def test_drafter_metadata(tmp_path: Path) -> None:
    meta = drafter_metadata(cf.make_drafter(5), tmp_path)
    expected = {
        "general.architecture": "dflash",
        "general.file_type": 32,
        "dflash.block_count": 2,
        "dflash.context_length": 1024,
        "dflash.embedding_length": cf.HIDDEN,
        "dflash.feed_forward_length": 160,
        "dflash.attention.head_count": 4,
        "dflash.attention.head_count_kv": 2,
        "dflash.attention.key_length": 32,
        "dflash.attention.value_length": 32,
        "dflash.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "dflash.rope.freq_base": 1e4,
        "dflash.block_size": 8,
        "dflash.target_layers": [1, 2],
        "dflash.vocab_size": cf.VOCAB,
        "dflash.target.block_count": cf.LAYERS,
        "dflash.target.embedding_length": cf.HIDDEN,
        "tokenizer.ggml.mask_token_id": cf.VOCAB - 1,
        "tokenizer.ggml.eos_token_id": 38,
    }
    assert {key: meta.get(key) for key in expected} == expected
    assert len(meta["tokenizer.ggml.tokens"]) == cf.VOCAB
    absent = ("rope.scaling.type", "attention.sliding_window", "attention.causal", "rope.dimension_count")
    assert not any(f"dflash.{key}" in meta for key in absent)
    assert "tokenizer.huggingface.json" not in meta


@pytest.mark.parametrize(("convention", "layers"), [("after", [1, 2]), ("input", [0, 1])])
def test_tap_convention(tmp_path: Path, convention: str, layers: list[int]) -> None:
    meta = drafter_metadata(cf.make_drafter(6), tmp_path, tap_convention=convention)
    assert meta["dflash.target_layers"] == layers


def test_tap_convention_input_may_name_the_last_residual(tmp_path: Path) -> None:
    model = cf.make_drafter(6)
    model.config["dflash_config"]["target_layer_ids"] = [0, cf.LAYERS]
    assert drafter_metadata(model, tmp_path, tap_convention="input")["dflash.target_layers"] == [0, cf.LAYERS]
    with pytest.raises(ConvertError, match="layers from 0 to 1"):
        drafter_metadata(model, tmp_path)


def test_default_taps() -> None:
    assert default_target_layer_ids(62, 5) == [1, 16, 30, 44, 59]  # nvidia's drafter for MiniMax-M2.7
    assert default_target_layer_ids(62, 1) == [31]


def test_drafter_variants(tmp_path: Path) -> None:
    model = cf.make_drafter(7, layers=3, taps=(1,))
    del model.config["block_size"], model.config["dflash_config"]["target_layer_ids"]
    model.config["dflash_config"] |= {"block_size": 5, "mask_token_id": 40, "causal": False}
    model.config |= {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 77,
        "vocab_size": 41,  # the tokenizer's ids, without the target's padding
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 48.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
        },
    }
    report = convert(
        model.save(tmp_path / "d"), tmp_path / "o.gguf", target_model=cf.make_target(7).save(tmp_path / "t")
    )
    meta = cf.read_gguf(tmp_path / "o.gguf")[0]
    expected = {
        "dflash.block_size": 5,
        "dflash.block_count": 3,
        "dflash.target_layers": [2],  # z-lab's default for one tap: the middle layer
        "dflash.attention.sliding_window": 77,
        "dflash.attention.sliding_window_pattern": [True, False, True],
        "dflash.attention.causal": False,
        "dflash.rope.scaling.type": "yarn",
        "dflash.rope.scaling.factor": 48.0,
        "dflash.rope.scaling.original_context_length": 4096,
        "dflash.rope.scaling.yarn_beta_fast": 32.0,
        "dflash.vocab_size": cf.VOCAB,
        "tokenizer.ggml.mask_token_id": 40,
    }
    assert {key: meta.get(key) for key in expected} == expected
    assert any("default [1]" in note for note in report.notes)


def test_qwen_rule_for_windows(tmp_path: Path) -> None:
    model = cf.make_drafter(8, layers=3)
    del model.config["layer_types"]
    model.config |= {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    assert drafter_metadata(model, tmp_path)["dflash.attention.sliding_window_pattern"] == [False, True, True]


def test_options_in_dflash_config(tmp_path: Path) -> None:
    model = cf.make_drafter(8, layers=2)
    del model.config["layer_types"]
    model.config["dflash_config"] |= {"use_swa": True, "swa_window_size": 9, "causal": True}
    model.config["partial_rotary_factor"] = 0.5
    meta = drafter_metadata(model, tmp_path)
    assert meta["dflash.attention.sliding_window"] == 9
    assert meta["dflash.attention.sliding_window_pattern"] == [True, True]
    assert meta["dflash.attention.causal"] is True
    assert meta["dflash.rope.dimension_count"] == 16


def test_drafter_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    model = cf.make_drafter(9)
    model.files["tokenizer.json"] = cf.tokenizer_json(40)
    assert len(metadata(model, tmp_path)["tokenizer.ggml.tokens"]) == cf.VOCAB
    assert drafter_metadata(model, tmp_path)["tokenizer.ggml.mask_token_id"] == cf.VOCAB - 1


def test_progress_callback(tmp_path: Path) -> None:
    steps: list[ConvertProgress] = []
    report = convert(cf.make_target(10).save(tmp_path / "m"), tmp_path / "o.gguf", progress=steps.append)
    for phase in ("check", "write"):
        part = [step for step in steps if step.phase == phase]
        assert [s.done_bytes for s in part] == sorted(s.done_bytes for s in part)
        assert part[-1].done_bytes == part[-1].total_bytes > 0
    assert report.path == tmp_path / "o.gguf" and report.bytes == report.path.stat().st_size
    assert report.n_tensors == sum(report.types.values()) == 13 * cf.LAYERS + 3


def test_same_input_same_file(tmp_path: Path) -> None:
    folder = cf.make_target(11).save(tmp_path / "m")
    convert(folder, tmp_path / "a.gguf")
    convert(folder, tmp_path / "b.gguf", progress=True)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_main(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(cf.make_target(12).save(tmp_path / "t"))
    drafter = str(cf.make_drafter(12).save(tmp_path / "d"))
    out = str(tmp_path / "o.gguf")
    assert main([target, "-o", out, "--head", "Q8_0", "--embedding", "f32"]) == 0
    assert "minimax-m2, 29 tensors" in capsys.readouterr().out
    options = ["--target-model", target, "--outtype", "q8_0", "--tap-convention", "input", "--quiet"]
    assert main([drafter, "-o", out, *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert cf.read_gguf(Path(out))[0]["dflash.target_layers"] == [0, 1]
    assert main([drafter, "-o", out]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    with pytest.raises(SystemExit) as info:
        main([target, "-o", out, "--outtype", "q5_k"])
    assert info.value.code == 2


def test_script_from_a_bare_checkout(tmp_path: Path) -> None:
    target = cf.make_target(13).save(tmp_path / "t")
    command = [sys.executable, "-I", str(SCRIPT), str(target), "-o", str(tmp_path / "o.gguf"), "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "o.gguf").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_cleans_up(tmp_path: Path, number: signal.Signals) -> None:
    """A real interrupt of a real process: status 130, one line, and no file."""
    model = cf.make_target(14)
    for i in range(2):  # long enough to be interrupted
        name = "model.embed_tokens" if i else "lm_head"
        model.tensors[f"{name}.weight"] = ("BF16", np.zeros((1 << 17, cf.HIDDEN), np.uint16))
    model.config["vocab_size"] = 1 << 17
    folder, out = model.save(tmp_path / "m"), tmp_path / "out" / "o.gguf"
    out.parent.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), "-o", str(out), "--quiet", "--head", "q8_0", "--embedding", "q8_0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not list(out.parent.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and list(out.parent.iterdir()) == []
