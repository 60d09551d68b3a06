"""The check of a message's tool calls, and of what templates show of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from cluster.errors import InvalidRequestError
from router.gateway import checks
from router.gateway.tools.definitions import check_kind, check_name, check_names, mapping

MAX_CALLS = 128
MAX_NAMES = 128
"""The most functions that a conversation has calls of; a prompt is searched for each."""
MAX_ID_CHARS = 256
Message = dict[str, Any]


def check_calls(given: object, where: str) -> list[Message]:
    """Return an assistant's tool calls as chat templates take them: arguments as a mapping.

    Arguments are a JSON text; one that is no object stays a text. Raises
    :class:`InvalidRequestError` with the place of the part at fault.
    """
    if not isinstance(given, list) or not 0 < len(given) <= MAX_CALLS:
        raise InvalidRequestError(
            checks.wrong_kind(given, f"a list of 1 to {MAX_CALLS} tool calls"), where
        )
    return [_call(entry, f"{where}[{place}]") for place, entry in enumerate(given)]


def _call(entry: object, where: str) -> Message:
    call = mapping(entry, where)
    call = {name: value for name, value in call.items() if value is not None}
    # Clients send the index of a streamed call back with it.
    check_names(call, ("id", "type", "function", "index"), where)
    check_kind(call.get("type", "function"), f"{where}.type")
    function = mapping(call.get("function"), f"{where}.function")
    # OpenAI's own client sends back what it has made of the arguments.
    check_names(function, ("name", "arguments", "parsed_arguments"), f"{where}.function")
    name = check_name(function.get("name"), f"{where}.function.name")
    text = checks.text(function.get("arguments", ""), f"{where}.function.arguments")
    return {
        "id": check_id(call.get("id"), f"{where}.id"),
        "type": "function",
        "function": {"name": name, "arguments": _arguments(text)},
    }


def check_id(value: object, where: str) -> str:
    """Return the id of a tool call."""
    text = checks.text(value, where)
    if not 1 <= len(text) <= MAX_ID_CHARS:
        raise InvalidRequestError(
            checks.wrong(text, f"a text of 1 to {MAX_ID_CHARS} characters"), where
        )
    return text


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


def with_texts(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose calls' arguments are JSON texts."""
    return [
        message
        if "tool_calls" not in message
        else {
            **message,
            "tool_calls": [
                {**call, "function": {**call["function"], "arguments": _text(call)}}
                for call in message["tool_calls"]
            ],
        }
        for message in messages
    ]


class Empty(Enum):
    """What stands for the content beside calls where there is none."""

    TEXT = ""
    ABSENT = "absent"
    NONE = "none"


def with_contents(messages: Sequence[Message], empty: Empty) -> list[Message]:
    """Return messages in which the missing content beside calls is as ``empty`` says."""
    return [
        _with_empty(message, empty)
        if "tool_calls" in message and not message["content"]
        else message
        for message in messages
    ]


def _with_empty(message: Message, empty: Empty) -> Message:
    rest = {name: value for name, value in message.items() if name != "content"}
    if empty is Empty.ABSENT:
        return rest
    return {**rest, "content": None if empty is Empty.NONE else ""}


def _text(call: Message) -> str:
    arguments = call["function"]["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
