"""Targets: what clients send, as far as into the validation, and what servers answer clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from starlette.requests import Request

import deploy
from benchmarks.fuzzing.target import Target
from cluster.errors import ExpertMeshError, InvalidRequestError, UnknownModelError
from router.config.deployment import GatewayConfig, parse_args
from router.gateway.errors import http_error
from router.gateway.grpc.methods import GrpcMethods, parse_health_check
from router.gateway.http.openai.chat import parse_chat
from router.gateway.http.openai.completions import parse_completion
from router.gateway.http_io import parse_json, read_body
from router.gateway.input.tokenizer import GatewayModel, Tokenizer
from router.gateway.input.validate import Validator
from router.gateway.limits.charges import Charges
from router.gateway.limits.room import Room
from router.gateway.metrics import Metrics
from router.gateway.service import GenerationService
from router.protos import inference_pb2
from router.protos.errors import GRPC_CODES, error_from_grpc, grpc_error
from router.security.keys import ANYBODY
from router.served import inspect_models, language_models

MODEL = "mesh-tiny"
Parse = Callable[[dict[str, Any], Validator, str], object]
_CODES = tuple(GRPC_CODES.values())
COMPLETIONS: tuple[dict[str, Any], ...] = (
    {"model": MODEL, "prompt": "And the LORD said", "max_tokens": 4, "temperature": 0},
    {
        "model": MODEL, "prompt": [[5, 6, 7], [8, 9]], "max_tokens": 4, "temperature": 0.5, "n": 2,
        "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "stop": ["x", "\n"], "logprobs": 2,
        "stream": True, "stream_options": {"include_usage": True}, "timeout_s": 5,
        "on_expert_loss": "drop", "ignore_eos": True, "return_token_ids": True, "user": "me",
        "priority": -1, "echo": True,
    },
    {
        "model": MODEL, "prompt": "In the beginning", "max_tokens": 0, "prompt_logprobs": 3,
        "echo": True, "logprobs": 1,
    },
)  # fmt: skip
CHATS: tuple[dict[str, Any], ...] = (
    {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    {
        "model": MODEL, "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 2,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
            {"role": "user", "content": "hi", "name": "me"},
        ],
        "tools": [], "response_format": {"type": "text"}, "stop": "x", "temperature": 0,
    },
)  # fmt: skip


def service() -> GenerationService:
    """Return a gateway's service for the bundled model; nothing is behind it."""
    folder = Path(deploy.__file__).parent / "models" / MODEL
    [info] = language_models(
        inspect_models(parse_args({"models": [{"id": MODEL, "path": str(folder)}]}))
    )
    model = GatewayModel(info, Tokenizer.load(str(folder), info.eos_token_ids))
    upstream: Any = None
    limits = GatewayConfig()
    metrics, room = Metrics(), Room(limits, [MODEL])
    return GenerationService({MODEL: model}, limits, upstream, metrics, room, Charges(metrics))


def http() -> Target:
    """Return the target of JSON bodies; each goes to both endpoints."""
    served = service()

    def run(data: bytes) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": data, "more_body": False}

        async def parsed(parse: Parse) -> None:
            scope = {"type": "http", "headers": [], "state": {"caller": ANYBODY}}
            request = Request(scope, receive)
            with served.room.bodies.share_of("") as share:
                body = parse_json(await read_body(request, served.limits.max_body_bytes, share))
            parse(body, served.validator, "id")

        for parse in (parse_completion, parse_chat):
            try:
                asyncio.run(parsed(parse))
            except (InvalidRequestError, UnknownModelError) as error:
                _check_http(error)

    return Target(bodies(MODEL), run)


def _check_http(error: ExpertMeshError) -> None:
    status, body, _ = http_error(error)
    assert status in (400, 404)
    told = json.loads(json.dumps(body, allow_nan=False))["error"]
    assert 0 < len(told["message"].encode()) < 2000


def protobuf() -> Target:
    """Return the target of the bytes of gRPC requests."""
    none: Any = None
    served = service()
    methods = GrpcMethods(served, none, none)

    def request(data: bytes) -> None:
        with served.room.bodies.share_of("") as share:
            asyncio.run(methods._check(data, True, ANYBODY, share))

    def run(data: bytes) -> None:
        for check in (partial(request, data), partial(parse_health_check, data)):
            try:
                check()
            except (InvalidRequestError, UnknownModelError) as error:
                _check_grpc(error)

    return Target(messages(MODEL), run)


def _check_grpc(error: ExpertMeshError) -> None:
    code, details, packed = grpc_error(error)
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert len(details.encode()) < 2000
    assert len(packed) < 6000  # a proxy and a client take no more than 8 KiB of trailers
    assert error_from_grpc(code, details, packed).code == error.code


def bodies(model: str) -> list[bytes]:
    """Return good HTTP bodies: completions, then chats."""
    return [json.dumps({**one, "model": model}).encode() for one in (*COMPLETIONS, *CHATS)]


def messages(model: str) -> list[bytes]:
    """Return good gRPC requests to generate, as bytes."""
    sampling = {"max_tokens": 4, "temperature": 0.0}
    ids = inference_pb2.TokenIds(ids=[5, 6, 7])
    full = inference_pb2.GenerateRequest(
        model=model,
        prompt_token_ids=ids,
        timeout_s=5.0,
        on_expert_loss="drop",
        priority=-1,
        sampling={
            **sampling, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 3, "ignore_eos": True,
            "logprobs": 2, "n": 2, "stop": ["x"], "prompt_logprobs": 1, "echo": True,
        },
    )  # fmt: skip
    full.resume.add(token_ids=[5], finished=False, prompt_logprobs=2)
    full.resume.add(token_ids=[5, 6], finished=True)
    chat = inference_pb2.GenerateRequest(model=model, sampling=sampling)
    chat.messages.add(role="user", content="hi")
    text = inference_pb2.GenerateRequest(model=model, prompt="And the LORD said", sampling=sampling)
    return [one.SerializeToString() for one in (text, full, chat)]


def status() -> Target:
    """Return the target of a status's details, as a client reads them from whoever answers."""

    def run(data: bytes) -> None:
        code = _CODES[data[0] % len(_CODES)] if data else grpc.StatusCode.UNKNOWN
        error = error_from_grpc(code, data.decode("utf-8", "replace")[:100], data[1:])
        assert isinstance(error, ExpertMeshError)
        assert error.retry_after_s is None or error.retry_after_s >= 0

    packed = status_pb2.Status(code=3, message="x")
    packed.details.add().Pack(error_details_pb2.RetryInfo())
    violation = error_details_pb2.BadRequest.FieldViolation(field="a", description="b")
    packed.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return Target([b"\x00" + packed.SerializeToString()], run)
