"""tokenizer.json and its companions -> the tokenizer metadata of a GGUF file, as llama.cpp's converter lays it out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, Keys, TokenType

from .errors import ConvertError, listing
from .hf_config import Config, parse_json_object, read_bytes
from .plan import Metadata

PRE_TOKENIZER = "minimax-m2"  # llama.cpp's name for the o200k split pattern with MiniMax's special tokens
MAX_VOCAB = 1 << 22  # padding to a corrupt vocab_size must not eat the memory
EOS_IDS_KEY = "dflash_cpp.eos_token_ids"

# GGUF key, config.json key, tokenizer_config.json key
SPECIAL_TOKENS = (
    (Keys.Tokenizer.BOS_ID, "bos_token_id", "bos_token"),
    (Keys.Tokenizer.UNK_ID, "unk_token_id", "unk_token"),
    (Keys.Tokenizer.PAD_ID, "pad_token_id", "pad_token"),
)


@dataclass(frozen=True, slots=True)
class Vocab:
    """A byte-level BPE vocabulary padded to the model's `vocab_size`; `n_real` ids have a token of their own."""

    directory: Path
    tokens: list[str]
    types: list[int]
    merges: list[str]
    n_real: int
    tokenizer_json: str


def load_vocab(directory: Path, vocab_size: int) -> Vocab:
    """Read tokenizer.json; pad with `[PADn]` to `vocab_size` tokens.

    Raises `ConvertError` if it is missing, not byte-level BPE, or has ids beyond `vocab_size`.
    """
    path = directory / "tokenizer.json"
    content = read_bytes(path)
    document = parse_json_object(path, content)
    text = content.decode("utf-8")
    model = document.get("model")
    if (
        not isinstance(model, dict)
        or model.get("type") != "BPE"
        or "ByteLevel" not in json.dumps(document.get("decoder"))
    ):
        raise ConvertError(f"{path}: expected a byte-level BPE tokenizer (model.type 'BPE', decoder 'ByteLevel')")
    tokens: dict[int, tuple[str, TokenType]] = {}
    vocabulary, added = model.get("vocab"), document.get("added_tokens") or []
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        raise ConvertError(f"{path}: expected model.vocab to be an object and added_tokens a list")
    for content, token_id in vocabulary.items():
        tokens[_check_id(path, content, token_id, vocab_size)] = (content, TokenType.NORMAL)
    if len(tokens) != len(vocabulary):
        raise ConvertError(f"{path}: model.vocab gives {len(vocabulary)} tokens only {len(tokens)} different ids")
    for item in added:
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            raise ConvertError(f"{path}: added_tokens holds {item!r}; expected an object with id and content")
        kind = TokenType.CONTROL if item.get("special") else TokenType.USER_DEFINED
        tokens[_check_id(path, item["content"], item.get("id"), vocab_size)] = (item["content"], kind)
    padded = [tokens.get(i) or (f"[PAD{i}]", TokenType.UNUSED) for i in range(vocab_size)]
    return Vocab(
        directory,
        [content for content, _ in padded],
        [int(kind) for _, kind in padded],
        _merges(path, model.get("merges")),
        len(tokens),
        text,
    )


def _check_id(path: Path, content: str, token_id: Any, vocab_size: int) -> int:
    if type(token_id) is not int or not 0 <= token_id < vocab_size:
        raise ConvertError(
            f"{path}: token {content!r} has id {token_id!r}; expected 0 to {vocab_size - 1} "
            "(vocab_size in config.json). The tokenizer and the model do not belong together"
        )
    return token_id


