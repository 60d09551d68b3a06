"""Text to token ids and back, by a served model's own tokenizer; for HTTP and gRPC alike."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import InvalidRequestError
from router.gateway.input import checks
from router.gateway.input.chat_request import check_chat
from router.gateway.input.prompts import check_ids, check_length, template_messages
from router.gateway.input.request.model import TokenizeRequest
from router.gateway.input.validate import Validator


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text, and the context of the model."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    max_model_len: int


def tokenize(validator: Validator, asked: TokenizeRequest) -> Tokens:
    """Return the tokens of a prompt, or of messages as the model's chat template renders them.

    ``add_special_tokens`` is by default true for a prompt and false for messages, whose template
    has them; ``add_generation_prompt`` is for messages and by default true. There may be more
    tokens than the context has, but no longer text than a context of the longest tokens. Raises
    :class:`InvalidRequestError` and :class:`UnknownModelError`.
    """
    model = validator.model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequestError("give either a prompt or messages", "prompt")
    text, where = asked.prompt or "", "prompt"
    if asked.messages is not None:
        where = "messages"
        chat = check_chat(asked, model)
        messages = template_messages(asked.messages, where)
        is_opened = asked.add_generation_prompt is not False
        text = model.tokenizer.chat_prompt(messages, is_opened, chat.tools, chat.options)
    else:
        for name in ("add_generation_prompt", "tools", "chat_template_kwargs"):
            if getattr(asked, name) is not None:
                raise InvalidRequestError("is allowed only with messages", name)
    checked = checks.text(text, where)
    check_length(checked, where, model)
    is_special = asked.add_special_tokens
    if is_special is None:
        is_special = asked.messages is None
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
    if len(ids) > model.info.max_model_len:
        raise InvalidRequestError(
            f"has {len(ids)} tokens; the context holds {model.info.max_model_len}", where
        )
    return model.tokenizer.whole_text(ids)
