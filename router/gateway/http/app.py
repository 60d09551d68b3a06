"""The HTTP APIs, as one FastAPI app: OpenAI's, the Open Inference Protocol, and the operators'.

Bodies are checked by the validators that gRPC's requests go through too, so that both have the same
rules and messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from cluster.errors import ExpertMeshError, InvalidRequestError
from cluster.spec import EXACT_HEADER
from router.control.readiness import Readiness
from router.gateway.http.openai.call import OpenAiCall
from router.gateway.http.openai.chat import parse_chat
from router.gateway.http.openai.completions import parse_completion
from router.gateway.http.openapi.document import OPENAPI_PATH, document
from router.gateway.http_io import (
    FROM_ANYWHERE,
    HEALTH_PATH,
    BrowserRules,
    EdgeMiddleware,
    SseResponse,
    error_response,
    healthz,
    is_v2,
    parse_json,
    read_body,
    until_disconnect,
)
from router.gateway.input import tokens
from router.gateway.input.request.model import DetokenizeRequest, TokenizeRequest
from router.gateway.input.validate import Validator, checked, is_slow
from router.gateway.limits.quotas import RATE_HEADERS
from router.gateway.predict.service import PredictionService
from router.gateway.predict.v2_http import add_v2_routes
from router.gateway.service import Delta, GenerationService
from router.observability.exposition import expose
from router.security.access import Access
from router.served import ServedModel

if TYPE_CHECKING:
    from router.gateway.admin import Admin

DOCS_POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)
Parse = Callable[[dict[str, Any], Validator, str], OpenAiCall]


def create_app(
    service: GenerationService,
    predictions: PredictionService,
    admin: Admin,
    access: Access,
    browsers: BrowserRules = FROM_ANYWHERE,
) -> FastAPI:
    """Return the app; it has no state but the services and ``admin``.

    ``browsers`` and ``access`` are asked about every request.
    """
    app = FastAPI(title="ExpertMesh", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(
        EdgeMiddleware,
        browsers=browsers,
        access=access,
        charges=service.charges,
    )
    if browsers.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(browsers.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[EXACT_HEADER, *RATE_HEADERS],
        )
    app.add_exception_handler(ExpertMeshError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    _add_openai_routes(app, service)
    add_v2_routes(app, predictions)
    _add_operator_routes(app, service, admin)
    _add_document(app, service, predictions)
    _add_front(app)
    return app


def _add_openai_routes(app: FastAPI, service: GenerationService) -> None:
    started = int(time.time())

    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        models = [_model_object(model, started) for model in service.models()]
        return JSONResponse({"object": "list", "data": models})

    @app.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> JSONResponse:
        return JSONResponse(_model_object(service.validator.model(model_id).info, started))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, service, parse_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(request, service, parse_chat)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> JSONResponse:
        data, caller = await _data(request, service), request.state.caller
        with service.charges.preparing(caller, len(data)) as preparation:
            body = parse_json(data)
            found = await checked(is_slow(body), partial(_tokenized, body, service))
            preparation.cost_tokens = found["count"]
        return JSONResponse(found)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> JSONResponse:
        data = await _data(request, service)
        with service.charges.preparing(request.state.caller, len(data)) as preparation:
            asked = service.validator.read(DetokenizeRequest, parse_json(data))
            text = tokens.detokenize(service.validator.model(asked.model), asked.tokens)
            preparation.cost_tokens = len(asked.tokens)
        return JSONResponse({"prompt": text})

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> JSONResponse:
        raise InvalidRequestError(
            "embeddings are not served: these models continue text, and their hidden states do "
            "not measure similarity"
        )


def _add_operator_routes(app: FastAPI, service: GenerationService, admin: Admin) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    app.add_route(HEALTH_PATH, healthz)

    @app.get("/ready")
    async def ready(request: Request) -> JSONResponse:
        readiness = service.ready()
        is_known = request.state.caller is not None
        body = _ready_object(readiness) if is_known else {"ready": readiness.is_ready}
        return JSONResponse(body, 200 if readiness.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        measurements = await admin.measurements()
        text = expose(measurements, service.ready().loop_age_s)
        return Response(text, media_type=CONTENT_TYPE_LATEST)


def _add_front(app: FastAPI) -> None:
    """Add what a browser, or somebody new, asks first; it tells nothing without a key."""

    async def front(request: Request) -> JSONResponse:
        pages = {"documentation": "/docs", "openapi": OPENAPI_PATH, "models": "/v1/models"}
        known = {} if request.state.caller is None else {"version": version("expertmesh")}
        return JSONResponse({"name": "ExpertMesh", **known, **pages})

    @app.get("/docs")
    async def docs() -> HTMLResponse:
        page = (files("router.gateway.http") / "docs.html").read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": DOCS_POLICY})

    app.add_route("/", front)
    app.add_route("/v1", front)


def _add_document(app: FastAPI, service: GenerationService, predictions: PredictionService) -> None:
    models = [model.id for model in service.models()]
    # Made when it is first asked for, since making it takes as long as making the rest of the app.
    described = cache(partial(document, models, predictions.validator.mixtures, service.limits))

    @app.get(OPENAPI_PATH)
    async def openapi() -> JSONResponse:
        return JSONResponse(described())


async def _data(request: Request, service: GenerationService) -> bytes:
    """Return the body; the budget of bodies bounds all that are read at one time."""
    with service.room.bodies.share_of(request.state.caller.name) as share:
        return await read_body(request, service.limits.max_body_bytes, share)


def _tokenized(body: dict[str, Any], service: GenerationService) -> dict[str, Any]:
    """Answer vLLM's ``/tokenize``."""
    asked = service.validator.read(TokenizeRequest, body)
    model = service.validator.model(asked.model)
    ids = tokens.tokenize(model, asked)
    return {
        "count": len(ids),
        "max_model_len": model.info.max_model_len,
        "tokens": ids,
        "token_strs": list(map(model.tokenizer.token_text, ids))
        if asked.return_token_strs
        else None,
    }


