"""Weights as the checkpoint holds them: which format a tensor is in, its shape checks, and its encoding to GGUF."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GGMLType

from . import quant_formats as qf
from .checkpoint import Checkpoint, TensorEntry
from .errors import ConvertError, listing

SYMMETRIC = "pack-quantized, symmetric"
ASYMMETRIC = "pack-quantized, asymmetric"
AWQ = "AutoAWQ gemm"
PLAIN = "unquantised"

PLAIN_TYPES = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}
SCALE_TYPES = ("BF16", "F16", "F32")

# Tensors of a checkpoint that a GGUF file has no use for.
IGNORABLE = ((re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$"), "recomputed from rope_theta"),)

# All experts of a layer in one tensor, as transformers 5 and vLLM hold them in memory.
FUSED = re.compile(r"\.experts\.(gate_up_proj|w13_weight)")

# What a tensor name that does not belong tells about the checkpoint.
FOREIGN = (
    (re.compile(r"(weight_)?g_idx$"), "activation ordering (actorder, desc_act) is not supported"),
    (re.compile(r"\.weight_scale_inv$"), "this is an fp8 checkpoint; only 4-bit integers and bf16/f16/f32 convert"),
    (re.compile(r"\.bias$"), "the architecture has no bias on this Linear"),
    (re.compile(r"(^|\.)mtp\."), "multi-token-prediction modules are not supported"),
    (re.compile(r"^(d2t|t2d|embed_tokens\.|lm_head\.)"), "drafters with a vocabulary of their own are not supported"),
    (re.compile(r"_conv\.|candidate_selector"), "DFlash 2 drafters are not supported"),
)

# Packed input taken at a time: temporaries of this size stay in the cache and in the allocator's pool. With a few MiB
# every one of them is mapped and faulted in anew, which costs more than the repacking.
CHUNK_BYTES = 1 << 18


@dataclass(slots=True)
class Counts:
    """How exactly the values were carried over."""

    scales: int = 0
    scales_inexact: int = 0
    mins: int = 0
    mins_rounded: int = 0
    values_rounded: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """One weight of the checkpoint.

    `kind` is SYMMETRIC, ASYMMETRIC, AWQ or PLAIN; `shape` is logical: [out_features, in_features] or [n].
    `scale` and `zero` are the group scales and zero points of the quantised kinds, `declared` the stored shape tensor.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weight: TensorEntry
    scale: TensorEntry | None = None
    zero: TensorEntry | None = None
    declared: TensorEntry | None = None

    @property
    def native(self) -> GGMLType:
        """The GGUF type that holds this weight without loss and without growth."""
        if self.kind == PLAIN:
            return PLAIN_TYPES[self.weight.dtype]
        return GGMLType.Q4_0 if self.kind == SYMMETRIC else GGMLType.Q4_1


