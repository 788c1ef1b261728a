"""Text in pieces is the text. Catches broken characters, lost or late stop strings, visible special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Ids
from dflash_cpp import DFlashError, Engine, _core
from dflash_cpp.chat import ChatTemplate
from dflash_cpp.demo import embedded_model_dir
from dflash_cpp.stops import StopMatcher
from dflash_cpp.tokenizer import SPLIT_PATTERNS, Tokenizer

TEXTS = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=60)


@pytest.fixture(scope="module")
def tokenizer(nano_path: Path) -> Tokenizer:
    return Tokenizer(_core.Gguf(str(nano_path)))


@pytest.fixture(scope="module")
def ggml_tokenizer(nano_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same vocabulary as llama.cpp's converter would leave it: without tokenizer.huggingface.json."""
    source = _core.Gguf(str(nano_path))
    path = tmp_path_factory.mktemp("vocab") / "ggml.gguf"
    w = gguf.GGUFWriter(path, "minimax-m2")
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre"):
        w.add_string(key, source.get(key))
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        w.add_array(key, source.get(key))
    w.add_array("tokenizer.ggml.token_type", source.get("tokenizer.ggml.token_type").tolist())
    w.add_uint32("tokenizer.ggml.eos_token_id", source.get("tokenizer.ggml.eos_token_id"))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return Tokenizer(_core.Gguf(str(path)))


@given(TEXTS)
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), special=True) == text


@given(TEXTS)
def test_both_vocabularies_agree(tokenizer: Tokenizer, ggml_tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ggml_tokenizer.encode(text) == ids
    assert ggml_tokenizer.decode(ids) == tokenizer.decode(ids)


def test_vocabularies_agree_on_special_tokens(tokenizer: Tokenizer, ggml_tokenizer: Tokenizer) -> None:
    text = "]~!b[]~b]user\nhello[e~[\n<think>\n  x  </think>"
    assert ggml_tokenizer.encode(text) == tokenizer.encode(text)
    assert ggml_tokenizer.eos_ids == tokenizer.eos_ids
    for token in range(1024):
        assert ggml_tokenizer.token_bytes(token) == tokenizer.token_bytes(token), token


@given(st.lists(st.integers(0, 1023), max_size=40))
def test_the_stream_is_the_whole(tokenizer: Tokenizer, ids: Ids) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@given(TEXTS)
def test_pieces_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    stream, out = tokenizer.stream(), ""
    for i in tokenizer.encode(text):
        out += stream.push(i)
        # what has been shown is never taken back, and holds no half character
        assert tokenizer.decode(tokenizer.encode(text), special=False).startswith(out)
    assert stream.flush() == ""


def test_decoding_agrees_with_the_tokenizers_package(tokenizer: Tokenizer) -> None:
    import tokenizers

    other = tokenizers.Tokenizer.from_file(str(embedded_model_dir() / "nano-m2" / "tokenizer.json"))
    for text in ("def f(x):\n    return x", "naïve 🙂 日本語", "]~b]user\nhi[e~[", "\x00\x7f\t"):
        ids = other.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == other.decode(ids, skip_special_tokens=True)


def test_the_split_pattern_is_the_models() -> None:
    """For files without tokenizer.huggingface.json. The small vocabulary has too few merges to show a difference."""
    document = json.loads((embedded_model_dir() / "nano-m2" / "tokenizer.json").read_text())
    assert SPLIT_PATTERNS["minimax-m2"] == document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]


def test_the_begin_of_sequence_stands_once(nano_path: Path, tmp_path: Path) -> None:
    data = nano_path.read_bytes()
    flag = b"tokenizer.ggml.add_bos_token" + (7).to_bytes(4, "little")
    assert data.count(flag + b"\0") == 1
    path = tmp_path / "bos.gguf"
    path.write_bytes(data.replace(flag + b"\0", flag + b"\1"))
    with Engine(path, n_ctx=64) as engine:
        bos, plain = engine.tokenizer.bos_id, engine.tokenize("import os", add_bos=False)
        assert engine.tokenize("import os") == [bos, *plain]
        assert engine.tokenize(f"{engine.detokenize([bos], special=True)}import os") == [bos, *plain]
        prompt = engine.generate("import os", max_tokens=1).stats.prompt_tokens
        engine.chat_template = ChatTemplate("{{ messages[0].content }}")  # it writes the prompt, this token or none
        chat = engine.chat([{"role": "user", "content": "import os"}], max_tokens=1).stats.prompt_tokens
    assert (prompt, chat) == (len(plain) + 1, len(plain))


