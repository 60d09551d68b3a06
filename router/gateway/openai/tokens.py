"""vLLM's ``/tokenize`` and ``/detokenize``: bodies in, answers out."""

from __future__ import annotations

from typing import Any

from router.gateway import checks, tokens
from router.gateway.openai.fields import Fields, known_fields
from router.gateway.validate import Validator

_OF_CHAT = ("tools", "chat_template_kwargs")
TOKENIZE = Fields(
    frozenset(
        {
            "model", "prompt", "messages", "add_special_tokens", "add_generation_prompt",
            "return_token_strs", *_OF_CHAT,
        }
    ),
    {
        "chat_template": (), "continue_final_message": (False,), "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
    },
)  # fmt: skip
DETOKENIZE = Fields(frozenset({"model", "tokens"}), {})


def tokenize(body: dict[str, Any], validator: Validator) -> dict[str, Any]:
    """Answer ``/tokenize``; see :func:`router.gateway.tokens.tokenize`."""
    given = known_fields(body, TOKENIZE)
    has_texts = checks.boolean(given.pop("return_token_strs", False), "return_token_strs")
    chat = {name: given.pop(name) for name in _OF_CHAT if name in given}
    found = tokens.tokenize(validator, given.pop("model", ""), **given, chat=chat)
    return {
        "count": len(found.token_ids),
        "max_model_len": found.max_model_len,
        "tokens": list(found.token_ids),
        "token_strs": list(found.texts) if has_texts else None,
    }


def detokenize(body: dict[str, Any], validator: Validator) -> dict[str, Any]:
    """Answer ``/detokenize``; see :func:`router.gateway.tokens.detokenize`."""
    given = known_fields(body, DETOKENIZE)
    return {
        "prompt": tokens.detokenize(validator, given.get("model", ""), given.get("tokens")),
    }
