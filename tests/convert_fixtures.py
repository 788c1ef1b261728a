"""Synthetic checkpoints for the converter's tests, and an independent reading of what they mean.

Everything here is written from the formats' definitions, element by element where speed allows, and shares no code
with the converter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

REPO = Path(__file__).resolve().parent.parent

SHARED = REPO.parent / "shared" / "models"
EMBEDDED = REPO / "python" / "dflash_cpp" / "models"

HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, LAYERS, VOCAB = 128, 128, 2, 1, 64, 3, 2, 48
SIZES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8", "F8_E4M3": "<u1", "U8": "<u1"}

Tensors = dict[str, tuple[str, np.ndarray]]


def real_models() -> Path | None:
    """The folder with nano-m2 and nano-m2-dflash in Hugging Face form, embedded or shared."""
    return next((p for p in (EMBEDDED, SHARED) if (p / "nano-m2" / "config.json").exists()), None)


def bf16(values: np.ndarray) -> np.ndarray:
    """Truncate f32 to bf16 bit patterns."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def widen(dtype: str, raw: np.ndarray) -> np.ndarray:
    """Stored values as f32."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file; arrays are stored as their dtype name says."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    blobs = []
    for name, (dtype, array) in tensors.items():
        blob = np.ascontiguousarray(array, dtype=SIZES[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def pack_words(nibbles: np.ndarray, order: list[int]) -> np.ndarray:
    """Pack the last axis, 8 nibbles a word: slot i of a word takes element order[i]."""
    parts = nibbles.astype(np.uint64).reshape(*nibbles.shape[:-1], -1, 8)
    word = sum(parts[..., order[i]] << np.uint64(4 * i) for i in range(8))
    return np.asarray(word).astype(np.uint32).view(np.int32)


SEQUENTIAL = [0, 1, 2, 3, 4, 5, 6, 7]
INTERLEAVED = [0, 2, 4, 6, 1, 3, 5, 7]


def make_linear(
    rng: np.random.Generator, prefix: str, rows: int, cols: int, form: str, scale_dtype: str = "BF16"
) -> tuple[Tensors, np.ndarray]:
    """Make one Linear in a checkpoint form; return its tensors and its values, f32 [rows, cols].

    `form`: "sym32", "sym64", "sym128", "asym32", ..., "awq32", ..., "BF16", "F16", "F32".
    """
    if form in SIZES:
        values = rng.normal(0, 0.05, (rows, cols)).astype(np.float32)
        raw = bf16(values) if form == "BF16" else values.astype(SIZES[form])
        return {f"{prefix}.weight": (form, raw)}, widen(form, raw)
    kind, group = form.rstrip("0123456789"), int(form.lstrip("abcdefghijklmnopqrstuvwxyz"))
    nibbles = rng.integers(0, 16, (rows, cols))
    zeros = np.full((rows, cols // group), 8) if kind == "sym" else rng.integers(0, 16, (rows, cols // group))
    scales = rng.uniform(1e-3, 1e-2, (rows, cols // group)).astype(np.float32)
    dtype = "F16" if kind == "awq" else scale_dtype
    raw = bf16(scales) if dtype == "BF16" else scales.astype(SIZES[dtype])
    difference = (nibbles - np.repeat(zeros, group, axis=1)).astype(np.float32)
    values = difference * np.repeat(widen(dtype, raw), group, axis=1)
    if kind == "awq":
        return {
            f"{prefix}.qweight": ("I32", pack_words(nibbles.T, INTERLEAVED)),
            f"{prefix}.qzeros": ("I32", pack_words(zeros.T, INTERLEAVED)),
            f"{prefix}.scales": ("F16", raw.T),
        }, values
    tensors: Tensors = {
        f"{prefix}.weight_packed": ("I32", pack_words(nibbles, SEQUENTIAL)),
        f"{prefix}.weight_scale": (dtype, raw),
        f"{prefix}.weight_shape": ("I64", np.array([rows, cols])),
    }
    if kind == "asym":
        padded = np.zeros((-(-rows // 8) * 8, cols // group), dtype=np.int64)
        padded[:rows] = zeros
        tensors[f"{prefix}.weight_zero_point"] = ("I32", pack_words(padded.T, SEQUENTIAL).T)
    return tensors, values


@dataclass
class Model:
    """A synthetic checkpoint: tensors by name, expected GGUF values by GGUF name, and the JSON files."""

    tensors: Tensors = field(default_factory=dict)
    expected: dict[str, np.ndarray] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)

    def save(self, directory: Path, shards: int = 1) -> Path:
        """Write the checkpoint folder, as one file or as shards with an index."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in {"config.json": self.config, **self.files}.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (directory / name).write_bytes(text.encode(errors="surrogateescape"))
        if shards == 1:
            write_safetensors(directory / "model.safetensors", self.tensors)
            return directory
        # Sorted by name, as real checkpoints are: experts then lie as 0, 1, 10, 11, 2, ...
        names = sorted(self.tensors)
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
            write_safetensors(directory / file, {name: self.tensors[name] for name in part})
            weight_map.update(dict.fromkeys(part, file))
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory


