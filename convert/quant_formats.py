"""Array-level conversion between checkpoint int4 formats and GGUF blocks. Pure functions, no files.

A GGUF 4-bit block holds 32 consecutive weights of a row: byte j has weight j in its low nibble, weight j + 16 in its
high one. Q4_0 is `d * (nibble - 8)`, Q4_1 is `d * nibble + m`, with d and m in f16. Both int4 checkpoint formats hold
the same nibbles in another order, so the weights move bit for bit; nothing is requantised.

Arrays are little-endian, as the files are. N is a Linear's out_features, K its in_features, G the group size.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GGMLType

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
I32 = npt.NDArray[np.int32]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]

BLOCK = 32


class UnrepresentableError(ValueError):
    """Values that the GGUF type cannot hold. The message continues "tensor 'name' ..."; the caller knows the name."""


# The 16 nibble bytes travel as one opaque item, which numpy copies in one move per block.
QS = np.dtype("V16")
Q4_0_BLOCK = np.dtype([("d", "<u2"), ("qs", QS)])
Q4_1_BLOCK = np.dtype([("d", "<u2"), ("m", "<u2"), ("qs", QS)])


def reorder_sequential(packed: U8) -> npt.NDArray[np.void]:
    """Reorder compressed-tensors nibbles into GGUF order.

    `packed`: uint8 [N, K/2], contiguous, byte j of a row holding weights 2j (low nibble) and 2j + 1 (high).
    Returns the nibble bytes of each block, V16 [N, K/32].
    """
    # One 16-bit lane per byte: its low nibble in bits 0..3, its high nibble in bits 8..11.
    lanes = packed.astype(np.uint16)
    lanes |= lanes << np.uint16(4)
    lanes &= np.uint16(0x0F0F)
    # Four lanes a word, four words a block: lane t joins lane t + 8, i.e. word c joins word c + 2.
    words = lanes.view(np.uint64).reshape(-1, 4)
    out = np.empty((words.shape[0], 2), dtype=np.uint64)
    for c in range(2):
        out[:, c] = words[:, c] | (words[:, c + 2] << np.uint64(4))
    return out.view(QS).reshape(packed.shape[0], -1)


def reorder_awq(qweight: I32) -> npt.NDArray[np.void]:
    """Transpose and reorder AutoAWQ gemm nibbles into GGUF order.

    `qweight`: int32 [K, N/8]; bits 4i of word c hold output column 8c + [0, 2, 4, 6, 1, 3, 5, 7][i].
    Returns the nibble bytes of each block, V16 [N, K/32].
    """
    k, n8 = qweight.shape
    words = np.ascontiguousarray(qweight).view(np.uint32).reshape(k // BLOCK, 2, BLOCK // 2, n8)
    mask = np.uint32(0x0F0F0F0F)
    # Joining weight j with weight j + 16 first halves what is left to transpose.
    low = (words & mask)[:, 0] | ((words & mask)[:, 1] << np.uint32(4))
    high = ((words >> np.uint32(4)) & mask)[:, 0] | (words[:, 1] & ~mask)
    columns = np.empty((k // BLOCK, BLOCK // 2, n8, 8), dtype=np.uint8)
    columns[..., [0, 4, 1, 5]] = low.view(np.uint8).reshape(*low.shape, 4)
    columns[..., [2, 6, 3, 7]] = high.view(np.uint8).reshape(*high.shape, 4)
    blocks = columns.reshape(k // BLOCK, BLOCK // 2, n8 * 8).transpose(2, 0, 1)
    return np.ascontiguousarray(blocks).view(QS)[..., 0]


def unpack_row_zero_points(packed: I32, n: int) -> U8:
    """Unpack compressed-tensors zero points: int32 [ceil(N/8), K/G], packed along rows -> uint8 [N, K/G]."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[None, :, None]
    nibbles = (np.ascontiguousarray(packed).view(np.uint32)[:, None, :] >> shifts) & np.uint32(15)
    unpacked: U8 = nibbles.reshape(-1, packed.shape[1])[:n].astype(np.uint8)
    return unpacked


def unpack_awq_zero_points(packed: I32) -> U8:
    """Unpack AutoAWQ qzeros: int32 [K/G, N/8], interleaved as the weights are -> uint8 [N, K/G]."""
    shifts = 4 * np.array([0, 4, 1, 5, 2, 6, 3, 7], dtype=np.uint32)  # slot of column j
    nibbles = (np.ascontiguousarray(packed).view(np.uint32)[..., None] >> shifts) & np.uint32(15)
    return np.ascontiguousarray(nibbles.reshape(packed.shape[0], -1).T.astype(np.uint8))


def to_float32(raw: npt.NDArray[Any], dtype: str) -> F32:
    """Widen stored values (safetensors dtype name BF16, F16, F32 or F64) to float32; exact except for F64."""
    if dtype == "BF16":
        widened: F32 = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return widened
    with np.errstate(over="ignore"):
        values: F32 = raw.astype(np.float32)
    return values


