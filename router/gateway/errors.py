"""Errors as HTTP carries them: the table from code to status, and each API's error object.

gRPC's side is :mod:`router.protos.errors`.
"""

from __future__ import annotations

import math
from typing import Any

from cluster.errors import (
    Code,
    ExpertMeshError,
    InternalError,
    MediaTypeError,
    SlowBodyError,
    TooLargeError,
    UnknownModelError,
)
from router.protos.errors import MAX_FIELD_BYTES, MAX_MESSAGE_BYTES, clean

HTTP_STATUS: dict[Code, tuple[int, str]] = {
    Code.INVALID_ARGUMENT: (400, "invalid_request_error"),
    Code.NOT_FOUND: (404, "invalid_request_error"),
    Code.UNAUTHENTICATED: (401, "authentication_error"),
    Code.PERMISSION_DENIED: (403, "permission_error"),
    Code.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    Code.UNAVAILABLE: (503, "server_error"),
    Code.DEADLINE_EXCEEDED: (504, "server_error"),
    Code.CANCELLED: (499, "invalid_request_error"),
    Code.UNIMPLEMENTED: (501, "invalid_request_error"),
    Code.INTERNAL: (500, "server_error"),
}
"""Status and OpenAI's ``type`` of each code."""

BY_CLASS: dict[type[ExpertMeshError], tuple[int, str]] = {
    TooLargeError: (413, "invalid_request_error"),
    MediaTypeError: (415, "invalid_request_error"),
    SlowBodyError: (408, "invalid_request_error"),
}
"""Classes that HTTP has a status for: 429 would invite a later try of a request too large."""


def public_error(error: Exception) -> ExpertMeshError:
    """Return the error for the client: an ``ExpertMeshError`` as it is, all others as INTERNAL."""
    if isinstance(error, ExpertMeshError):
        return error
    return InternalError("the server failed on this request; its log has the details")


def http_error(error: ExpertMeshError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return HTTP status, OpenAI-shaped body and extra headers for an error."""
    status, kind = _status(error)
    body = {
        "message": clean(str(error), MAX_MESSAGE_BYTES),
        "type": kind,
        "param": clean(error.field, MAX_FIELD_BYTES) or None,
        "code": "model_not_found" if isinstance(error, UnknownModelError) else error.code.value,
    }
    return status, {"error": body}, _headers(error)


def v2_error(error: ExpertMeshError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return HTTP status, the Open Inference Protocol's body and extra headers for an error."""
    body = {"error": clean(str(error), MAX_MESSAGE_BYTES)}
    return _status(error)[0], body, _headers(error)


def _status(error: ExpertMeshError) -> tuple[int, str]:
    return BY_CLASS.get(type(error), HTTP_STATUS[error.code])


def _headers(error: ExpertMeshError) -> dict[str, str]:
    headers = {"WWW-Authenticate": "Bearer"} if error.code is Code.UNAUTHENTICATED else {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return headers
