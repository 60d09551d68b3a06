"""What a chat template can show: tools, calls, and the options that it reads."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from cluster.errors import InvalidRequestError

MAX_NAMES = 128
"""The most functions that a conversation has calls of; a prompt is searched for each."""
Message = dict[str, Any]
_UNREAD = "is allowed only if the model's chat template reads it"
_RESERVED = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
        "chat_template", "conversation", "tokenize", "padding", "truncation", "max_length",
        "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
        "sanitize_control_tokens",
        "raise_exception", "strftime_now", "namespace", "range", "dict", "loop",
    }
)  # fmt: skip
"""Names in templates that are no options of a client."""
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""transformers' marks of what an assistant writes, which Jinja does not know."""
_PROBE_ID = "probe0001"  # of Mistral's form
_PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
    },
}
_PROBE: list[Message] = [
    {"role": "user", "content": "probe"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": _PROBE_ID,
                "type": "function",
                "function": {"name": "probe_call", "arguments": {"probe_key": "probe_value"}},
            }
        ],
    },
    {"role": "tool", "content": "probe_result", "tool_call_id": _PROBE_ID, "name": "probe_call"},
]
Render = Callable[[list[Message], bool, "list[dict[str, Any]] | None", Mapping[str, Any]], str]
"""Renders messages; whether the assistant's next message is opened, tools, and options."""
Shape = Callable[[Sequence[Message]], list[Message]]


def _names_of_calls(messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the names of the functions that messages call, each with the first place of it."""
    return {
        call["function"]["name"]: f"messages[{place}].tool_calls[{number}]"
        for place, message in reversed(list(enumerate(messages)))
        for number, call in reversed(list(enumerate(message.get("tool_calls", ()))))
    }


def _shaped(
    messages: Sequence[Message], has_texts: bool, empty: Literal["", "absent"] | None
) -> list[Message]:
    """Return messages with calls as a template wants them.

    With ``has_texts`` the calls' arguments are JSON texts. Content that is missing beside calls is
    ``empty``.
    """
    found = []
    for given in messages:
        message = given
        if "tool_calls" in given:
            calls = [_with_text(call) if has_texts else call for call in message["tool_calls"]]
            message = {**message, "tool_calls": calls, "content": message["content"] or empty}
            if empty == "absent" and not given["content"]:
                del message["content"]
        found.append(message)
    return found


def _with_text(call: Message) -> Message:
    function = call["function"]
    if isinstance(function["arguments"], str):
        return call
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


class ChatTemplate:
    """A model's chat template. It is found out once, by rendering, how it wants calls."""

    def __init__(self, source: str, render: Render) -> None:
        """``render`` raises :class:`InvalidRequestError` where the template refuses messages."""
        self.source = source
        self._render = render
        self._names = _names_in(source)

    @functools.cached_property
    def shows_tools(self) -> bool:
        """Whether the prompt shows tools."""
        if "tools" not in self._names:
            return False
        return "probe_tool" in self._tried(_PROBE[:1], [_PROBE_TOOL])

    @functools.cached_property
    def _shape(self) -> Shape | None:
        """How messages with calls are to be given, ``None`` where the template shows no calls."""
        tools = [_PROBE_TOOL] if self.shows_tools else None
        for shape in _SHAPES:
            text = self._tried(shape(_PROBE), tools)
            has_key = any(part in text for part in ('"probe_key"', "<parameter=probe_key>"))
            if has_key and "probe_call" in text and "probe_result" in text:
                return shape
        return None

    def prompt(
        self,
        messages: Sequence[Message],
        is_opened: bool = True,
        tools: list[dict[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt of checked messages.

        ``is_opened`` adds the beginning of the assistant's next message. Raises
        :class:`InvalidRequestError` where the template refuses messages, or does not show calls.
        """
        ready = list(messages)
        places = [i for i, m in enumerate(ready) if "tool_calls" in m or m["role"] == "tool"]
        if not places:
            return self._render(ready, is_opened, tools, options or {})
        if self._shape is None:
            reason = "this model's chat template does not support tool calls and results"
            raise InvalidRequestError(reason, f"messages[{places[0]}]")
        names = _names_of_calls(ready)
        if len(names) > MAX_NAMES:
            reason = f"call {len(names)} functions; at most {MAX_NAMES}"
            raise InvalidRequestError(reason, "messages")
        text = self._render(self._shape(ready), is_opened, tools, options or {})
        for name, where in names.items():
            if name not in text:
                raise InvalidRequestError("is dropped by this model's chat template", where)
        return text

    def check_options(self, given: Mapping[str, Any], effort: str | None = None) -> dict[str, Any]:
        """Return the options of a client's ``chat_template_kwargs`` and ``reasoning_effort``.

        Raises :class:`InvalidRequestError` for an option that the template does not read.
        """
        if effort is not None and "reasoning_effort" not in self._names:
            raise InvalidRequestError(_UNREAD, "reasoning_effort")
        for name in given:
            if name in _RESERVED or name.endswith("_token") or name not in self._names:
                raise InvalidRequestError(_UNREAD, f"chat_template_kwargs.{name[:64]}")
        return {**({} if effort is None else {"reasoning_effort": effort}), **given}

    def _tried(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
        """Return a prompt, empty where the template refuses it."""
        try:
            return self._render(messages, True, tools, {})
        except InvalidRequestError:
            return ""


_SHAPES: tuple[Shape, ...] = tuple(
    functools.partial(_shaped, has_texts=has_texts, empty=empty)
    for has_texts in (False, True)
    for empty in ("", "absent", None)
)
"""How templates want messages with calls, most of them the first."""


def _names_in(source: str) -> frozenset[str]:
    """Return the names that a template reads of what it is given: no variables of its own."""
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.meta import find_undeclared_variables

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    plain = _GENERATION.sub("", source)
    try:
        return frozenset(find_undeclared_variables(environment.parse(plain)))
    except TemplateSyntaxError:
        return frozenset()