def round_scales(raw: npt.NDArray[Any], dtype: str) -> tuple[F16, int]:
    """Round scales to f16; return them and how many are not exactly representable.

    bf16 scales are exact for 2^-17 <= |s| < 65504, far beyond what weights use.
    Raises `UnrepresentableError` for a scale that is not finite or overflows f16: no rounding can save those.
    """
    values = to_float32(raw, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        worst = values[~np.isfinite(halves)][0]
        raise UnrepresentableError(f"has the scale {worst}, which f16 cannot hold (largest value 65504)")
    return halves, int(np.count_nonzero(halves.astype(np.float32) != values))


def pack_q4_0(qs: npt.NDArray[np.void], scales: F16) -> U8:
    """Build Q4_0 rows: `qs` V16 [N, K/32], `scales` f16 [N, K/G], replicated per block -> uint8 [N, K/32 * 18]."""
    out = np.empty(qs.shape, dtype=Q4_0_BLOCK)
    out["d"] = _per_block(scales.view(np.uint16), qs.shape[1])
    out["qs"] = qs
    return out.view(np.uint8).reshape(qs.shape[0], -1)


def pack_q4_1(qs: npt.NDArray[np.void], scales: F16, zero_points: U8) -> tuple[U8, int]:
    """Build Q4_1 rows with d = s and m = -zp * s -> uint8 [N, K/32 * 20], and the number of rounded m.

    `zero_points`: uint8 [N, K/G]. m is rounded to f16, at most 15 * 2^-11 = 0.0073 of a quantisation step: a property
    of the format. (m is exact where it is subnormal, since s is a multiple of 2^-24.)
    Raises `UnrepresentableError` where m overflows f16.
    """
    exact = scales.astype(np.float32) * -zero_points.astype(np.float32)
    with np.errstate(over="ignore"):
        mins = exact.astype(np.float16)
    if not np.isfinite(mins).all():
        raise UnrepresentableError(
            f"has a zero point times scale of {-exact[~np.isfinite(mins)][0]}, which f16 cannot hold"
        )
    out = np.empty(qs.shape, dtype=Q4_1_BLOCK)
    out["d"] = _per_block(scales.view(np.uint16), qs.shape[1])
    out["m"] = _per_block(mins.view(np.uint16), qs.shape[1])
    out["qs"] = qs
    return out.view(np.uint8).reshape(qs.shape[0], -1), int(np.count_nonzero(mins.astype(np.float32) != exact))


def _per_block(values: U16, blocks: int) -> U16:
    return values if values.shape[1] == blocks else np.repeat(values, blocks // values.shape[1], axis=1)


def encode_plain(raw: npt.NDArray[Any], dtype: str, qtype: GGMLType) -> tuple[U8, int]:
    """Encode unquantised values as a GGUF type: F32, F16, BF16, Q8_0 or Q4_0 (the last two with ggml's own rounding).

    Returns uint8 [rows, row_bytes] and, for F32, F16 and BF16, how many values changed.
    Raises `UnrepresentableError` for values that are not finite or overflow f16.
    """
    rows = raw.reshape(-1, raw.shape[-1])
    if not _all_finite(raw, dtype):
        raise UnrepresentableError("holds values that are not finite (inf or nan)")
    if (dtype, qtype) in (("F32", GGMLType.F32), ("F16", GGMLType.F16), ("BF16", GGMLType.BF16)):
        return np.ascontiguousarray(rows).view(np.uint8), 0
    values = to_float32(rows, dtype)
    changed = int(np.count_nonzero(values != raw.reshape(values.shape))) if dtype == "F64" else 0
    if qtype == GGMLType.F32:
        return values.view(np.uint8), changed
    if qtype == GGMLType.F16:
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if np.isinf(halves).any():
            raise UnrepresentableError(f"holds {np.abs(values).max():g}, beyond f16's 65504; choose bf16 or f32 for it")
        return halves.view(np.uint8), int(np.count_nonzero(halves.astype(np.float32) != values))
    if qtype == GGMLType.Q8_0:
        with np.errstate(over="ignore", invalid="ignore"):
            encoded = gguf.quants.quantize(values, qtype)
    else:
        encoded = gguf.quants.quantize(values, qtype)
    if qtype == GGMLType.BF16:
        back = (encoded.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        return encoded, int(np.count_nonzero(back.reshape(values.shape) != values))
    return encoded, 0


def _all_finite(raw: npt.NDArray[Any], dtype: str) -> bool:
    """Whether no stored value is inf or nan; bf16 comes as bits, whose exponent is then all ones."""
    if dtype == "BF16":
        return not bool(((raw & np.uint16(0x7F80)) == 0x7F80).any())
    return bool(np.isfinite(raw).all())


def is_f16_exact(raw: npt.NDArray[Any], dtype: str) -> bool:
    """Whether every stored value is exactly representable in f16."""
    if dtype == "F16":
        return True
    values = to_float32(raw, dtype)
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))
