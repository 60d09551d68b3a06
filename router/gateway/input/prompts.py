"""The check of a request's input: a text, token ids or messages in, token ids out."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import countOf
from typing import Any, TypeVar, cast

import numpy as np

from cluster.errors import InvalidRequestError
from router.gateway.input import checks
from router.gateway.input.chat_request import CheckedChat
from router.gateway.input.models import GatewayModel
from router.gateway.input.request.parts import AssistantMessage, Message, ToolMessage
from router.gateway.input.tokenizer import Tokenizer
from router.gateway.input.tools.messages import template_calls

_SLOW = ("response_format", "structured_outputs", "tools", "routed_experts")
Checked = TypeVar("Checked")


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
    chat: CheckedChat | None,
    model: GatewayModel,
    least_new: int = 1,
) -> Prompt:
    """Check an input, and tokenise it where it is no ids.

    With ``chat`` it is a list of messages, already read, which the chat template renders.

    Raises :class:`InvalidRequestError` for the field ``where``, also for an input that leaves no
    room for ``least_new`` new tokens.
    """
    context = model.info.max_model_len
    given_text: str | None = None
    if chat is not None:
        messages = template_messages(cast("Sequence[Message]", prompt), where)
        prompt = model.tokenizer.chat_prompt(messages, True, chat.tools, chat.options)
    if isinstance(prompt, str):
        given_text = text = checks.text(prompt, where)
        if not text:
            raise InvalidRequestError("is empty; at least one token is needed", where)
        check_length(text, where, model)
        ids = tuple(model.tokenizer.encode(text, chat is None, where))
        if max(ids, default=0) >= model.info.vocab_size:  # the tokenizer is of another model
            raise InvalidRequestError(
                f"tokenizes to id {max(ids)}, but the model has {model.info.vocab_size} tokens",
                where,
            )
    else:
        ids = check_ids(prompt, model.info.vocab_size, where)
    if not ids:
        raise InvalidRequestError("is empty; at least one token is needed", where)
    if len(ids) + least_new > context:
        room = " must leave room for a new one" if least_new else " holds no more"
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
        raise InvalidRequestError(checks.wrong(prompt, "a string or a list of token ids"), where)
    if not _are_ids(prompt, vocab_size):
        for place, token_id in enumerate(prompt):
            path = f"{where}[{place}]"
            if isinstance(token_id, str):
                raise InvalidRequestError("must be a token id; got a string", path)
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


def template_messages(given: Sequence[Message], where: str) -> list[dict[str, Any]]:
    """Return the messages for a chat template, ``{"role": …, "content": …}`` each.

    Parts of a content are joined. An assistant's message may have ``tool_calls`` and
    ``reasoning_content``, and no content beside calls; a message of a tool has ``tool_call_id``,
    and the name of the function where an earlier message has the call. Raises
    :class:`InvalidRequestError` for a message without a content that it needs.
    """
    messages = [_message(message, f"{where}[{place}]") for place, message in enumerate(given)]
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
        if message["role"] == "tool" and message["tool_call_id"] in names:
            message["name"] = names[message["tool_call_id"]]
    return messages


def is_slow(given: Mapping[str, object]) -> bool:
    """Return whether the check of a body may take long: it has schemas, or thousands of parts."""
    messages = given.get("messages")
    has_calls = isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("tool_calls") for message in messages
    )
    return has_calls or any(given.get(name) is not None for name in _SLOW)


async def checked(is_slow: bool, check: Callable[[], Checked]) -> Checked:
    """Return what a check returns; a slow one runs beside the event loop."""
    return await asyncio.to_thread(check) if is_slow else check()


def _message(message: Message, where: str) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    # Templates do not know OpenAI's newer name of a system message.
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": content}
    if isinstance(message, AssistantMessage):
        if message.tool_calls is not None:
            found["tool_calls"] = template_calls(message.tool_calls)
        elif content is None:
            raise InvalidRequestError("is missing; needed without tool_calls", f"{where}.content")
        if message.reasoning_content is not None:
            found["reasoning_content"] = message.reasoning_content
    if isinstance(message, ToolMessage):
        found["tool_call_id"] = message.tool_call_id
    return found
