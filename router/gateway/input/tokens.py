"""The token ids of a request: of its prompt, its messages, and its rules for single tokens.

``/tokenize`` and ``/detokenize`` are here too, for HTTP and gRPC alike.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import countOf
from typing import Any, cast

import numpy as np

from cluster.errors import InvalidRequestError
from router.gateway.input.chat_request import CheckedChat, check_chat
from router.gateway.input.request import base
from router.gateway.input.request.model import Generation, TokenizeRequest
from router.gateway.input.request.parts import AssistantMessage, Message, ToolMessage
from router.gateway.input.tokenizer import GatewayModel, Tokenizer
from router.messages.rules import NO_RULES, TokenRules

RULE_FIELDS = frozenset(field.name for field in fields(TokenRules))


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
        prompt = model.tokenizer.template.prompt(messages, True, chat.tools, chat.options)
    if isinstance(prompt, str):
        given_text = text = base.text(prompt, where)
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
        raise InvalidRequestError(base.wrong(prompt, "a string or a list of token ids"), where)
    if not _are_ids(prompt, vocab_size):
        for place, token_id in enumerate(prompt):
            path = f"{where}[{place}]"
            if isinstance(token_id, str):
                raise InvalidRequestError("must be a token id; got a string", path)
            base.integer(token_id, path, 0, vocab_size - 1)
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


def _message(message: Message, where: str) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    # Templates do not know OpenAI's newer name of a system message.
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": content}
    if isinstance(message, AssistantMessage):
        if message.tool_calls is not None:
            found["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call.function.arguments),
                    },
                }
                for call in message.tool_calls
            ]
        elif content is None:
            raise InvalidRequestError("is missing; needed without tool_calls", f"{where}.content")
        if message.reasoning_content is not None:
            found["reasoning_content"] = message.reasoning_content
    if isinstance(message, ToolMessage):
        found["tool_call_id"] = message.tool_call_id
    return found


def _arguments(text: str) -> object:
    """Return a call's arguments as templates take them: the object of a JSON text, or the text."""
    try:
        value = json.loads(text or "{}")
        json.dumps(value)  # some templates want it as a text again
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def tokenize(model: GatewayModel, asked: TokenizeRequest) -> tuple[int, ...]:
    """Return the tokens of a prompt, or of messages as the model's chat template renders them.

    ``add_special_tokens`` is by default true for a prompt and false for messages, whose template
    has them; ``add_generation_prompt`` is for messages and by default true. There may be more
    tokens than the context has, but no longer text than a context of the longest tokens. Raises
    :class:`InvalidRequestError`.
    """
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequestError("give either a prompt or messages", "prompt")
    text, where = asked.prompt or "", "prompt"
    if asked.messages is not None:
        where = "messages"
        chat = check_chat(asked, model)
        messages = template_messages(asked.messages, where)
        is_opened = asked.add_generation_prompt is not False
        text = model.tokenizer.template.prompt(messages, is_opened, chat.tools, chat.options)
    else:
        for name in ("add_generation_prompt", "tools", "chat_template_kwargs"):
            if getattr(asked, name) is not None:
                raise InvalidRequestError("is allowed only with messages", name)
    check_length(base.text(text, where), where, model)
    is_special = asked.add_special_tokens
    if is_special is None:
        is_special = asked.messages is None
    return tuple(model.tokenizer.encode(text, is_special, where))


def detokenize(model: GatewayModel, token_ids: object, where: str = "tokens") -> str:
    """Return the text of tokens, special ones by their names.

    There may be no more tokens than the context has. Raises :class:`InvalidRequestError` for the
    field ``where``.
    """
    ids = check_ids(token_ids, model.info.vocab_size, where)
    if len(ids) > model.info.max_model_len:
        raise InvalidRequestError(
            f"has {len(ids)} tokens; the context holds {model.info.max_model_len}", where
        )
    return model.tokenizer.whole_text(ids)


def check_rules(asked: Generation, model: GatewayModel, max_tokens: int) -> TokenRules | None:
    """Return the rules that a client asks for, ``None`` where they change nothing.

    Raises :class:`InvalidRequestError`.
    """
    if RULE_FIELDS.isdisjoint(asked.model_fields_set):
        return None
    vocab_size = model.info.vocab_size
    if asked.min_tokens > max_tokens:
        allowed = f"an integer from 0 to {max_tokens}"
        raise InvalidRequestError(base.wrong(asked.min_tokens, allowed), "min_tokens")
    biases = asked.logit_bias or {}
    for token_id in biases:
        base.integer(token_id, "logit_bias", 0, vocab_size - 1)
    stop_ids = check_ids(asked.stop_token_ids or (), vocab_size, "stop_token_ids")
    own = {
        "logit_bias": tuple(sorted((token_id, by) for token_id, by in biases.items() if by)),
        "stop_token_ids": tuple(sorted(set(stop_ids))),
        "bad_words": _check_bad_words(asked.bad_words or (), model),
    }
    rules = TokenRules(**(asked.shared(TokenRules) | own))
    _check_room(rules, model)
    return None if rules == NO_RULES else rules


def _check_bad_words(words: Sequence[str], model: GatewayModel) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each word, as it is within a word and after a space."""
    found: dict[tuple[int, ...], None] = {}
    for place, word in enumerate(words):
        path = f"bad_words[{place}]"
        bare = word.strip()
        if not bare:
            raise InvalidRequestError(base.wrong(word, "a word, not only white space"), path)
        for text in (bare, f" {bare}"):
            ids = tuple(model.tokenizer.encode(text, add_special_tokens=False, where=path))
            if not ids or max(ids) >= model.info.vocab_size:
                raise InvalidRequestError("does not encode to tokens of this model", path)
            found[ids] = None
    return tuple(found)


def _check_room(rules: TokenRules, model: GatewayModel) -> None:
    """Refuse rules that could forbid every token of the vocabulary at one place."""
    forbidden = {word[-1] for word in rules.bad_words}
    if rules.min_tokens:
        forbidden |= {*rules.stop_token_ids, *model.info.eos_token_ids}
    if len(forbidden) >= model.info.vocab_size:
        raise InvalidRequestError("could forbid every token in the vocabulary", "bad_words")
