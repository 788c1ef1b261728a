"""Reads a written GGUF file back and compares it with what was planned.

A small walker of its own rather than gguf.GGUFReader: that one builds numpy arrays for every token of the vocabulary,
which takes 12 s and 600 MB at 200 000 tokens; this takes a fraction of a second.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFValueType

from .errors import ConvertError
from .plan import Plan

EDGE = 4096  # bytes of each tensor's start and end that are compared
ALIGNMENT = 32

SCALAR_BYTES = {
    GGUFValueType.UINT8: 1, GGUFValueType.INT8: 1, GGUFValueType.BOOL: 1, GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2, GGUFValueType.UINT32: 4, GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8, GGUFValueType.INT64: 8, GGUFValueType.FLOAT64: 8,
}  # fmt: skip


@dataclass(slots=True)
class Edges:
    """The first and last bytes of a tensor as they were written."""

    head: bytes = b""
    tail: bytes = b""
    written: int = 0

    def add(self, data: memoryview) -> None:
        """Account for the next piece of the tensor."""
        if len(self.head) < EDGE:
            self.head += bytes(data[: EDGE - len(self.head)])
        self.tail = bytes(data[-EDGE:]) if len(data) >= EDGE else (self.tail + bytes(data))[-EDGE:]
        self.written += len(data)


class _Walker:
    """A position in a mapped GGUF file; raises struct.error or ValueError beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def u32(self) -> int:
        return self._unpack("<I", 4)

    def u64(self) -> int:
        return self._unpack("<Q", 8)

    def _unpack(self, form: str, size: int) -> int:
        (value,) = struct.unpack_from(form, self.data, self.position)
        self.position += size
        return int(value)

    def text(self) -> str:
        size = self.u64()
        raw = self.data[self.position : self.position + size]
        self.position += size
        return raw.decode("utf-8")

    def skip_value(self, kind: int) -> None:
        if kind == GGUFValueType.ARRAY:
            item, count = self.u32(), self.u64()
            if item in SCALAR_BYTES:
                self.position += SCALAR_BYTES[GGUFValueType(item)] * count
            else:
                for _ in range(count):
                    self.skip_value(item)
        elif kind == GGUFValueType.STRING:
            size = self.u64()  # moves the position itself
            self.position += size
        else:
            self.position += SCALAR_BYTES[GGUFValueType(kind)]


def verify_gguf(plan: Plan, path: Path, edges: dict[str, Edges]) -> None:
    """Check every key, tensor name, shape, type and offset, the file's size, and the edges of every tensor's data.

    Raises `ConvertError` for any difference; the cause is then the disk, or a bug in the converter.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _verify(plan, data, edges)
    except (struct.error, ValueError, KeyError) as error:
        raise ConvertError(f"{path}: verification of the written file failed: {error}. Check the disk") from error


def _verify(plan: Plan, data: mmap.mmap, edges: dict[str, Edges]) -> None:
    walker = _Walker(data)
    header = (data[:4], *(struct.unpack_from("<IQQ", data, 4)))
    walker.position = 24
    expected_header = (b"GGUF", 3, len(plan.tensors), len(plan.metadata) + 1)  # + general.architecture
    if header != expected_header:
        raise ValueError(f"expected header {expected_header}, read back {header}")
    keys = []
    for _ in range(header[3]):
        keys.append(walker.text())
        walker.skip_value(walker.u32())
    if keys != ["general.architecture", *plan.metadata]:
        raise ValueError("the metadata keys read back differ")
    offset = 0
    for tensor in plan.tensors:
        name = walker.text()
        shape = tuple(reversed([walker.u64() for _ in range(walker.u32())]))
        found = (name, shape, walker.u32(), walker.u64())
        expected = (tensor.name, tensor.shape, int(tensor.qtype), offset)
        if found != expected:
            raise ValueError(f"expected tensor {expected}, read back {found}")
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    start = -(-walker.position // ALIGNMENT) * ALIGNMENT
    if len(data) != start + offset:
        raise ValueError(f"expected {start + offset} bytes, the file has {len(data)}")
    for tensor in plan.tensors:
        seen, stop = edges[tensor.name], start + tensor.nbytes
        head, tail = data[start : min(stop, start + EDGE)], data[max(start, stop - EDGE) : stop]
        if seen.written != tensor.nbytes or head != seen.head or tail != seen.tail:
            raise ValueError(f"tensor {tensor.name!r} reads back differently")
        start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
