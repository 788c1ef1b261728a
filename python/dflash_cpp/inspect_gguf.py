"""What is in a GGUF file: shapes, types, taps, vocabulary, and the memory it needs."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from . import _core
from .options import check_path

# Bytes of one cached number: q8_0 holds 32 of them in 34 bytes.
KV_ELEMENT_BYTES: Final = {"f16": 2.0, "q8_0": 34 / 32, "f32": 4.0}

_ARCH_KEYS: Final = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "block_size",
    "target_layers",
)


@dataclass(frozen=True)
class TensorSummary:
    """One tensor; shape in ggml order (fastest dimension first)."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Summary:
    """What `dflash-cpp inspect` shows.

    parameters: numbers in all tensors. types: type -> (tensors, bytes).
    taps: layers whose input is tapped (drafters only). memory: part -> bytes at n_ctx.
    """

    path: str
    file_bytes: int
    architecture: str
    role: str
    name: str
    shape: dict[str, Any]
    parameters: int
    types: dict[str, tuple[int, int]]
    tensors: tuple[TensorSummary, ...]
    taps: tuple[int, ...]
    mask_token_id: int | None
    vocabulary: dict[str, Any]
    n_ctx: int
    memory: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def _value(gguf: _core.Gguf, key: str) -> Any:
    value = gguf.get(key)
    return value.tolist() if hasattr(value, "tolist") else value


def _as_int(value: Any) -> int:
    """One number of a per-model or per-layer key (the largest of the layers')."""
    if isinstance(value, list):
        return max((int(v) for v in value), default=0)
    return int(value) if isinstance(value, (int, float)) else 0


def _vocabulary(gguf: _core.Gguf) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for tensor in gguf.tensors:
        if tensor.name == "token_embd.weight" and len(tensor.shape) == 2:
            out["embedding rows"] = tensor.shape[1]
    tokens = gguf.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        out["tokens"] = len(tokens)
    for label, key in (
        ("model", "tokenizer.ggml.model"),
        ("pre-tokenizer", "tokenizer.ggml.pre"),
        ("begin of sequence", "tokenizer.ggml.bos_token_id"),
        ("end of sequence", "tokenizer.ggml.eos_token_id"),
        ("further ends of sequence", "dflash_cpp.eos_token_ids"),
    ):
        if key in gguf:
            out[label] = _value(gguf, key)
    out["tokenizer.json embedded"] = "tokenizer.huggingface.json" in gguf
    out["chat template"] = "tokenizer.chat_template" in gguf
    return out


def kv_bytes(shape: dict[str, Any], n_ctx: int, kv_type: str) -> int:
    """Bytes of a key-value cache of n_ctx tokens."""
    heads = _as_int(shape.get("attention.head_count_kv"))
    width = _as_int(shape.get("attention.key_length")) + _as_int(shape.get("attention.value_length"))
    elements = _as_int(shape.get("block_count")) * heads * width * n_ctx
    return math.ceil(elements * KV_ELEMENT_BYTES[kv_type])


def summarize(path: str | os.PathLike[str], *, n_ctx: int = 8192) -> Summary:
    """Reads a file's header. Raises DFlashError for what is not a valid GGUF file."""
    gguf = _core.Gguf(check_path("file", path))
    arch = str(gguf.get("general.architecture", ""))
    shape = {key: _value(gguf, f"{arch}.{key}") for key in _ARCH_KEYS if f"{arch}.{key}" in gguf}
    tensors = tuple(TensorSummary(t.name, t.type, tuple(t.shape), t.nbytes) for t in gguf.tensors)
    count, size = Counter(t.type for t in tensors), Counter[str]()
    for t in tensors:
        size[t.type] += t.nbytes
    weights = sum(t.nbytes for t in tensors)
    is_drafter = arch == "dflash"
    memory = {"weights": weights}
    # the drafter's cache stays f16 whatever the target's type
    for kv_type in ("f16",) if is_drafter else KV_ELEMENT_BYTES:
        memory[f"{kv_type} cache of {n_ctx} tokens"] = kv_bytes(shape, n_ctx, kv_type)
    mask = gguf.get("tokenizer.ggml.mask_token_id")
    taps = shape.pop("target_layers", [])
    return Summary(
        path=gguf.path,
        file_bytes=gguf.file_bytes,
        architecture=arch,
        role="drafter" if is_drafter else "target",
        name=str(gguf.get("general.name", "")),
        shape=shape,
        parameters=sum(math.prod(t.shape) for t in tensors),
        types={t: (count[t], size[t]) for t, _ in size.most_common()},
        tensors=tensors,
        taps=tuple(int(t) for t in taps) if isinstance(taps, list) else (),
        mask_token_id=None if mask is None else int(mask),
        vocabulary=_vocabulary(gguf),
        n_ctx=n_ctx,
        memory=memory,
    )


def human_bytes(n: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def render(summary: Summary, *, show_tensors: bool = False) -> RenderableType:
    """Rich tables for people."""
    head = Table(title=summary.path, show_header=False)
    head.add_column()
    head.add_column(justify="right")
    head.add_row("architecture", escape(f"{summary.architecture} ({summary.role})"))
    if summary.name:
        head.add_row("name", escape(summary.name))
    head.add_row("file", human_bytes(summary.file_bytes))
    head.add_row("parameters", f"{summary.parameters:,}")
    for key, value in summary.shape.items():
        head.add_row(key, escape(str(value)))
    if summary.taps:
        head.add_row("taps (layer inputs)", ", ".join(str(t) for t in summary.taps))
    if summary.mask_token_id is not None:
        head.add_row("mask token", str(summary.mask_token_id))
    for key, value in summary.vocabulary.items():
        head.add_row(f"vocabulary: {key}", escape(str(value)))
    for key, n in summary.memory.items():
        head.add_row(f"memory: {key}", human_bytes(n))
    types = Table(title="types")
    types.add_column("type")
    types.add_column("tensors", justify="right")
    types.add_column("size", justify="right")
    for name, (n, size) in summary.types.items():
        types.add_row(name, str(n), human_bytes(size))
    parts: list[RenderableType] = [head, types]
    if show_tensors:
        tensors = Table(title="tensors (fastest dimension first)")
        for column in ("name", "type", "shape", "size"):
            tensors.add_column(column, justify="left" if column in ("name", "type") else "right")
        for t in summary.tensors:
            tensors.add_row(escape(t.name), t.type, " x ".join(str(d) for d in t.shape), human_bytes(t.nbytes))
        parts.append(tensors)
    return Group(*parts)