def tokenizer_json(n: int) -> dict[str, Any]:
    """A byte-level BPE tokenizer with n - 2 letters and two added tokens."""
    vocab = {chr(ord("A") + i): i for i in range(n - 2)}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": n - 2, "content": "<eos>", "special": True},
            {"id": n - 1, "content": "<tool>", "special": False},
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["A", "B"], ["C", "D"]]},
    }


def make_target(
    seed: int,
    attention: str = "sym32",
    experts: str = "sym32",
    *,
    naming: str = "w",
    moe: str = "block_sparse_moe",
    scale_dtype: str = "BF16",
    plain: str = "BF16",
    n_experts: int = EXPERTS,
) -> Model:
    """A small MiniMax-M2 checkpoint with Linears in the given forms and everything else as `plain`."""
    rng = np.random.default_rng(seed)
    model = Model()
    q_dim, kv_dim = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

    def vector(name: str, gguf_name: str, *shape: int) -> None:
        values = rng.normal(1, 0.2, shape).astype(np.float32)
        raw = bf16(values) if plain == "BF16" else values.astype(SIZES[plain])
        model.tensors[name], model.expected[gguf_name] = (plain, raw), widen(plain, raw)

    def linear(prefix: str, gguf_name: str, rows: int, cols: int, form: str) -> np.ndarray:
        tensors, values = make_linear(rng, prefix, rows, cols, form, scale_dtype)
        model.tensors.update(tensors)
        if gguf_name:
            model.expected[gguf_name] = values
        return values

    vector("model.embed_tokens.weight", "token_embd.weight", VOCAB, HIDDEN)
    vector("lm_head.weight", "output.weight", VOCAB, HIDDEN)
    vector("model.norm.weight", "output_norm.weight", HIDDEN)
    names = {"w": ("w1", "w3", "w2"), "proj": ("gate_proj", "up_proj", "down_proj")}[naming]
    for i in range(LAYERS):
        src, dst = f"model.layers.{i}", f"blk.{i}"
        vector(f"{src}.input_layernorm.weight", f"{dst}.attn_norm.weight", HIDDEN)
        vector(f"{src}.post_attention_layernorm.weight", f"{dst}.ffn_norm.weight", HIDDEN)
        vector(f"{src}.self_attn.q_norm.weight", f"{dst}.attn_q_norm.weight", q_dim)
        vector(f"{src}.self_attn.k_norm.weight", f"{dst}.attn_k_norm.weight", kv_dim)
        vector(f"{src}.{moe}.gate.weight", f"{dst}.ffn_gate_inp.weight", n_experts, HIDDEN)
        vector(f"{src}.{moe}.e_score_correction_bias", f"{dst}.exp_probs_b.bias", n_experts)
        linear(f"{src}.self_attn.q_proj", f"{dst}.attn_q.weight", q_dim, HIDDEN, attention)
        linear(f"{src}.self_attn.k_proj", f"{dst}.attn_k.weight", kv_dim, HIDDEN, attention)
        linear(f"{src}.self_attn.v_proj", f"{dst}.attn_v.weight", kv_dim, HIDDEN, attention)
        linear(f"{src}.self_attn.o_proj", f"{dst}.attn_output.weight", HIDDEN, q_dim, attention)
        for role, name in zip(("gate", "up", "down"), names, strict=True):
            shape = (HIDDEN, INTER) if role == "down" else (INTER, HIDDEN)
            stack = [linear(f"{src}.{moe}.experts.{e}.{name}", "", *shape, experts) for e in range(n_experts)]
            model.expected[f"{dst}.ffn_{role}_exps.weight"] = np.stack(stack)
    model.config = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rotary_dim": 32,
        "rope_theta": 5000000,
        "rms_norm_eps": 1e-6,
        "num_local_experts": n_experts,
        "num_experts_per_tok": min(2, n_experts),
        "max_position_embeddings": 1024,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    if "awq" in attention + experts:
        quant: dict[str, Any] = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
    else:
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "actorder": None, "dynamic": False}
        quant = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": weights}},
        }
    model.config["quantization_config"] = quant
    model.files = {
        "tokenizer.json": tokenizer_json(40),
        "tokenizer_config.json": {"bos_token": "A", "add_bos_token": False},
        "generation_config.json": {"eos_token_id": 38, "temperature": 0.5, "top_k": 7, "top_p": 0.9},
        "chat_template.jinja": "{{ messages }}",
    }
    return model


