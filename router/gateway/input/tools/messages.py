"""A message's tool calls as templates take them, and what templates show of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from router.gateway.input.request.parts import Call

MAX_NAMES = 128
"""The most functions that a conversation has calls of; a prompt is searched for each."""
Message = dict[str, Any]


def template_calls(given: Sequence[Call]) -> list[Message]:
    """Return an assistant's tool calls as chat templates take them: arguments as a mapping.

    Arguments are a JSON text; one that is no object stays a text.
    """
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {
                "name": call.function.name,
                "arguments": _arguments(call.function.arguments),
            },
        }
        for call in given
    ]


def _arguments(text: str) -> object:
    try:
        value = json.loads(text or "{}")
        json.dumps(value)  # some templates want it as a text again
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def names_of_calls(messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the names of the functions that messages call, each with the first place of it."""
    return {
        call["function"]["name"]: f"messages[{place}].tool_calls[{number}]"
        for place, message in reversed(list(enumerate(messages)))
        for number, call in reversed(list(enumerate(message.get("tool_calls", ()))))
    }


def shaped(
    messages: Sequence[Message], has_texts: bool, empty: Literal["", "absent"] | None
) -> list[Message]:
    """Return messages with calls as a template wants them.

    With ``has_texts`` the calls' arguments are JSON texts. Content that is missing beside calls is
    ``empty``.
    """
    return [
        _shaped(message, has_texts, empty) if "tool_calls" in message else message
        for message in messages
    ]


def _shaped(message: Message, has_texts: bool, empty: str | None) -> Message:
    calls = [_with_text(call) if has_texts else call for call in message["tool_calls"]]
    changed = {**message, "tool_calls": calls}
    if message["content"]:
        return changed
    del changed["content"]
    return changed if empty == "absent" else {**changed, "content": empty}


def _with_text(call: Message) -> Message:
    function = call["function"]
    if isinstance(function["arguments"], str):
        return call
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
