"""Conversations to prompts, through the chat template that the GGUF file carries."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from . import _core
from .errors import DFlashError
from .tokenizer import Tokenizer

Message = Mapping[str, Any]

ROLES: Final = ("system", "user", "assistant", "tool")
_THINK_OPEN: Final = "<think>"
_THINK_CLOSE: Final = "</think>"


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own tojson escapes <, > and & for HTML; templates written for transformers expect plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _text_of(content: Any, where: str) -> Any:
    """Content as text; a list of {"type": "text", "text": ...} parts is joined."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        texts = [p.get("text") for p in content]
        if all(isinstance(t, str) for t in texts):
            return "".join(str(t) for t in texts)
    raise DFlashError(f"{where}: content: expected text or a list of text parts, found {content!r:.80}")


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls whose arguments are objects: the JSON text that OpenAI clients send is parsed."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise DFlashError(f"{where}: tool_calls: expected a list, found {type(calls).__name__}")
    out = []
    for call in calls:
        if not isinstance(call, Mapping):
            raise DFlashError(f"{where}: tool_calls: expected objects, found {call!r:.80}")
        new = dict(call)
        inner = new.get("function", new)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise DFlashError(f"{where}: tool_calls: expected a function with a name, found {call!r:.80}")
        function = dict(inner)
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except json.JSONDecodeError as e:
                raise DFlashError(f"{where}: tool_calls: arguments: expected JSON ({e})") from e
        if "function" in new:
            new["function"] = function
        else:
            new = function
        out.append(new)
    return out


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A checked copy of messages.

    Raises DFlashError, with the message's number, for a wrong shape, role or content.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise DFlashError(
            f"messages: expected a list of {{'role': ..., 'content': ...}}, found {type(messages).__name__}"
        )
    if not messages:
        raise DFlashError("messages: expected at least one message, found none")
    out = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise DFlashError(f"{where}: expected a mapping with role and content, found {type(message).__name__}")
        role = message.get("role")
        if role not in ROLES:
            raise DFlashError(f"{where}: role: expected one of {', '.join(ROLES)}, found {role!r}")
        new = dict(message)
        if new.get("tool_calls") is not None:
            new["tool_calls"] = _tool_calls(new["tool_calls"], where)
        new["content"] = _text_of(new.get("content"), where)
        if new["content"] is None:
            if not new.get("tool_calls"):
                raise DFlashError(f"{where}: content: expected text, found none")
            new["content"] = ""  # templates concatenate it
        out.append(new)
    return out


class ChatTemplate:
    """A jinja2 chat template in a sandbox: it can read the messages and nothing else."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    @cached_property
    def _template(self) -> jinja2.Template:
        # Parsed when first used: a model whose template does not parse can still continue texts.
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise_exception
        env.globals["strftime_now"] = _strftime_now
        return env.from_string(self.source)

    @classmethod
    def from_gguf(cls, gguf: _core.Gguf, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The file's template (tokenizer.chat_template), or None where it has none."""
        source = gguf.get("tokenizer.chat_template")
        if not isinstance(source, str) or not source:
            return None
        eos = tokenizer.token_text(tokenizer.eos_ids[0]) if tokenizer.eos_ids else None
        return cls(source, bos_token=tokenizer.token_text(tokenizer.bos_id) or "", eos_token=eos or "")

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Prompt text of a conversation.

        tools: JSON schemas, given to the template as they are.
        Raises DFlashError for malformed messages, a template that does not parse, and for what it refuses.
        """
        checked = check_messages(messages)
        if tools is not None and (
            not isinstance(tools, Sequence)
            or isinstance(tools, str)
            or not all(isinstance(tool, Mapping) for tool in tools)
        ):
            raise DFlashError(f"tools: expected a list of mappings, found {tools!r:.80}")
        try:
            return self._template.render(
                messages=checked,
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as e:
            raise DFlashError(f"chat template: {e}") from e


def parse_reply(tokenizer: Tokenizer, prompt: str, tokens: Sequence[int], stop: str | None) -> dict[str, Any]:
    """The assistant message of an answer, ready to be appended to the messages.

    Where the prompt opened a `<think>` section, what precedes its end goes to "reasoning_content".
    """
    close = tokenizer.token_id(_THINK_CLOSE)
    opened = prompt.rstrip().endswith(_THINK_OPEN)
    reasoning: str | None = None
    rest = list(tokens)
    if opened or (close is not None and close in rest):
        cut = rest.index(close) if close is not None and close in rest else len(rest)
        reasoning = tokenizer.decode(rest[:cut]).removeprefix(_THINK_OPEN).strip("\n")
        rest = rest[cut + 1 :]
    content = tokenizer.decode(rest)
    if rest and reasoning is not None:
        content = content.removeprefix(_THINK_CLOSE).lstrip("\n")
    if stop is not None:  # the last token may hold text behind the stop string
        content = content.partition(stop)[0]
        reasoning = None if reasoning is None else reasoning.partition(stop)[0]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    return message
