"""Chat templates and messages. Catches unescaped JSON, unsafe templates, and malformed conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dflash_cpp import DFlashError, Engine, _core
from dflash_cpp.chat import ChatTemplate, check_messages, parse_reply
from dflash_cpp.tokenizer import Tokenizer

USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def tokenizer(nano_path: Path) -> Tokenizer:
    return Tokenizer(_core.Gguf(str(nano_path)))


@pytest.fixture(scope="module")
def template(nano_path: Path, tokenizer: Tokenizer) -> ChatTemplate:
    found = ChatTemplate.from_gguf(_core.Gguf(str(nano_path)), tokenizer)
    assert found is not None
    return found


def test_the_files_template(template: ChatTemplate) -> None:
    text = template.render([{"role": "system", "content": "be brief"}, USER])
    assert text == "]~!b[]~b]system\nbe brief[e~[\n]~b]user\nhello[e~[\n]~b]ai\n<think>\n"
    assert template.render([USER], add_generation_prompt=False) == "]~!b[]~b]user\nhello[e~[\n"


def test_a_whole_conversation(template: ChatTemplate) -> None:
    text = template.render(
        [USER, {"role": "assistant", "content": "hi", "reasoning_content": "greet"}, {"role": "tool", "content": "42"}]
    )
    assert "]~b]ai\n<think>\ngreet\n</think>\n\nhi[e~[\n" in text
    assert "]~b]tool\n<response>42</response>[e~[\n" in text


BAD_MESSAGES = [
    ([], "messages: .*at least one"),
    ("hello", "messages: .*list.*str"),
    ({"role": "user"}, "messages: .*list"),
    (["hello"], r"messages\[0\].*mapping.*str"),
    ([USER, {"content": "x"}], r"messages\[1\].*role.*None"),
    ([{"role": "robot", "content": "x"}], r"messages\[0\].*role.*assistant.*'robot'"),
    ([{"role": "user"}], r"messages\[0\].*content.*none"),
    ([{"role": "user", "content": 3}], r"messages\[0\].*content.*3"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].*content.*text parts"),
    ([{"role": "assistant", "content": "", "tool_calls": "f()"}], r"messages\[0\].*tool_calls.*str"),
    ([{"role": "assistant", "tool_calls": [{"function": {}}]}], r"messages\[0\].*tool_calls.*name"),
    (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        r"messages\[0\].*arguments.*JSON",
    ),
]


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES, ids=lambda v: str(v)[:40])
def test_malformed_messages(messages: Any, message: str, template: ChatTemplate) -> None:
    with pytest.raises(DFlashError, match=message):
        template.render(messages)


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check_messages([{"role": "user", "content": parts}])[0]["content"] == "ab"


def test_arguments_of_tool_calls_become_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, 2]}'}}
    original = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    checked = check_messages(original)
    assert checked[0]["tool_calls"][0]["function"]["arguments"] == {"x": [1, 2]}
    assert checked[0]["content"] == ""
    assert call["function"]["arguments"] == '{"x": [1, 2]}', "the caller's messages stay as they were"


def test_tools_reach_the_template() -> None:
    template = ChatTemplate("{% for t in tools %}{{ t | tojson }}{% endfor %}")
    assert template.render([USER], tools=[{"name": "f", "text": "<é>"}]) == '{"name": "f", "text": "<é>"}'
    with pytest.raises(DFlashError, match="tools"):
        template.render([USER], tools={"name": "f"})  # type: ignore[arg-type]


def test_what_templates_may_call() -> None:
    assert ChatTemplate("{{ bos_token }}{{ strftime_now('%Y') | length }}", bos_token="<s>").render([USER]) == "<s>4"
    assert ChatTemplate("{% for m in messages %}{% break %}{% endfor %}x").render([USER]) == "x"
    with pytest.raises(DFlashError, match="chat template: no such role"):
        ChatTemplate("{{ raise_exception('no such role') }}").render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ undefined_thing.attribute }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ range(10 ** 9) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_templates_are_confined(source: str) -> None:
    try:
        text = ChatTemplate(source).render([USER])
    except DFlashError:
        return
    assert "class" not in text


def test_templates_that_do_not_parse() -> None:
    template = ChatTemplate("{% if %}")  # the model can still continue texts
    with pytest.raises(DFlashError, match="chat template"):
        template.render([USER])


def test_replies(tokenizer: Tokenizer) -> None:
    prompt = "...]~b]ai\n<think>\n"
    ids = tokenizer.encode("I think\n</think>\n\nYes.[e~[")
    assert parse_reply(tokenizer, prompt, ids, None) == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "I think",
    }
    unfinished = parse_reply(tokenizer, prompt, tokenizer.encode("I am"), None)
    assert (unfinished["content"], unfinished["reasoning_content"]) == ("", "I am")
    assert parse_reply(tokenizer, "user: hi\n", tokenizer.encode("Yes."), None) == {
        "role": "assistant",
        "content": "Yes.",
    }
    assert parse_reply(tokenizer, "", tokenizer.encode("Yes. STOP"), " STOP")["content"] == "Yes."
    assert parse_reply(tokenizer, "", tokenizer.encode("Yes...."), ".")["content"] == "Yes", "the first one ended it"
    stopped = parse_reply(tokenizer, prompt, tokenizer.encode("I am. No"), ".")
    assert (stopped["content"], stopped["reasoning_content"]) == ("", "I am")


def test_chat_equals_its_rendered_prompt(engine: Engine, template: ChatTemplate) -> None:
    a = engine.chat([USER], max_tokens=12)
    b = engine.generate(template.render([USER]), max_tokens=12)
    assert a.tokens == b.tokens
    assert b.message is None
    assert a.message is not None
    assert a.message["role"] == "assistant"