async def _answer(request: Request, service: GenerationService, parse: Parse) -> Response:
    caller = request.state.caller
    with service.metrics.refusals("http"):
        data = await _data(request, service)
        with service.charges.preparing(caller, len(data)) as preparation:
            body = parse_json(data)
            check = partial(parse, body, service.validator, request.state.request_id)
            call = await checked(has_forms := is_slow(body), check)
            if not has_forms:
                preparation.cost_tokens = 0
    if not call.is_stream:
        body, is_exact = await until_disconnect(request.receive, call.answer(service, caller))
        return JSONResponse(body, headers={EXACT_HEADER: str(is_exact).lower()})
    deltas = call.deltas(service, caller)

    async def first_delta() -> tuple[int, Delta]:
        return await anext(deltas)

    # Before the first token an error is a status; after it, an event of the stream.
    try:
        first = await until_disconnect(request.receive, first_delta())
    except BaseException:
        await deltas.aclose()
        raise
    return SseResponse(call.chunks(first, deltas), deltas)


def _ready_object(readiness: Readiness) -> dict[str, Any]:
    epoch, version = readiness.order or (None, None)
    return {
        "ready": readiness.is_ready,
        "reason": readiness.reason or None,
        "epoch": epoch,
        "placement_version": version,
        "controller_loop_age_s": readiness.loop_age_s,
        "failed_deploy": readiness.failed_deploy or None,
    }


def _model_object(model: ServedModel, created: int) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": created,
        "owned_by": "expertmesh",
        "max_model_len": model.max_model_len,
    }


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ExpertMeshError)  # Starlette's signature is wider than its calls.
    return error_response(error, request.url.path)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # Starlette's signature is wider than its calls.
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    if is_v2(request.url.path):
        return JSONResponse({"error": message}, error.status_code, error.headers)
    body = {
        "message": message,
        "type": "invalid_request_error",
        "param": None,
        "code": "unknown_url" if error.status_code == 404 else None,
    }
    return JSONResponse({"error": body}, error.status_code, error.headers)
