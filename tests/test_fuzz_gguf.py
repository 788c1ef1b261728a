"""Damaged files give DFlashError and nothing else. Catches reads outside a file and lengths that are believed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from dflash_cpp import DFlashError, _core

N_FLIPS = 3000
N_MODEL_FLIPS = 250


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every kind of value and tensor."""
    path = tmp_path_factory.mktemp("fuzz") / "small.gguf"
    w = gguf.GGUFWriter(path, "dflash")
    w.add_uint8("k.u8", 1)
    w.add_int8("k.i8", -1)
    w.add_uint16("k.u16", 2)
    w.add_int16("k.i16", -2)
    w.add_uint32("k.u32", 3)
    w.add_int32("k.i32", -3)
    w.add_uint64("k.u64", 4)
    w.add_int64("k.i64", -4)
    w.add_float32("k.f32", 0.5)
    w.add_float64("k.f64", 0.25)
    w.add_bool("k.bool", True)
    w.add_string("k.string", "text")
    w.add_array("k.ints", [1, 2, 3])
    w.add_array("k.floats", [0.5, 1.5])
    w.add_array("k.strings", ["a", "", "long string"])
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2, 64)).astype(np.float32)
    w.add_tensor("f32", values)
    w.add_tensor("f16", values.astype(np.float16))
    for kind in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0):
        w.add_tensor(kind.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    bf16 = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
    w.add_tensor("bf16", bf16, raw_dtype=gguf.GGMLQuantizationType.BF16)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path.read_bytes()


def read_everything(path: Path) -> bool:
    """Whether the file could be read; DFlashError is the only way not to."""
    try:
        g = _core.Gguf(str(path))
        for key in g.keys:
            g.get(key)
        for tensor in g.tensors:
            assert tensor.offset + tensor.nbytes <= g.file_bytes
            if tensor.nbytes < 2**20:
                g.tensor(tensor.name)
    except DFlashError as e:
        assert path.name in str(e)
        return False
    return True


def write(folder: Path, data: bytes, number: int) -> Path:
    """A new file each time: the reader may still have the last one mapped."""
    path = folder / f"variant{number}.gguf"
    path.write_bytes(data)
    return path


def flips(data: bytes, n: int, end: int, seed: int) -> Iterator[bytes]:
    """Copies with one to four bits, or one whole byte, changed before offset end."""
    rng = random.Random(seed)
    for _ in range(n):
        out = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(end)
            if rng.random() < 0.25:
                out[at] = rng.choice((0, 0x7F, 0x80, 0xFF))
            else:
                out[at] ^= 1 << rng.randrange(8)
        yield bytes(out)


def test_the_file_itself_is_read(small: bytes, tmp_path: Path) -> None:
    assert read_everything(write(tmp_path, small, 0))


def test_every_truncation(small: bytes, tmp_path: Path) -> None:
    for size in range(len(small)):
        path = write(tmp_path, small[:size], size)
        assert not read_everything(path), size
        path.unlink()


def test_bit_flips(small: bytes, tmp_path: Path) -> None:
    header = small.index(b"bf16") + 64
    refused = 0
    for i, data in enumerate(flips(small, N_FLIPS, header, seed=11)):
        path = write(tmp_path, data, i)
        refused += not read_everything(path)
        path.unlink()
    assert refused > N_FLIPS // 10


def test_trailing_bytes_do_no_harm(small: bytes, tmp_path: Path) -> None:
    read_everything(write(tmp_path, small + bytes(100), 0))


@pytest.mark.parametrize("role", ["target", "drafter"])
def test_models_from_damaged_files(role: str, nano_path: Path, nano_drafter_path: Path, tmp_path: Path) -> None:
    source = nano_path if role == "target" else nano_drafter_path
    data = source.read_bytes()
    weights = min(t.offset for t in _core.Gguf(str(source)).tensors)
    # Half of the flips go to where the shapes are: the first bytes, and the tensor directory at the end.
    vocabulary = data.index(b"tokenizer.ggml.tokens")
    directory = data.index(b"blk.0.attn_norm.weight")
    spans = ((0, vocabulary), (directory, weights), (0, weights))
    loaded = 0
    rng = random.Random(13)
    for i in range(N_MODEL_FLIPS):
        begin, end = spans[i % len(spans)]
        out = bytearray(data)
        for _ in range(rng.choice((1, 1, 2))):
            out[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
        path = write(tmp_path, bytes(out), i)
        try:
            if role == "target":
                _core.Model(str(path), n_threads=1)
            else:
                _core.Model(str(nano_path), str(path), n_threads=1)
            loaded += 1
        except DFlashError as e:
            assert path.name in str(e), str(e)
        path.unlink()
    assert loaded < N_MODEL_FLIPS