class TensorTable:
    """Looks weights up in a checkpoint, checks them, and remembers which ones were used."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def _take(self, name: str, shape: tuple[int, ...], dtypes: Iterable[str]) -> TensorEntry:
        entry = self.checkpoint.tensors.get(name)
        if entry is None:
            raise ConvertError(f"{self.checkpoint.directory}: tensor {name!r} {list(shape)} is missing")
        if entry.dtype not in dtypes:
            fp8 = " (fp8 checkpoints do not convert; use the 4-bit or the bf16 one)" if "F8" in entry.dtype else ""
            raise ConvertError(
                f"{entry.path}: tensor {name!r}: expected type {' or '.join(dtypes)}, found {entry.dtype}{fp8}"
            )
        if entry.shape != shape:
            raise ConvertError(
                f"{entry.path}: tensor {name!r}: expected shape {list(shape)} from config.json, "
                f"found {list(entry.shape)}. The config and the weights are of different models"
            )
        self._used.add(name)
        return entry

    def plain(self, name: str, shape: tuple[int, ...]) -> Source:
        """Return an unquantised tensor. Raises `ConvertError` if missing, quantised, or of another shape."""
        if name not in self and name.endswith(".weight"):
            for suffix in ("_packed", "_scale"):
                if name + suffix in self:
                    raise ConvertError(
                        f"{self.checkpoint.directory}: {name!r} is quantised (found {name + suffix!r}); "
                        "expected this tensor in bf16, f16 or f32"
                    )
        return Source(name, PLAIN, shape, self._take(name, shape, PLAIN_TYPES))

    def linear(self, prefix: str, rows: int, cols: int) -> Source:
        """Return the weight of the Linear `prefix`, [rows, cols], in whichever format the checkpoint holds it."""
        where = self.checkpoint.directory
        forms = [s for s in ("weight_packed", "qweight", "weight") if f"{prefix}.{s}" in self]
        if not forms:
            fused = next((name for name in self.checkpoint.tensors if FUSED.search(name)), None)
            if ".experts." in prefix and fused is not None:
                way_out = f"Fused experts ({fused!r}) are not supported; expected one tensor for each expert"
            else:
                way_out = "Complete the download or check config.json"
            raise ConvertError(
                f"{where}: no weight for {prefix!r} [{rows}, {cols}]; expected {prefix}.weight_packed, "
                f"{prefix}.qweight or {prefix}.weight. {way_out}"
            )
        if len(forms) > 1:
            raise ConvertError(f"{where}: {prefix!r} is there twice, as {' and as '.join(forms)}; expected one of them")
        if forms[0] == "weight":
            return self.plain(f"{prefix}.weight", (rows, cols))
        if cols % qf.BLOCK:
            raise ConvertError(f"{where}: {prefix!r} has {cols} inputs; GGUF's 4-bit blocks need a multiple of 32")
        for name in (f"{prefix}.weight_g_idx", f"{prefix}.g_idx"):
            if name in self:
                raise ConvertError(
                    f"{where}: {name!r}: activation ordering (actorder, desc_act) and GPTQ are not supported"
                )
        return self._packed(prefix, rows, cols) if forms[0] == "weight_packed" else self._awq(prefix, rows, cols)

    def _group_count(self, prefix: str, scale_name: str, axis: int, cols: int) -> int:
        entry = self.checkpoint.tensors.get(scale_name)
        if entry is None:
            raise ConvertError(f"{self.checkpoint.directory}: {prefix!r} is packed but its {scale_name!r} is missing")
        groups = entry.shape[axis] if len(entry.shape) == 2 else 0
        if groups < 1 or cols % groups or (cols // groups) % qf.BLOCK:
            raise ConvertError(
                f"{entry.path}: tensor {scale_name!r} {list(entry.shape)}: expected one scale per group of 32, 64 or "
                f"128 of the {cols} inputs"
            )
        return groups

    def _packed(self, prefix: str, rows: int, cols: int) -> Source:
        groups = self._group_count(prefix, f"{prefix}.weight_scale", 1, cols)
        weight = self._take(f"{prefix}.weight_packed", (rows, cols // 8), ["I32"])
        scale = self._take(f"{prefix}.weight_scale", (rows, groups), SCALE_TYPES)
        zero = declared = None
        if f"{prefix}.weight_zero_point" in self:
            zero = self._take(f"{prefix}.weight_zero_point", ((rows + 7) // 8, groups), ["I32"])
        if f"{prefix}.weight_shape" in self:
            declared = self._take(f"{prefix}.weight_shape", (2,), ["I64", "I32"])
        return Source(prefix, ASYMMETRIC if zero else SYMMETRIC, (rows, cols), weight, scale, zero, declared)

    def _awq(self, prefix: str, rows: int, cols: int) -> Source:
        groups = self._group_count(prefix, f"{prefix}.scales", 0, cols)
        if rows % 8:
            raise ConvertError(f"{self.checkpoint.directory}: {prefix!r} has {rows} outputs; AutoAWQ packs 8 at a time")
        weight = self._take(f"{prefix}.qweight", (cols, rows // 8), ["I32"])
        scale = self._take(f"{prefix}.scales", (groups, rows), SCALE_TYPES)
        zero = self._take(f"{prefix}.qzeros", (groups, rows // 8), ["I32"])
        return Source(prefix, AWQ, (rows, cols), weight, scale, zero)

    def check_all_used(self) -> None:
        """Raise `ConvertError` if the checkpoint holds tensors that nobody asked for and that change the model."""
        left = [
            name
            for name in self.checkpoint.tensors
            if name not in self._used and not any(pattern.search(name) for pattern, _ in IGNORABLE)
        ]
        if left:
            reasons = [reason for pattern, reason in FOREIGN if any(pattern.search(name) for name in left)]
            raise ConvertError(
                f"{self.checkpoint.directory}: {len(left)} tensor(s) that the architecture does not have: "
                f"{listing(left)}. {reasons[0] if reasons else 'Check that config.json belongs to these weights'}"
            )


class Encoder:
    """Reads weights and encodes them to GGUF bytes, counting every rounding in `counts`."""

    def __init__(self, checkpoint: Checkpoint, allow_inexact: bool) -> None:
        self.checkpoint = checkpoint
        self.allow_inexact = allow_inexact
        self.counts = Counts()

    def check_scales(self, sources: Iterable[Source], progress: Callable[[int, str], None]) -> None:
        """Read every scale and stored shape, in file order, before anything is written.

        Counts scales, and raises `ConvertError` for shapes that contradict the packed tensor, for scales f16 cannot
        hold, and, unless `allow_inexact`, for scales that f16 would round. `progress` gets (bytes, tensor name).
        """
        jobs = [(entry, source) for source in sources for entry in (source.declared, source.scale) if entry]
        jobs.sort(key=lambda job: (job[0].path, job[0].offset))
        inexact: dict[str, int] = {}
        for entry, source in jobs:
            raw = self.checkpoint.read(entry)
            if entry is source.declared:
                if tuple(raw.tolist()) != source.shape:
                    raise ConvertError(
                        f"{entry.path}: tensor {entry.name!r}: expected {list(source.shape)}, found {raw.tolist()}"
                    )
            else:
                self.counts.scales += raw.size
                parts = np.array_split(raw.reshape(-1), raw.size // CHUNK_BYTES * 4 + 1)
                rounded = sum(self._scales(source, part)[1] for part in parts)
                if rounded:
                    inexact[entry.name] = rounded
            progress(entry.nbytes, entry.name)
        self.counts.scales_inexact = sum(inexact.values())
        if inexact and not self.allow_inexact:
            raise ConvertError(
                f"{self.checkpoint.directory}: {self.counts.scales_inexact} of {self.counts.scales} scales, in "
                f"{listing(inexact, 3)}, are not exact in GGUF's f16. "
                "Pass --allow-inexact to round them to the nearest f16"
            )

    def _scales(self, source: Source, raw: npt.NDArray[Any]) -> tuple[qf.F16, int]:
        assert source.scale is not None
        try:
            return qf.round_scales(raw, source.scale.dtype)
        except qf.UnrepresentableError as error:
            raise ConvertError(f"{source.scale.path}: tensor {source.scale.name!r} {error}") from None

    def encode(self, source: Source, qtype: GGMLType) -> Iterator[qf.U8]:
        """Yield the GGUF bytes of `source` as type `qtype`, row chunk by row chunk, uint8 [rows, row_bytes]."""
        try:
            if source.kind == PLAIN:
                yield from self._encode_plain(source, qtype)
            elif source.kind == AWQ:
                yield from self._encode_awq(source)
            else:
                yield from self._encode_packed(source, qtype)
        except qf.UnrepresentableError as error:
            raise ConvertError(f"{source.weight.path}: tensor {source.name!r} {error}") from None

    def _encode_plain(self, source: Source, qtype: GGMLType) -> Iterator[qf.U8]:
        rows, cols = source.shape if len(source.shape) == 2 else (1, source.shape[0])
        step = max(1, CHUNK_BYTES // cols)
        for start in range(0, rows, step):
            if len(source.shape) == 2:
                raw = self.checkpoint.read(source.weight, start, start + step)
            else:
                raw = self.checkpoint.read(source.weight)
            data, changed = qf.encode_plain(raw, source.weight.dtype, qtype)
            self.counts.values_rounded += changed
            yield data

    def _encode_packed(self, source: Source, qtype: GGMLType) -> Iterator[qf.U8]:
        assert source.scale is not None
        rows, cols = source.shape
        scales, _ = self._scales(source, self.checkpoint.read(source.scale))
        zeros = None
        if source.zero is not None:
            zeros = qf.unpack_row_zero_points(self.checkpoint.read(source.zero), rows)
        elif qtype == GGMLType.Q4_1:
            zeros = np.full(scales.shape, 8, dtype=np.uint8)  # a symmetric expert in an otherwise asymmetric stack
        step = max(1, CHUNK_BYTES // (cols // 2))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            packed = self.checkpoint.read(source.weight, start, start + step)
            qs = qf.reorder_sequential(packed.view(np.uint8))
            yield qf.pack_q4_0(qs, scales[part]) if zeros is None else self._q4_1(qs, scales[part], zeros[part])

    def _encode_awq(self, source: Source) -> Iterator[qf.U8]:
        assert source.scale is not None and source.zero is not None
        scales = self._scales(source, self.checkpoint.read(source.scale))[0].T
        zeros = qf.unpack_awq_zero_points(self.checkpoint.read(source.zero))
        # Stored in-major: a GGUF row is a column here, so the matrix is read whole and cut by columns.
        words = self.checkpoint.read(source.weight)
        step = max(1, CHUNK_BYTES // (4 * source.shape[1]))
        for start in range(0, words.shape[1], step):
            rows = slice(8 * start, 8 * (start + step))
            qs = qf.reorder_awq(words[:, start : start + step])
            yield self._q4_1(qs, np.ascontiguousarray(scales[rows]), zeros[rows])

    def _q4_1(self, qs: npt.NDArray[np.void], scales: qf.F16, zeros: qf.U8) -> qf.U8:
        data, rounded = qf.pack_q4_1(qs, scales, zeros)
        self.counts.mins += scales.size
        self.counts.mins_rounded += rounded
        return data


def choose_type(source: Source, wanted: GGMLType | None, what: str) -> GGMLType:
    """Return the GGUF type for `source`: a quantised weight keeps its integers, a plain one may be given a type.

    `what` is the option that `wanted` came from. Raises `ConvertError` if the type's blocks do not divide the rows.
    """
    if source.kind != PLAIN or wanted is None:
        return source.native
    block = GGML_QUANT_SIZES[wanted][0]
    if source.shape[-1] % block:
        raise ConvertError(
            f"{source.weight.path}: tensor {source.name!r} has rows of {source.shape[-1]}; {wanted.name} needs a "
            f"multiple of {block}. Choose f16, bf16 or f32 with {what}"
        )
    return wanted