def make_drafter(seed: int, *, layers: int = 2, taps: tuple[int, ...] = (0, 1), form: str = "BF16") -> Model:
    """A small DFlash drafter for `make_target`'s model."""
    rng = np.random.default_rng(seed)
    model = Model()
    head_dim, heads, kv_heads, inter = 32, 4, 2, 160

    def add(name: str, gguf_name: str, *shape: int) -> None:
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        raw = bf16(values) if form == "BF16" else values.astype(SIZES[form])
        model.tensors[f"{name}.weight"] = (form, raw)
        model.expected[f"{gguf_name}.weight"] = widen(form, raw)

    add("fc", "fc", HIDDEN, len(taps) * HIDDEN)
    add("hidden_norm", "enc.output_norm", HIDDEN)
    add("norm", "output_norm", HIDDEN)
    for i in range(layers):
        src, dst = f"layers.{i}", f"blk.{i}"
        add(f"{src}.input_layernorm", f"{dst}.attn_norm", HIDDEN)
        add(f"{src}.post_attention_layernorm", f"{dst}.ffn_norm", HIDDEN)
        add(f"{src}.self_attn.q_proj", f"{dst}.attn_q", heads * head_dim, HIDDEN)
        add(f"{src}.self_attn.k_proj", f"{dst}.attn_k", kv_heads * head_dim, HIDDEN)
        add(f"{src}.self_attn.v_proj", f"{dst}.attn_v", kv_heads * head_dim, HIDDEN)
        add(f"{src}.self_attn.o_proj", f"{dst}.attn_output", HIDDEN, heads * head_dim)
        add(f"{src}.self_attn.q_norm", f"{dst}.attn_q_norm", head_dim)
        add(f"{src}.self_attn.k_norm", f"{dst}.attn_k_norm", head_dim)
        add(f"{src}.mlp.gate_proj", f"{dst}.ffn_gate", inter, HIDDEN)
        add(f"{src}.mlp.up_proj", f"{dst}.ffn_up", inter, HIDDEN)
        add(f"{src}.mlp.down_proj", f"{dst}.ffn_down", HIDDEN, inter)
    model.config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dflash_config": {"mask_token_id": VOCAB - 1, "target_layer_ids": list(taps)},
        "block_size": 8,
        "hidden_size": HIDDEN,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "num_target_layers": LAYERS,
        "vocab_size": VOCAB,
        "layer_types": ["full_attention"] * layers,
    }
    return model


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """Metadata values and tensors of a GGUF file, through the gguf package."""
    reader = gguf.GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def values_of(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A GGUF tensor's values through the gguf package's own dequantiser."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
