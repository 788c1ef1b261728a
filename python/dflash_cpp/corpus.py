"""Token sequences from files, for evaluation and capture: .npy, .jsonl, .safetensors shards, plain text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import DFlashError
from .tokenizer import Tokenizer, check_token_ids

FORMATS: Final = ".npy ([n, length] token ids), .jsonl (input_ids or text), .safetensors (input_ids) or plain text"


@dataclass(frozen=True)
class Sample:
    """One sequence.

    name: file and row, for messages. tokens: int32 ids. loss_mask: which tokens are the target's own; None: unknown.
    """

    name: str
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_] | None = None


def read_corpus(
    paths: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer | None, n_vocab: int, *, limit: int | None = None
) -> list[Sample]:
    """All sequences of the files, in order, at most limit of them.

    tokenizer: for text; None: text is refused. Raises DFlashError naming file and row for ids outside the vocabulary,
    shapes and values that do not fit, and when there is nothing to read.
    """
    if limit is not None and limit < 1:
        raise DFlashError(f"limit: expected a number of at least 1, found {limit}")
    out: list[Sample] = []
    for path in paths:
        for sample in _read(Path(path), tokenizer, n_vocab):
            out.append(sample)
            if limit is not None and len(out) == limit:
                return out
    if not out:
        raise DFlashError(f"data: expected at least one sequence in {', '.join(map(str, paths)) or 'no file'}")
    return out


def _read(path: Path, tokenizer: Tokenizer | None, n_vocab: int) -> Iterator[Sample]:
    if not path.is_file():
        raise DFlashError(
            f"data: expected a file at {path} ({FORMATS}), found {'a folder' if path.is_dir() else 'nothing'}"
        )
    try:
        if path.suffix == ".npy":
            yield from _read_npy(path, n_vocab)
        elif path.suffix == ".safetensors":
            yield _read_shard(path, n_vocab)
        elif path.suffix == ".jsonl":
            yield from _read_jsonl(path, tokenizer, n_vocab)
        else:
            yield _text_sample(str(path), path.read_text(encoding="utf-8"), tokenizer, n_vocab)
    except (OSError, UnicodeDecodeError) as e:
        raise DFlashError(f"data: {path}: cannot be read as {path.suffix or 'text'}: {e}; expected {FORMATS}") from e


def _sample(name: str, ids: Any, n_vocab: int, loss_mask: Any = None) -> Sample:
    array = np.asarray(ids)
    if array.ndim == 1 and array.size and np.issubdtype(array.dtype, np.integer):
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= n_vocab:
            at = int(np.flatnonzero((array < 0) | (array >= n_vocab))[0])
            raise DFlashError(
                f"{name}: expected token ids in 0..{n_vocab - 1} (the target's vocabulary), found {array[at]} "
                f"at position {at}; is the data another model's?"
            )
    else:
        array = np.array(check_token_ids(ids, n_vocab, name=name))
    mask = None
    if loss_mask is not None:
        mask = np.asarray(loss_mask)
        if mask.shape != array.shape or not (np.issubdtype(mask.dtype, np.number) or mask.dtype == np.bool_):
            raise DFlashError(
                f"{name}: loss_mask: expected {array.size} numbers, one for each token, found {mask.shape}"
            )
        mask = mask.astype(bool)
    return Sample(name, array.astype(np.int32), mask)


def _read_npy(path: Path, n_vocab: int) -> Iterator[Sample]:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as e:
        raise DFlashError(f"data: {path}: expected a .npy file of integers: {e}") from e
    if rows.ndim not in (1, 2) or not np.issubdtype(rows.dtype, np.integer):
        raise DFlashError(f"data: {path}: expected integers [n, length], found {rows.dtype} {rows.shape}")
    for i, row in enumerate(rows if rows.ndim == 2 else rows[None]):
        yield _sample(f"{path}: row {i}", row, n_vocab)


def _read_shard(path: Path, n_vocab: int) -> Sample:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as shard:
            if "input_ids" not in shard.keys():  # noqa: SIM118 (not a mapping)
                raise DFlashError(f"data: {path}: expected a tensor input_ids (a shard of dflash-cpp capture)")
            mask = shard.get_tensor("loss_mask") if "loss_mask" in shard.keys() else None  # noqa: SIM118
            return _sample(str(path), shard.get_tensor("input_ids"), n_vocab, mask)
    except SafetensorError as e:
        raise DFlashError(f"data: {path}: expected a safetensors file: {e}") from e


def _read_jsonl(path: Path, tokenizer: Tokenizer | None, n_vocab: int) -> Iterator[Sample]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name = f"{path}: line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise DFlashError(f"{name}: expected one JSON object: {e}") from e
            text = row.get("text", row.get("prompt")) if isinstance(row, dict) else None
            if isinstance(row, dict) and isinstance(row.get("input_ids"), list):
                yield _sample(name, row["input_ids"], n_vocab, row.get("loss_mask"))
            elif isinstance(text, str):
                yield _text_sample(name, text, tokenizer, n_vocab)
            else:
                raise DFlashError(f"{name}: expected an object with input_ids (a list) or text (a string)")


def _text_sample(name: str, text: str, tokenizer: Tokenizer | None, n_vocab: int) -> Sample:
    if tokenizer is None:
        raise DFlashError(f"{name}: text needs a tokenizer, and this target has none; give token ids (.npy)")
    return _sample(name, tokenizer.encode(text), n_vocab)


def write_json_atomically(path: str | os.PathLike[str], value: Any) -> None:
    """One JSON document, whole or not at all."""
    final = Path(path)
    partial = final.with_name(final.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        partial.replace(final)
    except OSError as e:
        raise DFlashError(f"{final}: cannot be written: {e}") from e
    finally:
        partial.unlink(missing_ok=True)
