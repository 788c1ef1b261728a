"""Text to token ids and back, from what a GGUF file holds."""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final, SupportsIndex

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from . import _core
from .errors import DFlashError

# Split patterns by tokenizer.ggml.pre, for files without tokenizer.huggingface.json.
_O200K: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT_PATTERNS: Final = {"minimax-m2": _O200K, "gpt-4o": _O200K}

# tokenizer.ggml.token_type values of llama.cpp
_TYPE_CONTROL: Final = 3
_TYPE_USER_DEFINED: Final = 4
_TYPE_UNUSED: Final = 5


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's byte alphabet: printable bytes stand for themselves, the others for code points from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _int_array(gguf: _core.Gguf, key: str) -> list[int]:
    value = gguf.get(key)
    if value is None:
        return []
    try:
        return [operator.index(v) for v in value] if hasattr(value, "__len__") else [operator.index(value)]
    except TypeError:
        raise DFlashError(f"{gguf.path}: key {key}: expected integers, found {value!r:.60}") from None


def _from_ggml_keys(gguf: _core.Gguf) -> tokenizers.Tokenizer:
    """Byte-level BPE from mainline llama.cpp's keys."""
    kind, pre = gguf.get("tokenizer.ggml.model"), gguf.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise DFlashError(
            f"{gguf.path}: key tokenizer.ggml.model: expected 'gpt2' (byte-level BPE), found {kind!r}; "
            "convert the checkpoint again so that the file holds its tokenizer"
        )
    if pre not in SPLIT_PATTERNS:
        raise DFlashError(
            f"{gguf.path}: key tokenizer.ggml.pre: expected one of {', '.join(SPLIT_PATTERNS)}, found {pre!r}"
        )
    tokens, merges = gguf.get("tokenizer.ggml.tokens"), gguf.get("tokenizer.ggml.merges")
    for key, value in (("tokens", tokens), ("merges", merges)):
        if not isinstance(value, list):
            raise DFlashError(f"{gguf.path}: key tokenizer.ggml.{key}: expected a list of strings, found none")
    types = _int_array(gguf, "tokenizer.ggml.token_type")
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space:
            raise DFlashError(f"{gguf.path}: key tokenizer.ggml.merges: expected 'left right', found {merge!r}")
        pairs.append((left, right))
    padding = {i for i, kind_id in enumerate(types) if kind_id == _TYPE_UNUSED}
    vocab = {t: i for i, t in enumerate(tokens) if i not in padding}
    try:
        tok = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
        split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERNS[pre]), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tok.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tok.decoder = decoders.ByteLevel()
        for kind_id, special in ((_TYPE_CONTROL, True), (_TYPE_USER_DEFINED, False)):
            added = [t for t, k in zip(tokens, types, strict=False) if k == kind_id]
            add = tok.add_special_tokens if special else tok.add_tokens
            add([AddedToken(t, special=special, normalized=False) for t in added])
    except Exception as e:  # the tokenizers package raises bare Exception
        raise DFlashError(f"{gguf.path}: tokenizer.ggml keys: {e}") from e
    return tok