def test_special_tokens_are_hidden(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a[e~[b")
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, special=True) == "a[e~[b"


def test_padding_ids_are_silent(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([1000, 1023, 5000]) == ""


def test_the_end_of_sequence_is_the_generation_configs(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_ids == (963,)


@pytest.mark.parametrize("depth", [0, 15])
def test_any_of_several_ends_of_sequence_ends_an_answer(
    depth: int, nano_path: Path, nano_drafter_path: Path, prompts: list[Ids]
) -> None:
    with Engine(nano_path, nano_drafter_path, n_ctx=256) as engine:
        tokens = engine.generate(prompts[0], max_tokens=30, ignore_eos=True).tokens
        end = next(t for t in tokens[3:] if t != engine.tokenizer.eos_ids[0])
        engine.tokenizer.eos_ids = (*engine.tokenizer.eos_ids, end)
        g = engine.generate(prompts[0], max_tokens=30, depth=depth)
    assert g.tokens == tokens[: tokens.index(end) + 1]
    assert g.finish_reason == "stop"


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What a matcher must answer, found in the whole text: the earliest place, there the longest."""
    found = [(text.index(s), -len(s), s) for s in stops if s in text]
    if not found:
        return text, None
    at, _, stop = min(found)
    return text[:at], stop


@settings(max_examples=300)
@given(
    st.lists(st.text("abc", max_size=5), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_across_pieces(pieces: list[str], stops: list[str]) -> None:
    matcher, shown = StopMatcher(stops), ""
    whole = "".join(pieces)
    for piece in pieces:
        shown += matcher.push(piece)
        assert whole.startswith(shown)
    shown += matcher.flush()
    # Piece by piece, a shorter stop string may be complete before a longer one that began earlier.
    assert (matcher.matched is None) == (first_stop(whole, stops)[1] is None)
    if matcher.matched is None:
        assert shown == whole
    else:
        assert whole.startswith(shown + matcher.matched)
        assert not any(s in shown for s in stops)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_in_one_piece(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = matcher.push(text) + matcher.flush()
    assert (shown, matcher.matched) == first_stop(text, stops)


def test_only_a_possible_beginning_is_held_back() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.push("hello <") == "hello "
    assert matcher.push("/en") == ""
    assert matcher.push("x") == "</enx"
    assert matcher.push("</end> more") == ""
    assert matcher.matched == "</end>"
    assert matcher.push("even more") == ""


@pytest.mark.parametrize("depth", [0, 15])
def test_pieces_of_an_answer(depth: int, engine: Engine, prompts: list[Ids]) -> None:
    stream = engine.stream(prompts[0], max_tokens=60, depth=depth, temperature=1.5, seed=3, ignore_eos=True)
    pieces = list(stream)
    g = stream.result
    assert "".join(p.text for p in pieces) == g.text == engine.detokenize(g.tokens)
    assert [t for p in pieces for t in p.tokens] == g.tokens
    assert g.stats.generated_tokens == len(g.tokens) == 60
    assert next(stream, None) is None


def test_a_character_in_several_tokens(engine: Engine) -> None:
    ids = engine.tokenize("日本🙂")
    assert len(ids) > 3
    forced = iter([*ids, *ids])

    def hook(tokens: Any, row: Any) -> None:
        row[next(forced)] = 1e9

    stream = engine.stream("x", max_tokens=len(ids), logits_hook=hook, depth=0)
    texts = [p.text for p in stream]
    assert "".join(texts) == "日本🙂"
    assert not any("\ufffd" in t for t in texts)
    g = engine.generate("x", max_tokens=len(ids) - 1, logits_hook=hook, depth=0)
    assert g.text == "日本\ufffd", "what never became a character is shown at the end"


def test_files_without_a_usable_tokenizer(tmp_path: Path) -> None:
    def make(name: str, fill: Callable[[gguf.GGUFWriter], None]) -> _core.Gguf:
        w = gguf.GGUFWriter(tmp_path / name, "minimax-m2")
        fill(w)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        return _core.Gguf(str(tmp_path / name))

    with pytest.raises(DFlashError, match=r"none\.gguf.*tokenizer\.ggml\.model"):
        Tokenizer(make("none.gguf", lambda w: None))
    with pytest.raises(DFlashError, match=r"json\.gguf.*tokenizer\.huggingface\.json"):
        Tokenizer(make("json.gguf", lambda w: w.add_string("tokenizer.huggingface.json", "{}")))

    def other_pre(w: gguf.GGUFWriter) -> None:
        w.add_string("tokenizer.ggml.model", "gpt2")
        w.add_string("tokenizer.ggml.pre", "unheard-of")

    with pytest.raises(DFlashError, match=r"pre\.gguf.*minimax-m2.*unheard-of"):
        Tokenizer(make("pre.gguf", other_pre))
