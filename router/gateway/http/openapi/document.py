"""The OpenAPI 3.1 document of a gateway, made of its limits and the models that it serves.

https://spec.openapis.org/oas/v3.1.0. Bodies are described by the models that read them. Tests
hold the rest to what the app answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from cluster.spec import EXACT_HEADER
from router.config.deployment import GatewayConfig
from router.gateway.errors import BY_CLASS, HTTP_STATUS
from router.gateway.http.openapi.answers import ANSWERS
from router.gateway.http.openapi.bodies import bodies
from router.gateway.http.openapi.predictions import PREDICTIONS
from router.gateway.http.openapi.schema import Schema, one_of, ref, text
from router.gateway.limits.quotas import RATE_HEADERS
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


def document(
    models: Sequence[str], mixtures: Sequence[str], limits: GatewayConfig
) -> dict[str, Any]:
    """Return the document of a gateway with these language models and mixtures, as plain JSON."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "ExpertMesh", "version": version("expertmesh")},
        # With keys the deployment wants one of them, without keys none.
        "security": [{}, {"key": []}],
        "paths": {**_of_openai(models), **_of_predictions(models, mixtures), **_of_operators()},
        "components": {
            "schemas": {**bodies(models, limits), **ANSWERS, **PREDICTIONS},
            "headers": {"Rate": {"schema": text()}, "RequestId": {"schema": text(1)}},
            "responses": {
                error: _response("refused, or failed", {_JSON: ref(error)})
                for error in ("Error", "PredictionError")
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _of_openai(models: Sequence[str]) -> dict[str, Any]:
    return {
        "/v1/models": {"get": _operation("the served language models", {_JSON: ref("Models")})},
        "/v1/models/{model}": {
            "parameters": [_in_path("model", models)],
            "get": _operation("a served language model", {_JSON: ref("Model")}),
        },
        "/v1/completions": {
            "post": _generation("Completion", "continues one prompt or a list of prompts")
        },
        "/v1/chat/completions": {"post": _generation("Chat", "the assistant's next message")},
        "/tokenize": {"post": _posted("Tokenize", "Tokenized", "token ids of a prompt")},
        "/detokenize": {"post": _posted("Detokenize", "Detokenized", "the text of token ids")},
        "/v1/embeddings": {
            "post": {
                **_takes({_JSON: {"type": "object"}}),
                "summary": "refused: no embeddings are served",
                "responses": _refusals("Error"),
            }
        },
    }


def _of_predictions(models: Sequence[str], mixtures: Sequence[str]) -> dict[str, Any]:
    paths: dict[str, Any] = {
        "/v2": {"get": _prediction("name, version and extensions", "Server")},
        "/v2/health/live": {"get": _prediction("the gateway's process lives", "Live")},
        "/v2/health/ready": {
            "get": _prediction(
                "every expert of every model has a live copy", "AllReady", "AllReady"
            )
        },
    }
    every = [*mixtures, *models]
    for base, versions in (
        ("/v2/models/{model}", []),
        ("/v2/models/{model}/versions/{version}", [_in_path("version", [VERSION])]),
    ):
        known = {"parameters": [_in_path("model", mixtures), *versions]}
        paths[base] = known | {
            "get": _prediction("inputs and outputs of a mixture", "ModelMetadata")
        }
        paths[f"{base}/ready"] = {
            "parameters": [_in_path("model", every), *versions],
            "get": _prediction(
                "all experts of the model have a live copy", "ModelReady", not_ready="ModelReady"
            ),
        }
        paths[f"{base}/infer"] = known | {"post": _inference()}
    return paths


def _of_operators() -> dict[str, Any]:
    ready = _operation("whether requests can be served", {_JSON: ref("Ready")}, "Ready")
    return {
        "/health": {"get": _operation("the gateway's process lives", {_JSON: ref("Alive")})},
        "/ready": {"get": ready},
        "/metrics": {"get": _operation("metrics of the whole application", {_TEXT: text()})},
        OPENAPI_PATH: {"get": _operation("this document", {_JSON: {"type": "object"}})},
    }


def _in_path(name: str, values: Sequence[str]) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": one_of(*values)}


def _takes(content: Mapping[str, Schema]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": _content(content)}}


def _content(schemas: Mapping[str, Schema]) -> dict[str, Any]:
    return {media_type: {"schema": schema} for media_type, schema in schemas.items()}


def _operation(
    summary: str, content: Mapping[str, Schema], not_ready: str = "", error: str = "Error"
) -> dict[str, Any]:
    """Return an operation; ``not_ready`` names the answer that comes with 503 too."""
    responses = {"200": _response("well", content), **_refusals(error)}
    if not_ready:
        unready = _response("not ready", {_JSON: {"anyOf": [ref(not_ready), ref(error)]}})
        responses["503"] = unready
    return {"summary": summary, "responses": responses}


def _posted(taken: str, answered: str, summary: str) -> dict[str, Any]:
    operation = _operation(summary, {_JSON: ref(answered)})
    return {**_takes({_JSON: ref(f"{taken}Request")}), **operation}


def _generation(name: str, summary: str) -> dict[str, Any]:
    """Return an operation that answers whole, or with a stream of events ``{name}Chunk``."""
    operation = _operation(summary, {_JSON: ref(name)})
    # OpenAPI 3.1 has no word for the events of a stream; 3.2 has, but few tools read it yet.
    events = {"x-event-schema": ref(f"{name}Chunk"), "x-last-event": "[DONE]"}
    operation["responses"]["200"]["content"][_STREAM] = events
    return {**_takes({_JSON: ref(f"{name}Request")}), **operation}


def _prediction(summary: str, answered: str, not_ready: str = "") -> dict[str, Any]:
    return _operation(summary, {_JSON: ref(answered)}, not_ready, "PredictionError")


def _inference() -> dict[str, Any]:
    """Return the operation whose tensors are in the JSON, or bytes after it."""
    binary = text(format="binary", description="JSON, and the bytes of binary tensors.")
    operation = _prediction("the outputs for all rows of the request", "InferResponse")
    answered = {_JSON: ref("InferResponse"), _OCTETS: binary}
    operation["responses"]["200"] = _response("well", answered)
    operation["responses"]["200"]["headers"][EXACT_HEADER] = _EXACT | {"required": True}
    taken = _takes({_JSON: ref("InferRequest"), _OCTETS: binary})
    return {**taken, "parameters": [LENGTH_PARAMETER], **operation}


def _response(description: str, content: Mapping[str, Schema]) -> dict[str, Any]:
    rate, request_id = ({"$ref": f"#/components/headers/{name}"} for name in ("Rate", "RequestId"))
    headers = {**dict.fromkeys(RATE_HEADERS, rate), "x-request-id": request_id}
    return {"description": description, "headers": headers, "content": _content(content)}


def _refusals(error: str) -> dict[str, Any]:
    """Return the answers of every status that an error may have."""
    return {str(status): {"$ref": f"#/components/responses/{error}"} for status in _STATUSES}