class Tokenizer:
    """A byte-level BPE tokenizer read from a target's GGUF file.

    Raises DFlashError, naming file and key, when the file holds no tokenizer that can be used.
    """

    def __init__(self, gguf: _core.Gguf) -> None:
        text = gguf.get("tokenizer.huggingface.json")
        if text is None:
            self._tok = _from_ggml_keys(gguf)
        else:
            try:
                self._tok = tokenizers.Tokenizer.from_str(text)
            except Exception as e:  # the tokenizers package raises bare Exception
                raise DFlashError(f"{gguf.path}: key tokenizer.huggingface.json: {e}") from e
        if not isinstance(self._tok.decoder, decoders.ByteLevel):
            raise DFlashError(
                f"{gguf.path}: tokenizer decoder: expected ByteLevel, found {type(self._tok.decoder).__name__}"
            )
        self._added = self._tok.get_added_tokens_decoder()
        self._bytes: dict[int, bytes] = {}
        self.bos_id = self._single(gguf, "tokenizer.ggml.bos_token_id")
        """Id of the begin-of-sequence token, or None."""
        self.add_bos = bool(gguf.get("tokenizer.ggml.add_bos_token", False))
        """Whether raw text prompts begin with it."""
        eos = _int_array(gguf, "tokenizer.ggml.eos_token_id") + _int_array(gguf, "dflash_cpp.eos_token_ids")
        self.eos_ids = tuple(dict.fromkeys(eos))
        """Ids that end an answer: those of the model's generation config, and no others."""

    @staticmethod
    def _single(gguf: _core.Gguf, key: str) -> int | None:
        ids = _int_array(gguf, key)
        return ids[0] if ids else None

    @property
    def n_tokens(self) -> int:
        """Ids the tokenizer knows; the model's n_vocab may be padded beyond it."""
        return self._tok.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids of text. Special tokens written in the text are recognised.

        add_bos: put the begin-of-sequence token first; None: as the file says.
        """
        if not isinstance(text, str):
            raise DFlashError(f"text: expected a string, found {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:  # half a surrogate pair, or a byte that was no UTF-8 when it was read
            found = f"{text[e.start]!r} at character {e.start}"
            raise DFlashError(f"text: expected Unicode text, found {found}, which UTF-8 cannot hold") from None
        ids = list(self._tok.encode(text, add_special_tokens=False).ids)
        if (self.add_bos if add_bos is None else add_bos) and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[SupportsIndex], *, special: bool = False) -> str:
        """Text of token ids; incomplete UTF-8 becomes U+FFFD. special: show special tokens too."""
        joined = b"".join(self.token_bytes(operator.index(i), special=special) for i in ids)
        return joined.decode("utf-8", errors="replace")

    def token_id(self, token: str) -> int | None:
        """Id of one token by its exact content, or None."""
        return self._tok.token_to_id(token)

    def token_text(self, token_id: int | None) -> str | None:
        """Content of one token as the vocabulary writes it, or None."""
        return None if token_id is None else self._tok.id_to_token(token_id)

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        """The bytes one token stands for: none for special tokens (unless asked for) and for padding ids."""
        added = self._added.get(token_id)
        if added is not None:
            return b"" if added.special and not special else added.content.encode()
        found = self._bytes.get(token_id)
        if found is None:
            token = self._tok.id_to_token(token_id) if 0 <= token_id < 2**32 else None
            table = _byte_of_char()
            if token is None:
                found = b""
            elif set(token) <= table.keys():
                found = bytes(table[c] for c in token)
            else:
                found = token.encode()
            self._bytes[token_id] = found
        return found

    def stream(self) -> TextStream:
        """A fresh incremental decoder."""
        return TextStream(self)


class TextStream:
    """Token ids in, whole characters out: bytes of an unfinished character wait for the next token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text completed by one more token; each token is decoded once."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """U+FFFD for bytes that never became a character, when no more tokens will come."""
        return self._decoder.decode(b"", final=True)


def check_token_ids(ids: Any, n_vocab: int, *, name: str = "prompt") -> list[int]:
    """Token ids as a list of int.

    Raises DFlashError for an empty list, anything that is not an integer, and ids outside 0..n_vocab - 1.
    """
    if hasattr(ids, "ndim") and ids.ndim != 1:
        raise DFlashError(f"{name}: expected token ids in one dimension, found shape {tuple(ids.shape)}")
    out: list[int] = []
    for at, value in enumerate(ids):
        try:
            if isinstance(value, bool):
                raise TypeError
            token = operator.index(value)
        except TypeError:
            raise DFlashError(f"{name}: expected integer token ids, found {value!r} at position {at}") from None
        if not 0 <= token < n_vocab:
            raise DFlashError(f"{name}: expected token ids in 0..{n_vocab - 1}, found {token} at position {at}")
        out.append(token)
    if not out:
        raise DFlashError(f"{name}: expected at least one token, found none")
    return out