def _merges(path: Path, merges: Any) -> list[str]:
    if not isinstance(merges, list):
        raise ConvertError(f"{path}: expected model.merges to be a list")
    lines = []
    for merge in merges:
        if isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge):
            # A space separates the halves in GGUF; one inside a half is shifted, as in llama.cpp's converter.
            lines.append(" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in merge))
        elif isinstance(merge, str) and len(merge.split(" ")) == 2:
            lines.append(merge)
        else:
            raise ConvertError(f"{path}: merge {merge!r} is not a pair of strings")
    return lines


def add_vocab(meta: Metadata, vocab: Vocab, config: Config) -> None:
    """Add the vocabulary and the special tokens. `config` is the target's config.json.

    End of sequence is what generation_config.json says; a list also goes to `dflash_cpp.eos_token_ids` (all of it),
    because llama.cpp's key holds one id. The other special tokens follow tokenizer_config.json first.
    """
    meta.text(Keys.Tokenizer.MODEL, "gpt2")
    meta.text(Keys.Tokenizer.PRE, PRE_TOKENIZER)
    meta.array(Keys.Tokenizer.LIST, vocab.tokens, GGUFValueType.STRING)
    meta.array(Keys.Tokenizer.TOKEN_TYPE, vocab.types, GGUFValueType.INT32)
    meta.array(Keys.Tokenizer.MERGES, vocab.merges, GGUFValueType.STRING)
    tokenizer = Config.load_optional(vocab.directory / "tokenizer_config.json")
    generation = Config.load_optional(vocab.directory / "generation_config.json")
    n_vocab = len(vocab.tokens)
    for key, id_name, token_name in SPECIAL_TOKENS:
        token_id = _token_from_text(tokenizer, token_name, vocab)
        for source in (generation, config):
            if token_id is None:
                token_id = source.opt_int(id_name, 0, n_vocab - 1)
        if token_id is not None:
            meta.u32(key, token_id)
    eos = _eos_ids(generation, n_vocab) or _eos_ids(config, n_vocab)
    if not eos:
        token_id = _token_from_text(tokenizer, "eos_token", vocab)
        eos = [] if token_id is None else [token_id]
    if eos:
        meta.u32(Keys.Tokenizer.EOS_ID, eos[0])
    if len(eos) > 1:
        meta.array(EOS_IDS_KEY, eos, GGUFValueType.INT32)
    meta.flag(Keys.Tokenizer.ADD_BOS, bool(tokenizer.opt_bool("add_bos_token")))
    if tokenizer.has("add_eos_token"):
        meta.flag(Keys.Tokenizer.ADD_EOS, bool(tokenizer.opt_bool("add_eos_token")))


def _eos_ids(config: Config, n_vocab: int) -> list[int]:
    if not isinstance(config.values.get("eos_token_id"), list):
        single = config.opt_int("eos_token_id", 0, n_vocab - 1)
        return [] if single is None else [single]
    ids = config.opt_ints("eos_token_id") or []
    if not all(0 <= token_id < n_vocab for token_id in ids):
        raise config.error("eos_token_id", f"ids from 0 to {n_vocab - 1}")
    return ids


def _token_from_text(tokenizer: Config, key: str, vocab: Vocab) -> int | None:
    value = tokenizer.values.get(key)
    content = value.get("content") if isinstance(value, dict) else value
    if content is None:
        return None
    try:
        return vocab.tokens.index(content)
    except ValueError:
        raise tokenizer.error(key, "a token of tokenizer.json") from None


def add_tokenizer_file(meta: Metadata, vocab: Vocab) -> None:
    """Add tokenizer.json itself, so that the `tokenizers` library loads it from the GGUF without rebuilding."""
    meta.text(Keys.Tokenizer.HF_JSON, vocab.tokenizer_json)


def add_chat_template(meta: Metadata, directory: Path) -> None:
    """Add the chat template: chat_template.jinja, else tokenizer_config.json's string or list of named templates."""
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            meta.text(Keys.Tokenizer.CHAT_TEMPLATE, path.read_bytes().decode("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConvertError(f"{path}: cannot be read as UTF-8 text: {error}") from error
        return
    tokenizer = Config.load_optional(directory / "tokenizer_config.json")
    template = tokenizer.values.get("chat_template")
    if isinstance(template, str):
        meta.text(Keys.Tokenizer.CHAT_TEMPLATE, template)
    elif isinstance(template, list):
        names = []
        for item in template:
            if not isinstance(item, dict) or not all(isinstance(item.get(k), str) for k in ("name", "template")):
                raise tokenizer.error("chat_template", "a string or a list of objects with name and template")
            if item["name"] == "default":
                meta.text(Keys.Tokenizer.CHAT_TEMPLATE, item["template"])
            else:
                names.append(item["name"])
                meta.text(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=item["name"]), item["template"])
        meta.array(Keys.Tokenizer.CHAT_TEMPLATES, names, GGUFValueType.STRING)
    elif template is not None:
        raise tokenizer.error("chat_template", "a string or a list of objects with name and template")


def check_same_tokenizer(path: Path, vocab: Vocab) -> None:
    """Raise `ConvertError` if the drafter's tokenizer.json at `path` gives an id another token than the target's."""
    own = load_vocab(path.parent, len(vocab.tokens))
    differing = [i for i, (a, b) in enumerate(zip(own.tokens, vocab.tokens, strict=True)) if a != b]
    if differing:
        i = differing[0]
        raise ConvertError(
            f"{path}: token {i} is {own.tokens[i]!r}, in {vocab.directory} it is {vocab.tokens[i]!r} "
            f"({len(differing)} differ: {listing(map(str, differing))}). The drafter is for another target"
        )
