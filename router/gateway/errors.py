"""The one table from error code to gRPC and HTTP status, and the bodies that carry errors.

gRPC: code and details, and in the trailing metadata ``grpc-status-details-bin`` a
``google.rpc.Status`` with an ``ErrorInfo`` (domain ``expertmesh``), a ``BadRequest`` that names the
field, and a ``RetryInfo`` where trying again can help. HTTP: OpenAI's error object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from cluster.errors import (
    Code,
    ExpertMeshError,
    InternalError,
    TooLargeError,
    UnavailableError,
    UnknownModelError,
    error_from_wire,
)

ERROR_DOMAIN = "expertmesh"
DETAILS_KEY = "grpc-status-details-bin"
# Trailers are limited to 8 KiB in all; a message travels in them three times, once with every
# byte that is not ASCII written as three.
_MAX_MESSAGE_BYTES = 800
_MAX_FIELD_BYTES = 200


@dataclass(frozen=True, slots=True)
class Status:
    """What a :class:`Code` is on each surface; ``error_type`` is OpenAI's ``type``."""

    grpc: grpc.StatusCode
    http: int
    error_type: str


STATUS: dict[Code, Status] = {
    Code.INVALID_ARGUMENT: Status(grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error"),
    Code.NOT_FOUND: Status(grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error"),
    Code.RESOURCE_EXHAUSTED: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error"),
    Code.UNAVAILABLE: Status(grpc.StatusCode.UNAVAILABLE, 503, "server_error"),
    Code.DEADLINE_EXCEEDED: Status(grpc.StatusCode.DEADLINE_EXCEEDED, 504, "server_error"),
    Code.CANCELLED: Status(grpc.StatusCode.CANCELLED, 499, "invalid_request_error"),
    Code.UNIMPLEMENTED: Status(grpc.StatusCode.UNIMPLEMENTED, 501, "invalid_request_error"),
    Code.INTERNAL: Status(grpc.StatusCode.INTERNAL, 500, "server_error"),
}

TOO_LARGE = Status(grpc.StatusCode.RESOURCE_EXHAUSTED, 413, "invalid_request_error")
"""Of :class:`TooLargeError`: over HTTP not 429, which means that the same may be taken later."""

_BY_GRPC: dict[grpc.StatusCode, Code] = {status.grpc: code for code, status in STATUS.items()}


def public_error(error: Exception) -> ExpertMeshError:
    """Return what a client may know of ``error``: our own errors as they are, others INTERNAL."""
    if isinstance(error, ExpertMeshError):
        return error
    return InternalError("the server failed on this request; its log has the details")


def http_error(error: ExpertMeshError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return HTTP status, OpenAI-shaped body and extra headers for an error."""
    status = TOO_LARGE if isinstance(error, TooLargeError) else STATUS[error.code]
    code = "model_not_found" if isinstance(error, UnknownModelError) else error.code.value
    body = {
        "message": _clean(str(error), _MAX_MESSAGE_BYTES),
        "type": status.error_type,
        "param": _clean(error.field, _MAX_FIELD_BYTES) or None,
        "code": code,
    }
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return status.http, {"error": body}, headers


def grpc_error(error: ExpertMeshError) -> tuple[grpc.StatusCode, str, bytes]:
    """Return gRPC code, details and the bytes of ``grpc-status-details-bin`` for an error."""
    code = STATUS[error.code].grpc
    details = _clean(str(error), _MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=code.value[0], message=details)
    _pack(status, error_details_pb2.ErrorInfo(reason=error.code.name, domain=ERROR_DOMAIN))
    if error.code is Code.INVALID_ARGUMENT:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_clean(error.field, _MAX_FIELD_BYTES),
            description=_clean(error.message, _MAX_MESSAGE_BYTES),
        )
        _pack(status, error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return code, details, status.SerializeToString()


def error_from_grpc(
    code: grpc.StatusCode, details: str, status_details: bytes | None
) -> ExpertMeshError:
    """Rebuild the typed error of :func:`grpc_error`; the code decides the class.

    ``status_details`` is the value of ``grpc-status-details-bin``, if there was one.
    """
    wire: dict[str, Any] = {"field": "", "message": details, "retry_after_s": None}
    wire["code"] = _BY_GRPC.get(code, Code.INTERNAL).value
    for packed in _unpack(status_details):
        bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if _unpacked(packed, bad_request) and bad_request.field_violations:
            wire["field"] = bad_request.field_violations[0].field
            wire["message"] = bad_request.field_violations[0].description
        elif _unpacked(packed, retry):
            wire["retry_after_s"] = max(0.0, retry.retry_delay.ToMilliseconds() / 1000)
    return error_from_wire(wire)


def is_from_server(status_details: bytes | None) -> bool:
    """Tell whether an ExpertMesh server wrote this status, rather than gRPC or a proxy."""
    info = error_details_pb2.ErrorInfo()
    return any(
        _unpacked(packed, info) and info.domain == ERROR_DOMAIN
        for packed in _unpack(status_details)
    )


def unavailable(message: str, retry_after_s: float = 1.0) -> UnavailableError:
    """Return an UNAVAILABLE error with a retry hint."""
    return UnavailableError(message, retry_after_s=retry_after_s)


def _pack(status: Any, message: Any) -> None:
    packed = AnyMessage()
    packed.Pack(message)
    status.details.append(packed)


def _unpacked(packed: Any, message: Any) -> bool:
    """Take what is packed into ``message`` if it is one of its kind; whoever answers may lie."""
    try:
        return bool(packed.Unpack(message))
    except DecodeError:
        return False


def _unpack(status_details: bytes | None) -> list[Any]:
    if status_details is None:
        return []
    try:
        return list(status_pb2.Status.FromString(status_details).details)
    except DecodeError:
        return []


def _clean(text: str, limit_bytes: int) -> str:
    # What a client sent may hold lone surrogates, which neither JSON nor gRPC can carry.
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= limit_bytes:
        return data.decode()
    return data[: limit_bytes - 3].decode("utf-8", "ignore") + "..."
