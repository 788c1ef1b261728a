"""Strict, lazy reading of safetensors checkpoints: one file, or shards with an index.

Only the headers are read when a checkpoint is opened. Tensor data is read on demand with plain reads into numpy
arrays: unlike mapped pages these count exactly once, and a file truncated underneath gives an error, not SIGBUS.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import ConvertError, fetch_again, listing

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit

# Bytes per element. bf16 has no numpy type and is handed out as uint16; the fp8 types appear here so that a file
# holding them is read correctly and refused later with a message about the quantisation, not about the file.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
NUMPY_DTYPES = {
    "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `offset` and `nbytes` are in bytes from the start of the file at `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


class Checkpoint:
    """The tensors of a Hugging Face checkpoint folder, by name.

    `tensors` maps each name to its `TensorEntry`. Use as a context manager, or call `close`.
    Raises `ConvertError` for anything wrong with the files: missing shards, truncation, inconsistent headers.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._files: dict[Path, BinaryIO] = {}
        if not self.directory.is_dir():
            raise ConvertError(f"{self.directory}: not a folder; expected a Hugging Face checkpoint folder")
        paths, weight_map = _find_shards(self.directory)
        self.tensors: dict[str, TensorEntry] = {}
        for path in paths:
            for entry in read_safetensors_header(path):
                other = self.tensors.get(entry.name)
                if other is not None:
                    raise ConvertError(
                        f"{path}: tensor {entry.name!r} is also in {other.path.name}; expected it in one shard only. "
                        "Remove files left over from another download"
                    )
                self.tensors[entry.name] = entry
        if weight_map is not None:
            self._check_index(weight_map)

    def _check_index(self, weight_map: dict[str, str]) -> None:
        index = self.directory / INDEX_NAME
        absent = [name for name in weight_map if name not in self.tensors]
        if absent:
            raise ConvertError(
                f"{index}: names {len(absent)} tensor(s) that no shard holds: {listing(absent)}. "
                "The index and the shards are of different downloads; fetch the checkpoint again"
            )
        for name, entry in self.tensors.items():
            if name not in weight_map:
                raise ConvertError(
                    f"{index}: does not name tensor {name!r}, which {entry.path.name} holds. "
                    "The index and the shards are of different downloads; fetch the checkpoint again"
                )
            if weight_map[name] != entry.path.name:
                raise ConvertError(
                    f"{index}: expected tensor {name!r} in {weight_map[name]}, found it in {entry.path.name}. "
                    "The index and the shards are of different downloads; fetch the checkpoint again"
                )

    def read(self, entry: TensorEntry, row_start: int = 0, row_stop: int | None = None) -> npt.NDArray[Any]:
        """Read a tensor, or rows `row_start` to `row_stop` of its first axis, into a new array.

        The dtype is the stored one; bf16 comes as uint16 bit patterns. Raises `ConvertError` where the file has
        become shorter or the type has no numpy form (fp8).
        """
        code = NUMPY_DTYPES.get(entry.dtype)
        if code is None:
            raise ConvertError(
                f"{entry.path}: tensor {entry.name!r} is stored as {entry.dtype}, which the converter cannot read; "
                "expected bf16, f16, f32 or packed int4"
            )
        shape = entry.shape
        offset = entry.offset
        if row_start != 0 or row_stop is not None:
            stop = shape[0] if row_stop is None else min(row_stop, shape[0])
            offset += row_start * (entry.nbytes // shape[0])
            shape = (stop - row_start, *shape[1:])
        out = np.empty(shape, dtype=code)
        if out.nbytes:
            self._read_into(entry, offset, out)
        return out

    def _read_into(self, entry: TensorEntry, offset: int, out: npt.NDArray[Any]) -> None:
        try:
            file = self._files.get(entry.path)
            if file is None:
                file = self._files[entry.path] = entry.path.open("rb", buffering=0)
            file.seek(offset)
            view = out.reshape(-1).view(np.uint8).data
            while len(view):
                # A single read may return less than asked for (Linux stops at 2 GiB).
                got = file.readinto(view)  # type: ignore[attr-defined]
                if not got:
                    raise ConvertError(
                        f"{entry.path}: ended inside tensor {entry.name!r}, {len(view)} bytes short; "
                        "the file changed during the conversion"
                    )
                view = view[got:]
        except OSError as error:
            raise ConvertError(f"{entry.path}: cannot read tensor {entry.name!r}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close every file that was opened for reading tensor data."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _find_shards(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the safetensors files of a folder, and the index's tensor -> file map if there is an index."""
    index = directory / INDEX_NAME
    single = directory / SINGLE_NAME
    if index.exists():
        weight_map = _read_index(index)
        names = sorted(set(weight_map.values()))
        if single.exists() and SINGLE_NAME not in names:
            raise ConvertError(
                f"{directory}: holds both {SINGLE_NAME} and {INDEX_NAME}, which does not name it. "
                "Remove the one that is stale"
            )
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ConvertError(
                f"{directory}: missing shard(s) {listing(missing)} named by {INDEX_NAME} "
                f"({len(names) - len(missing)} of {len(names)} found). Complete the download"
            )
        return [directory / name for name in names], weight_map
    if single.is_file():
        return [single], None
    found = sorted(directory.glob("*.safetensors"))
    numbered = [(path, re.fullmatch(r".*-(\d+)-of-(\d+)\.safetensors", path.name)) for path in found]
    if any(match for _, match in numbered):
        raise ConvertError(
            f"{directory}: holds shards such as {found[0].name} but no {INDEX_NAME}. Fetch the index file as well"
        )
    if len(found) == 1:
        return found, None
    if found:
        raise ConvertError(
            f"{directory}: {len(found)} safetensors files ({listing(path.name for path in found)}) and no "
            f"{INDEX_NAME}; expected one file or an index"
        )
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in directory.glob(pattern))
    hint = f"; found {listing(others)}, which is not the safetensors format" if others else ""
    raise ConvertError(f"{directory}: no {SINGLE_NAME} or {INDEX_NAME}{hint}")


def _read_index(index: Path) -> dict[str, str]:
    try:
        document = json.loads(index.read_bytes())
    except OSError as error:
        raise ConvertError(f"{index}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{index}: not valid JSON ({error}). Fetch the file again") from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{index}: expected an object 'weight_map' from tensor names to files")
    for name, file in weight_map.items():
        # A path would let an index read outside its folder.
        if not isinstance(file, str) or not file or "\0" in file or Path(file).name != file:
            raise ConvertError(f"{index}: weight_map[{name!r}] is {file!r}; expected a plain file name")
    return weight_map


def read_safetensors_header(path: Path) -> list[TensorEntry]:
    """Read and check the header of one safetensors file; return its tensors in file order.

    Checks: header length, JSON, known types, shapes, sizes, no holes, no overlaps, no trailing bytes.
    Raises `ConvertError` for every malformed file and nothing else.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ConvertError(
                    f"{path}: header length {length if len(prefix) == 8 else 'missing'} does not fit the file's {size} "
                    f"bytes; truncated or not a safetensors file: {fetch_again(prefix + file.read(32))}"
                )
            header = file.read(length)
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        document = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_object)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: header is not valid JSON ({error}). Fetch the file again") from error
    if not isinstance(document, dict):
        raise ConvertError(f"{path}: header is a JSON {type(document).__name__}; expected an object of tensors")
    document.pop("__metadata__", None)
    data_start = 8 + length
    entries = [_check_entry(path, name, value, data_start) for name, value in document.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_layout(path, entries, data_start, size)
    return entries


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"name {twice!r} appears twice")
    return result


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ConvertError(f"{where}: expected the keys dtype, shape and data_offsets in the header")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ConvertError(f"{where}: unknown dtype {dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(n) for n in shape):
        raise ConvertError(f"{where}: shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise ConvertError(f"{where}: data_offsets {offsets!r} is not a pair of byte offsets")
    begin, end = offsets
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected:
        raise ConvertError(
            f"{where}: {dtype}{shape} needs {expected} bytes, data_offsets {offsets} span {end - begin}. "
            "The header is corrupt; fetch the file again"
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_start + begin, expected)


def _check_layout(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for entry in entries:
        if entry.offset != position:
            kind = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            raise ConvertError(
                f"{path}: tensor {entry.name!r} {kind} (starts at byte {entry.offset}, expected {position}). "
                "The header is corrupt; fetch the file again"
            )
        position += entry.nbytes
    if position != size:
        state = "truncated" if size < position else "followed by bytes that belong to no tensor"
        raise ConvertError(f"{path}: {state}: expected {position} bytes, found {size}. Fetch the file again")
