"""The check of a request's input: a text, token ids or messages in, token ids out."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import countOf
from typing import Any, cast

import numpy as np

from cluster.errors import InvalidRequestError
from router.gateway import checks
from router.gateway.chat_request import ChatRequest
from router.gateway.models import GatewayModel
from router.gateway.tokenizer import Tokenizer
from router.gateway.tools.messages import check_calls, check_id

ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS_OF_ROLE = {
    "assistant": ("tool_calls", "reasoning_content", "parsed"),
    "tool": ("tool_call_id",),
}
"""The fields beside role, content and name. ``parsed`` is of OpenAI's own client, and not sent."""
MAX_MESSAGES = 4096


@dataclass(frozen=True, slots=True)
class Prompt:
    """A checked input: its token ids, and its text where it was given as text or messages."""

    token_ids: tuple[int, ...]
    text: str | None

    def echo(self, tokenizer: Tokenizer) -> str:
        """Return the text to put before an answer; of token ids it is their decoding."""
        return tokenizer.decode(self.token_ids) if self.text is None else self.text


def check_prompt(
    prompt: object,
    where: str,
    chat: ChatRequest | None,
    model: GatewayModel,
    least_new: int = 1,
) -> Prompt:
    """Check an input, and tokenise it where it is no ids.

    With ``chat`` it is a list of messages, which the chat template renders.

    Raises :class:`InvalidRequestError` for the field ``where``, also for an input that leaves no
    room for ``least_new`` new tokens.
    """
    context = model.info.max_model_len
    given_text: str | None = None
    if chat is not None:
        messages = check_messages(prompt, where)
        prompt = model.tokenizer.chat_prompt(messages, True, chat.tools, chat.options)
    if isinstance(prompt, str):
        given_text = text = checks.text(prompt, where)
        if not text:
            raise InvalidRequestError("is empty; at least one token is needed", where)
        check_length(text, where, model)
        ids = tuple(model.tokenizer.encode(text, chat is None, where))
        if max(ids, default=0) >= model.info.vocab_size:  # the tokenizer is of another model
            raise InvalidRequestError(
                f"its text has token {max(ids)}, but the model has {model.info.vocab_size} tokens",
                where,
            )
    else:
        ids = check_ids(prompt, model.info.vocab_size, where)
    if not ids:
        raise InvalidRequestError("is empty; at least one token is needed", where)
    if len(ids) + least_new > context:
        room = " must leave room for a new one" if least_new else " is all that there is room for"
        raise InvalidRequestError(f"has {len(ids)} tokens; the context of {context}{room}", where)
    return Prompt(ids, given_text)


def check_length(text: str, where: str, model: GatewayModel) -> None:
    """Refuse a text that cannot fit into the context, before it takes long to tokenise."""
    context = model.info.max_model_len
    if len(text.encode()) > context * model.tokenizer.max_token_bytes:
        raise InvalidRequestError(
            f"has {len(text)} characters, more than {context} tokens can hold", where
        )


def check_ids(prompt: object, vocab_size: int, where: str) -> tuple[int, ...]:
    """Return token ids of a vocabulary; raises :class:`InvalidRequestError` for the first wrong."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes):
        raise InvalidRequestError(checks.wrong(prompt, "a text or a list of token ids"), where)
    if not _are_ids(prompt, vocab_size):
        for place, token_id in enumerate(prompt):
            path = f"{where}[{place}]"
            if isinstance(token_id, str):
                raise InvalidRequestError(checks.wrong_kind(token_id, "a token id"), path)
            checks.integer(token_id, path, 0, vocab_size - 1)
    return tuple(prompt)


def _are_ids(prompt: Sequence[object], vocab_size: int) -> bool:
    """Return whether all are ids, without a Python step for each: a prompt may have many."""
    if countOf(map(type, prompt), int) != len(prompt):
        return False
    try:
        ids = array("I", cast("Sequence[int]", prompt))
    except OverflowError:  # a number is negative, or over 32 bits
        return False
    return bool(np.frombuffer(ids, np.uintc).max(initial=0) < vocab_size)


def check_messages(given: object, where: str) -> list[dict[str, Any]]:
    """Return the messages for a chat template, ``{"role": …, "content": …}`` each.

    A content may be OpenAI's list of text parts, which are joined. An assistant's message may have
    ``tool_calls`` and ``reasoning_content``, and no content beside calls; a message of a tool has
    ``tool_call_id``, and the name of the function where an earlier message has the call. Raises
    :class:`InvalidRequestError` with the place of the message and its part.
    """
    if not isinstance(given, list) or not given:
        raise InvalidRequestError(checks.wrong_kind(given, "a list of at least one message"), where)
    if len(given) > MAX_MESSAGES:
        raise InvalidRequestError(f"has {len(given)} messages; at most {MAX_MESSAGES}", where)
    messages = [_message(message, f"{where}[{place}]") for place, message in enumerate(given)]
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
        if message["role"] == "tool" and message["tool_call_id"] in names:
            message["name"] = names[message["tool_call_id"]]
    return messages


def has_calls(given: Mapping[str, object]) -> bool:
    """Return whether a body's messages have tool calls, of which it has room for thousands."""
    messages = given.get("messages")
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("tool_calls") for message in messages
    )


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        allowed = "a mapping with role and content"
        raise InvalidRequestError(checks.wrong_kind(message, allowed), where)
    given = {name: value for name, value in message.items() if value is not None}
    role = given.get("role")
    if role not in ROLES:
        raise InvalidRequestError(checks.wrong(role, f"one of {', '.join(ROLES)}"), f"{where}.role")
    allowed_names = ("role", "content", "name", *_FIELDS_OF_ROLE.get(str(role), ()))
    unknown = [name for name in given if name not in allowed_names]
    if unknown:
        raise InvalidRequestError(
            f"is not supported; allowed: {', '.join(allowed_names)}", f"{where}.{unknown[0]}"
        )
    if "name" in given:
        checks.text(given["name"], f"{where}.name")
    # Templates do not know OpenAI's newer name of a system message.
    known_role = "system" if role == "developer" else str(role)
    checked: dict[str, Any] = {"role": known_role, "content": None}
    if "content" in given or "tool_calls" not in given:
        checked["content"] = _content(given.get("content"), f"{where}.content")
    if "tool_calls" in given:
        checked["tool_calls"] = check_calls(given["tool_calls"], f"{where}.tool_calls")
    if "reasoning_content" in given:
        inner = f"{where}.reasoning_content"
        checked["reasoning_content"] = checks.text(given["reasoning_content"], inner)
    if role == "tool":
        checked["tool_call_id"] = check_id(given.get("tool_call_id"), f"{where}.tool_call_id")
    return checked


def _content(content: object, where: str) -> str:
    if not isinstance(content, list):
        return checks.text(content, where)
    texts: list[str] = []
    for place, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) - {"type", "text"}:
            raise InvalidRequestError(
                checks.wrong_kind(part, 'a part {"type": "text", "text": …}'), f"{where}[{place}]"
            )
        texts.append(checks.text(part.get("text"), f"{where}[{place}].text"))
    return "".join(texts)
