"""Every error code has one status on each surface, and errors survive the way to a client."""

from __future__ import annotations

import json
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from cluster.errors import (
    Code,
    ExpertMeshError,
    InvalidRequestError,
    OverloadedError,
    UnknownModelError,
    error_from_wire,
)
from router.gateway.errors import HTTP_STATUS, http_error
from router.protos.errors import GRPC_CODES, error_from_grpc, grpc_error, is_from_server


def test_every_code_has_a_status_of_http_and_one_of_its_own_of_grpc() -> None:
    assert set(HTTP_STATUS) == set(GRPC_CODES) == set(Code)
    assert len(set(GRPC_CODES.values())) == len(GRPC_CODES)
    assert all(status.name == code.name for code, status in GRPC_CODES.items())


def test_http_statuses() -> None:
    assert {code.name: status for code, (status, *_) in HTTP_STATUS.items()} == {
        "INVALID_ARGUMENT": 400, "UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403, "NOT_FOUND": 404,
        "RESOURCE_EXHAUSTED": 429, "INTERNAL": 500, "UNIMPLEMENTED": 501, "UNAVAILABLE": 503,
        "DEADLINE_EXCEEDED": 504, "CANCELLED": 499,
    }  # fmt: skip


@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize("retry_after_s", [None, 2.5])
def test_a_typed_error_survives_grpc(code: Code, retry_after_s: float | None) -> None:
    wire = {"code": code, "message": "too odd", "field": "", "retry_after_s": retry_after_s}
    error = error_from_wire(wire)
    back = error_from_grpc(*grpc_error(error))
    assert type(back) is type(error)
    assert (back.message, back.retry_after_s) == ("too odd", retry_after_s)
    assert is_from_server(grpc_error(error)[2])


def test_who_comes_back_at_the_time_that_grpc_says_is_not_early() -> None:
    error = error_from_wire(
        {"code": Code.RESOURCE_EXHAUSTED, "message": "", "field": "", "retry_after_s": 0.4712}
    )
    assert error_from_grpc(*grpc_error(error)).retry_after_s == 0.472


def test_a_bad_field_is_a_field_violation() -> None:
    code, details, packed = grpc_error(InvalidRequestError("must be odd", "sampling.n"))
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "sampling.n: must be odd")
    status = status_pb2.Status.FromString(packed)
    assert (status.code, status.message) == (3, details)
    bad_request = error_details_pb2.BadRequest()
    assert any(one.Unpack(bad_request) for one in status.details)
    assert bad_request.field_violations[0].field == "sampling.n"
    assert bad_request.field_violations[0].description == "must be odd"
    assert error_from_grpc(code, details, packed).field == "sampling.n"


def test_other_servers_statuses_are_told_apart() -> None:
    other = status_pb2.Status(code=14, message="proxy").SerializeToString()
    assert not is_from_server(other)
    assert not is_from_server(None)
    assert not is_from_server(b"\xff\xff")
    error = error_from_grpc(grpc.StatusCode.DATA_LOSS, "who are you", None)
    assert error.code is Code.INTERNAL
    assert "who are you" in str(error)


def test_http_errors_are_openai_shaped() -> None:
    status, body, headers = http_error(InvalidRequestError("must be odd", "n"))
    assert (status, headers) == (400, {})
    assert body["error"] == {
        "message": "n: must be odd",
        "type": "invalid_request_error",
        "param": "n",
        "code": "invalid_argument",
    }
    status, body, headers = http_error(OverloadedError("full", retry_after_s=0.2))
    assert (status, headers) == (429, {"Retry-After": "1"})
    assert body["error"]["param"] is None
    assert http_error(UnknownModelError("no", "model"))[1]["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("text", ["\ud800", "x" * 100_000, "\ud83d" * 100_000, "🦊" * 100_000])
def test_messages_can_always_be_carried(text: str) -> None:
    error: ExpertMeshError = InvalidRequestError(text, text)
    json.dumps(http_error(error)[1]).encode()
    _, details, packed = grpc_error(error)
    # Headers are limited to 8 KiB in all; details are percent-encoded, packed is in base64.
    assert len(quote(details)) + len(packed) * 4 / 3 < 8000
