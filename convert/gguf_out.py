"""Writing a planned GGUF file: streamed, verified, and put under its name only when complete."""

from __future__ import annotations

import glob
import os
import queue
import shutil
import stat
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from .errors import ConvertError, listing
from .gguf_check import Edges, verify_gguf
from .linear import Encoder
from .plan import Plan, PlannedTensor

Bytes = npt.NDArray[np.uint8]
QUEUE_DEPTH = 16  # encoded pieces waiting to be written; a piece is about 256 KiB


def check_output(out: Path) -> Path:
    """Return the real path to write. Raises `ConvertError` if it cannot or should not be written."""
    out = Path(os.path.realpath(out))
    if not out.parent.is_dir():
        raise ConvertError(f"{out}: the folder {out.parent} does not exist")
    if out.is_dir():
        raise ConvertError(f"{out}: is a folder; expected the name of the GGUF file to write")
    if out.exists():
        if not stat.S_ISREG(out.stat().st_mode):
            raise ConvertError(f"{out}: is not a regular file; expected the name of the GGUF file to write")
        with out.open("rb") as file:
            magic = file.read(4)
        # An earlier GGUF may be replaced. Anything else under that name is a slip of the keyboard.
        if magic not in (b"GGUF", b""):
            raise ConvertError(f"{out}: exists and is not a GGUF file; choose another name or remove it first")
    return out


def check_space(plan: Plan, out: Path) -> None:
    """Raises `ConvertError` when the disk cannot hold the file, before minutes of reading."""
    need = sum(tensor.nbytes for tensor in plan.tensors)
    free = shutil.disk_usage(out.parent).free
    if need > free:
        unfinished = sorted(path.name for path in out.parent.glob(f".{glob.escape(out.name)}.*.part"))
        hint = f"; of conversions that were killed, or still run, there is {listing(unfinished)}" if unfinished else ""
        raise ConvertError(f"{out}: needs {_size(need)}, the disk has {_size(free)} free{hint}")


def write_gguf(plan: Plan, out: Path, encoder: Encoder, progress: Callable[[int, str], None]) -> int:
    """Write `plan` to `out` and return the file's size.

    The data goes to a temporary file in the same folder, which is verified, flushed to disk and then renamed. On any
    error or interrupt the temporary file is removed and an earlier `out` stays as it was.
    `progress` gets (bytes written, tensor name). Memory: a few pieces of about 256 KiB, or one AutoAWQ matrix.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        edges = _write(plan, part, encoder, progress)
        verify_gguf(plan, part, edges)
        _sync(part)
        size = part.stat().st_size
        part.replace(out)
    except OSError as error:
        raise ConvertError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    _sync(out.parent)
    return size


def _size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def _write(plan: Plan, part: Path, encoder: Encoder, progress: Callable[[int, str], None]) -> dict[str, Edges]:
    writer = gguf.GGUFWriter(part, plan.arch)
    edges: dict[str, Edges] = {}
    try:
        for key, value in plan.metadata.items():
            writer.add_key_value(key, value.value, value.type, value.item)
        for tensor in plan.tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        with closing(_prefetched(plan.tensors, encoder)) as tensors:
            for tensor, pieces in tensors:
                seen = edges[tensor.name] = Edges()
                for piece in pieces:
                    data = piece.reshape(-1).data
                    file.write(data)
                    seen.add(data)
                    progress(len(data), tensor.name)
                writer.write_padding(file, tensor.nbytes)
    finally:
        writer.close()
    return edges


def _pieces(tensor: PlannedTensor, encoder: Encoder) -> Iterator[Bytes]:
    """Yield a tensor's bytes in order, expert after expert: no stack is ever held in memory.

    Shards hold experts by name ("0", "1", "10", ...), so the reads jump, but each is a whole expert of megabytes.
    """
    for source in tensor.sources:
        yield from encoder.encode(source, tensor.qtype)


@dataclass(slots=True)
class _Prefetch:
    """A bounded queue between the encoding thread and the writing one."""

    items: queue.Queue[Any] = field(default_factory=lambda: queue.Queue(QUEUE_DEPTH))
    stop: threading.Event = field(default_factory=threading.Event)

    def put(self, item: Any) -> None:
        while not self.stop.is_set():
            try:
                self.items.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def _prefetched(
    tensors: list[PlannedTensor], encoder: Encoder
) -> Generator[tuple[PlannedTensor, Iterator[Bytes]], None, None]:
    """Yield every tensor with its pieces, encoded ahead in a second thread: reading and writing overlap."""
    link = _Prefetch()

    def produce() -> None:
        try:
            for tensor in tensors:
                for piece in _pieces(tensor, encoder):
                    link.put(piece)
                    if link.stop.is_set():
                        return
                link.put(None)
        except BaseException as error:
            link.put(error)

    def consume() -> Iterator[Bytes]:
        while (item := link.items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=produce, name="convert-encode", daemon=True)
    thread.start()
    try:
        for tensor in tensors:
            yield tensor, consume()
    finally:
        link.stop.set()
        thread.join()


def _sync(path: Path) -> None:
    """Flush a file or a folder to disk; folders cannot be flushed on Windows and need not be."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
