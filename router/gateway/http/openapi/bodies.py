"""The bodies of requests, by the models that read them.

A schema cannot say all that the validation checks: a prompt that fits the context, fields that
exclude each other. Whatever a schema refuses, the validation refuses too.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic.json_schema import models_json_schema

from router.config.deployment import GatewayConfig
from router.gateway.http.openapi.schema import Schema, one_of, ref
from router.gateway.input.request.model import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Request,
    TokenizeRequest,
    within,
)
from router.gateway.predict.body import body_within

BODIES: tuple[type[Request], ...] = (
    CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest,
)  # fmt: skip


def bodies(models: Sequence[str], limits: GatewayConfig) -> dict[str, Schema]:
    """Return the schemas of bodies and of their parts by their names in the document.

    The bodies are of the served language ``models``.
    """
    kinds = [*(within(kind, limits) for kind in BODIES), body_within(limits)]
    _, found = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=ref("{model}")["$ref"]
    )
    schemas: dict[str, Schema] = found["$defs"]
    for kind in BODIES:
        body = schemas[kind.__name__]
        body["properties"]["model"] = one_of(*models)
        body["required"] = ["model", *body.get("required", ())]
    return schemas
