"""Token sequences from files, for evaluation and capture: .npy, .jsonl, .safetensors shards, plain text."""

from __future__ import annotations

import json
import os
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .chat import ChatTemplate
from .errors import DFlashError
from .tokenizer import Tokenizer, check_token_ids

FORMATS: Final = (
    ".npy ([n, length] token ids), .jsonl (input_ids, messages or text), .safetensors (input_ids) or plain text"
)


@dataclass(frozen=True)
class Sample:
    """One sequence.

    name: file and row, for messages. tokens: int32 ids. loss_mask: which tokens are the target's own; None: unknown.
    """

    name: str
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class _Vocabulary:
    """What sequences are made of, see `read_corpus`."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    n_vocab: int


def read_corpus(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer | None,
    n_vocab: int,
    *,
    template: ChatTemplate | None = None,
    limit: int | None = None,
) -> list[Sample]:
    """All sequences of the files, in order, at most limit of them.

    tokenizer: for text, template: for messages; None: such data is refused. Raises DFlashError naming file and row for
    ids outside the vocabulary, shapes and values that do not fit, and when there is nothing to read.
    """
    if limit is not None and limit < 1:
        raise DFlashError(f"limit: expected a number of at least 1, found {limit}")
    out: list[Sample] = []
    vocabulary = _Vocabulary(tokenizer, template, n_vocab)
    for path in paths:
        for sample in _read(Path(path), vocabulary):
            out.append(sample)
            if limit is not None and len(out) == limit:
                return out
    if not out:
        raise DFlashError(f"data: expected at least one sequence in {', '.join(map(str, paths)) or 'no file'}")
    return out


def _read(path: Path, vocabulary: _Vocabulary) -> Iterator[Sample]:
    if not path.is_file():
        raise DFlashError(
            f"data: expected a file at {path} ({FORMATS}), found {'a folder' if path.is_dir() else 'nothing'}"
        )
    try:
        if path.suffix == ".npy":
            yield from _read_npy(path, vocabulary.n_vocab)
        elif path.suffix == ".safetensors":
            yield _read_shard(path, vocabulary.n_vocab)
        elif path.suffix == ".jsonl":
            yield from _read_jsonl(path, vocabulary)
        else:
            yield _text_sample(str(path), path.read_text(encoding="utf-8"), vocabulary)
    except (OSError, UnicodeDecodeError, EOFError) as e:
        raise DFlashError(f"data: {path}: cannot be read as {path.suffix or 'text'}: {e}; expected {FORMATS}") from e


def _sample(name: str, ids: Any, n_vocab: int, loss_mask: Any = None) -> Sample:
    array = _as_array(ids)
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
        mask = _as_array(loss_mask)
        if mask.shape != array.shape or not (np.issubdtype(mask.dtype, np.number) or mask.dtype == np.bool_):
            raise DFlashError(
                f"{name}: loss_mask: expected {array.size} numbers, one for each token, found {mask.dtype} {mask.shape}"
            )
        mask = mask.astype(bool)
    return Sample(name, array.astype(np.int32), mask)


def _as_array(values: Any) -> NDArray[Any]:
    """Rows of different lengths become an array of objects: of no shape or type that is asked for."""
    try:
        return np.asarray(values)
    except ValueError:
        return np.asarray(values, dtype=object)


def _read_npy(path: Path, n_vocab: int) -> Iterator[Sample]:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError) as e:  # the header is a Python literal
        raise DFlashError(f"data: {path}: expected a .npy file of integers: {e}") from e
    if not isinstance(rows, np.ndarray):
        raise DFlashError(f"data: {path}: expected a .npy file of one array, found a .npz archive")
    if rows.ndim not in (1, 2) or rows.dtype.kind not in "iu":
        raise DFlashError(f"data: {path}: expected integers [n, length], found {rows.dtype} {rows.shape}")
    for i, row in enumerate(rows if rows.ndim == 2 else rows[None]):
        yield _sample(f"{path}: row {i}", row, n_vocab)


def _read_shard(path: Path, n_vocab: int) -> Sample:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as shard:
            if "input_ids" not in shard.keys():  # noqa: SIM118 (not a mapping)
                raise DFlashError(f"data: {path}: expected a tensor input_ids (a shard of dflash-cpp capture)")
            mask = _tensor(shard, path, "loss_mask") if "loss_mask" in shard.keys() else None  # noqa: SIM118
            return _sample(str(path), _tensor(shard, path, "input_ids"), n_vocab, mask)
    except SafetensorError as e:
        raise DFlashError(f"data: {path}: expected a safetensors file: {e}") from e


def _tensor(shard: Any, path: Path, name: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = shard.get_tensor(name)
    except (TypeError, AttributeError) as e:  # bfloat16, float8: numpy has neither
        raise DFlashError(f"data: {path}: {name}: expected numbers of a type that numpy has: {e}") from e
    return array


def _read_jsonl(path: Path, vocabulary: _Vocabulary) -> Iterator[Sample]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name = f"{path}: line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise DFlashError(f"{name}: expected one JSON object: {e}") from e
            values = row if isinstance(row, dict) else {}
            text = values.get("text", values.get("prompt"))
            if isinstance(values.get("input_ids"), list):
                yield _sample(name, values["input_ids"], vocabulary.n_vocab, values.get("loss_mask"))
            elif isinstance(values.get("messages"), list):
                yield _chat_sample(name, values["messages"], vocabulary)
            elif isinstance(text, str):
                yield _text_sample(name, text, vocabulary)
            else:
                raise DFlashError(f"{name}: expected an object with input_ids or messages (lists) or text (a string)")


def _text_sample(name: str, text: str, vocabulary: _Vocabulary, *, add_bos: bool | None = None) -> Sample:
    if vocabulary.tokenizer is None:
        raise DFlashError(f"{name}: text needs a tokenizer, and this target has none; give token ids (.npy)")
    try:
        ids = vocabulary.tokenizer.encode(text, add_bos=add_bos)
    except DFlashError as e:
        raise DFlashError(f"{name}: {e}") from e
    return _sample(name, ids, vocabulary.n_vocab)


def _chat_sample(name: str, messages: list[Any], vocabulary: _Vocabulary) -> Sample:
    """A conversation as the target sees it: up to where it answers, or with the answer that is there."""
    if vocabulary.template is None:
        raise DFlashError(f"{name}: messages need a chat template, and this target has none; give text")
    try:
        answered = isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant" if messages else False
        text = vocabulary.template.render(messages, add_generation_prompt=not answered)
    except DFlashError as e:
        raise DFlashError(f"{name}: {e}") from e
    return _text_sample(name, text, vocabulary, add_bos=False)  # the template writes it


def check_writable(
    name: str, path: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str] | None] = ()
) -> None:
    """Raises DFlashError where a file cannot be made, or one of inputs would be overwritten: to be asked before the
    work whose result goes there."""
    final = Path(path)
    folder = final.parent
    if final.is_dir():
        problem = "found a folder of that name"
    elif any(i is not None and final.exists() and Path(i).exists() and final.samefile(i) for i in inputs):
        problem = "it is one of the files to be read"
    elif _is_device(final):
        return
    elif not folder.is_dir():
        problem = f"the folder {folder} does not exist"
    elif not os.access(folder, os.W_OK):
        problem = f"the folder {folder} may not be written to"
    else:
        return
    raise DFlashError(f"{name}: expected a file that can be written at {final}, but {problem}")


def write_json_atomically(path: str | os.PathLike[str], value: Any) -> None:
    """One JSON document, whole or not at all; into a device or pipe as it comes."""
    final = Path(path)
    partial = final.with_name(final.name + ".partial")
    text = json.dumps(value, indent=2) + "\n"
    try:
        if _is_device(final):
            final.write_text(text, encoding="utf-8")
            return
        partial.write_text(text, encoding="utf-8")
        partial.replace(final)
    except OSError as e:
        raise DFlashError(f"{final}: cannot be written: {e}") from e
    finally:
        partial.unlink(missing_ok=True)


def _is_device(path: Path) -> bool:
    """/dev/stdout, a named pipe: to be written to, not replaced by a file."""
    return path.exists() and not path.is_file() and not path.is_dir()
