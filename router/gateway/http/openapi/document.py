"""The OpenAPI 3.1 document of a gateway, made of its limits and the models that it serves.

https://spec.openapis.org/oas/v3.1.0. Bodies are described by the models that read them. Tests
hold the rest to what the app answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from pydantic.json_schema import models_json_schema

from cluster.spec import EXACT_HEADER
from router.config.deployment import GatewayConfig
from router.gateway.errors import BY_CLASS, HTTP_STATUS
from router.gateway.http.openapi.answers import ANSWERS, Schema, one_of, ref, text
from router.gateway.input.request.model import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Request,
    TokenizeRequest,
    within,
)
from router.gateway.limits.quotas import RATE_HEADERS
from router.gateway.predict.body import body_within
from router.gateway.predict.validate import VERSION

OPENAPI_PATH = "/openapi.json"
_JSON, _OCTETS = "application/json", "application/octet-stream"
_STREAM, _TEXT = "text/event-stream", "text/plain"
LENGTH_PARAMETER = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "schema": {"type": "integer", "minimum": 1},
}
_STATUSES = sorted({status for status, _ in (*HTTP_STATUS.values(), *BY_CLASS.values())})
_EXACT = {"schema": one_of("true", "false")}
_OBJECT: Schema = {"type": "object"}


def document(
    models: Sequence[str], mixtures: Sequence[str], limits: GatewayConfig
) -> dict[str, Any]:
    """Return the document of a gateway with these language models and mixtures, as plain JSON."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "ExpertMesh", "version": version("expertmesh")},
        # With keys the deployment wants one of them, without keys none.
        "security": [{}, {"key": []}],
        "paths": {**_paths(models), **_prediction_paths(models, mixtures)},
        "components": {
            "schemas": {**bodies(models, limits), **ANSWERS},
            "headers": {"Rate": {"schema": text()}, "RequestId": {"schema": text(1)}},
            "responses": {
                error: _response("refused, or failed", {_JSON: ref(error)})
                for error in ("Error", "PredictionError")
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _paths(models: Sequence[str]) -> dict[str, Any]:
    tokens, detokens = {_JSON: ref("TokenizeRequest")}, {_JSON: ref("DetokenizeRequest")}
    refused = _operation("refused: no embeddings are served", {}, taken={_JSON: _OBJECT})
    del refused["responses"]["200"]
    front = _get("where to go", "Front")
    return {
        "/": front,
        "/docs": {"get": _operation("this document, to read", {"text/html": text()})},
        "/v1": front,
        "/v1/models": _get("the served language models", "Models"),
        "/v1/models/{model}": _get("a served language model", "Model") | _in_path(model=models),
        "/v1/completions": _generation("continues one prompt or a list of prompts", "Completion"),
        "/v1/chat/completions": _generation("the assistant's next message", "Chat"),
        "/v1/embeddings": {"post": refused},
        "/tokenize": {
            "post": _operation("token ids of a prompt", {_JSON: ref("Tokenized")}, taken=tokens)
        },
        "/detokenize": {
            "post": _operation("the text of token ids", {_JSON: ref("Detokenized")}, taken=detokens)
        },
        "/health": _get("the gateway's process lives", "Alive"),
        "/ready": _get("whether requests can be served", "Ready", has_503=True),
        "/metrics": {"get": _operation("metrics of the whole application", {_TEXT: text()})},
        OPENAPI_PATH: {"get": _operation("this document", {_JSON: _OBJECT})},
    }


def _prediction_paths(models: Sequence[str], mixtures: Sequence[str]) -> dict[str, Any]:
    get = partial(_get, error="PredictionError")
    all_live = "every expert of every model has a live copy"
    paths = {
        "/v2": get("name, version and extensions", "Server"),
        "/v2/models": get("the names of the served mixtures", "ModelNames"),
        "/v2/health/live": get("the gateway's process lives", "Live"),
        "/v2/health/ready": get(all_live, "AllReady", has_503=True),
    }
    for end, versions in (("", {}), ("/versions/{version}", {"version": [VERSION]})):
        base, mixture = f"/v2/models/{{model}}{end}", _in_path(model=mixtures, **versions)
        paths[base] = get("inputs and outputs of a mixture", "ModelMetadata") | mixture
        paths[f"{base}/ready"] = get(
            "all experts of the model have a live copy", "ModelReady", has_503=True
        ) | _in_path(model=[*mixtures, *models], **versions)
        paths[f"{base}/infer"] = {"post": _inference()} | mixture
    return paths


def _in_path(**allowed: Sequence[str]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": one_of(*values)}
        for name, values in allowed.items()
    ]
    return {"parameters": parameters}


def _content(schemas: Mapping[str, Schema]) -> dict[str, Any]:
    return {media_type: {"schema": schema} for media_type, schema in schemas.items()}


def _operation(
    summary: str,
    content: Mapping[str, Schema],
    error: str = "Error",
    taken: Mapping[str, Schema] | None = None,
) -> dict[str, Any]:
    """Return an operation that takes and answers these kinds of content."""
    responses = {str(status): {"$ref": f"#/components/responses/{error}"} for status in _STATUSES}
    body = {"requestBody": {"required": True, "content": _content(taken)}} if taken else {}
    return {
        "summary": summary,
        **body,
        "responses": {"200": _response("well", content), **responses},
    }


def _get(
    summary: str, answered: str, has_503: bool = False, error: str = "Error"
) -> dict[str, Any]:
    """Return a path's only operation; its answer may come with 503 too."""
    operation = _operation(summary, {_JSON: ref(answered)}, error)
    if has_503:
        either = {"anyOf": [ref(answered), ref(error)]}
        operation["responses"]["503"] = _response("not ready", {_JSON: either})
    return {"get": operation}


def _generation(summary: str, name: str) -> dict[str, Any]:
    """Return an operation that answers whole, or with a stream of events ``{name}Chunk``."""
    taken = {_JSON: ref(f"{name}Request")}
    operation = _operation(summary, {_JSON: ref(name)}, taken=taken)
    # OpenAPI 3.1 has no word for the events of a stream; 3.2 has, but few tools read it yet.
    events = {"x-event-schema": ref(f"{name}Chunk"), "x-last-event": "[DONE]"}
    operation["responses"]["200"]["content"][_STREAM] = events
    return {"post": operation}


def _inference() -> dict[str, Any]:
    """Return the operation whose tensors are in the JSON, or bytes after it."""
    binary = {_OCTETS: text(format="binary", description="JSON, and the bytes of binary tensors.")}
    answered, taken = ({_JSON: ref(name), **binary} for name in ("InferResponse", "InferRequest"))
    summary = "the outputs for all rows of the request"
    operation = _operation(summary, answered, "PredictionError", taken)
    operation["responses"]["200"]["headers"][EXACT_HEADER] = _EXACT | {"required": True}
    return {"parameters": [LENGTH_PARAMETER], **operation}


def _response(description: str, content: Mapping[str, Schema]) -> dict[str, Any]:
    rate, request_id = ({"$ref": f"#/components/headers/{name}"} for name in ("Rate", "RequestId"))
    headers = {**dict.fromkeys(RATE_HEADERS, rate), "x-request-id": request_id}
    return {"description": description, "headers": headers, "content": _content(content)}


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
