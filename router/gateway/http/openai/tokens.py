"""vLLM's ``/tokenize`` and ``/detokenize``: bodies in, answers out."""

from __future__ import annotations

from typing import Any

from router.gateway.input import tokens
from router.gateway.input.request.model import DetokenizeRequest, TokenizeRequest
from router.gateway.input.validate import Validator


def tokenize(body: dict[str, Any], validator: Validator) -> dict[str, Any]:
    """Answer ``/tokenize``; see :func:`router.gateway.input.tokens.tokenize`."""
    asked = validator.read(TokenizeRequest, body)
    found = tokens.tokenize(validator, asked)
    return {
        "count": len(found.token_ids),
        "max_model_len": found.max_model_len,
        "tokens": list(found.token_ids),
        "token_strs": list(found.texts) if asked.return_token_strs else None,
    }


def detokenize(body: dict[str, Any], validator: Validator) -> dict[str, Any]:
    """Answer ``/detokenize``; see :func:`router.gateway.input.tokens.detokenize`."""
    asked = validator.read(DetokenizeRequest, body)
    return {"prompt": tokens.detokenize(validator, asked.model, asked.tokens)}
