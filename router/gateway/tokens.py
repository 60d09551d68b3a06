"""Text to token ids and back, by a served model's own tokenizer; for HTTP and gRPC alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import InvalidRequestError
from router.gateway import checks
from router.gateway.chat_request import check_chat
from router.gateway.models import GatewayModel
from router.gateway.prompts import check_ids, check_length, check_messages
from router.gateway.validate import Validator


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text, and the context of the model."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    max_model_len: int


def tokenize(
    validator: Validator,
    model_id: object,
    prompt: object = None,
    messages: object = None,
    add_special_tokens: object = None,
    add_generation_prompt: object = None,
    chat: Mapping[str, object] | None = None,
) -> Tokens:
    """Return the tokens of a prompt, or of messages as the model's chat template renders them.

    ``add_special_tokens`` is by default true for a prompt and false for messages, whose template
    has them; ``add_generation_prompt`` is for messages and by default true. ``chat`` are fields of
    a chat request that change its prompt, tools and options of the template, and are checked as
    those are. There may be more tokens than the context has, but no longer text than a context of
    the longest tokens. Raises :class:`InvalidRequestError` and :class:`UnknownModelError`.
    """
    model = validator.model(model_id)
    if (prompt is None) == (messages is None):
        raise InvalidRequestError("give either a prompt or messages", "prompt")
    text, where = prompt, "prompt"
    if messages is not None:
        where = "messages"
        is_opened = _flag(add_generation_prompt, True, "add_generation_prompt")
        asked = check_chat(chat or {}, {}, model)
        checked_messages = check_messages(messages, where)
        text = model.tokenizer.chat_prompt(checked_messages, is_opened, asked.tools, asked.options)
    else:
        of_messages = {"add_generation_prompt": add_generation_prompt, **(chat or {})}
        for name, value in of_messages.items():
            if value is not None:
                raise InvalidRequestError("is allowed only with messages", name)
    checked = checks.text(text, where)
    check_length(checked, where, model)
    is_special = _flag(add_special_tokens, messages is None, "add_special_tokens")
    ids = tuple(model.tokenizer.encode(checked, is_special, where))
    texts = tuple(map(model.tokenizer.token_text, ids))
    return Tokens(ids, texts, model.info.max_model_len)


def detokenize(
    validator: Validator, model_id: object, token_ids: object, where: str = "tokens"
) -> str:
    """Return the text of tokens, special ones by their names.

    There may be no more tokens than the context has. Raises :class:`InvalidRequestError` for the
    field ``where``, and :class:`UnknownModelError`.
    """
    model = validator.model(model_id)
    ids = check_ids(token_ids, model.info.vocab_size, where)
    _check_number(len(ids), model, where)
    return model.tokenizer.whole_text(ids)


def _check_number(number: int, model: GatewayModel, where: str) -> None:
    if number > model.info.max_model_len:
        raise InvalidRequestError(
            f"has {number} tokens; at most the context of {model.info.max_model_len}", where
        )


def _flag(value: object, default: bool, where: str) -> bool:
    return default if value is None else checks.boolean(value, where)
