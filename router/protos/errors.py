"""Errors on their way over gRPC: a gateway writes them, a client reads them.

The status has a code and details. The trailing metadata ``grpc-status-details-bin`` has a
``google.rpc.Status`` with an ``ErrorInfo`` of the domain ``expertmesh``, a ``BadRequest`` that
names the field, and a ``RetryInfo`` where trying again can help.
"""

from __future__ import annotations

import math
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from cluster.errors import Code, ExpertMeshError, error_from_wire

ERROR_DOMAIN = "expertmesh"
DETAILS_KEY = "grpc-status-details-bin"
GRPC_CODES: dict[Code, grpc.StatusCode] = {code: grpc.StatusCode[code.name] for code in Code}
_BY_GRPC = {grpc_code: code for code, grpc_code in GRPC_CODES.items()}
# Trailers are limited to 8 KiB in all. A message travels in them three times, once of these with
# every byte that is not ASCII written as three.
MAX_MESSAGE_BYTES = 800
MAX_FIELD_BYTES = 200
_ROUNDING_MS = 1e-6


def grpc_error(error: ExpertMeshError) -> tuple[grpc.StatusCode, str, bytes]:
    """Return gRPC code, details and the bytes of ``grpc-status-details-bin`` for an error."""
    code = GRPC_CODES[error.code]
    details = clean(str(error), MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=code.value[0], message=details)
    _pack(status, error_details_pb2.ErrorInfo(reason=error.code.name, domain=ERROR_DOMAIN))
    if error.code is Code.INVALID_ARGUMENT:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=clean(error.field, MAX_FIELD_BYTES),
            description=clean(error.message, MAX_MESSAGE_BYTES),
        )
        _pack(status, error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = Duration()
        # Rounded up: whoever comes back a part of a millisecond early is refused again.
        delay.FromMilliseconds(math.ceil(error.retry_after_s * 1000 - _ROUNDING_MS))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return code, details, status.SerializeToString()


def error_from_grpc(
    code: grpc.StatusCode, details: str, status_details: bytes | None
) -> ExpertMeshError:
    """Rebuild the typed error of :func:`grpc_error`; the code decides the class.

    ``status_details`` is the value of ``grpc-status-details-bin``, if there is one. A code that no
    error of ours has becomes INTERNAL.
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
    """Return whether an ExpertMesh server wrote this status, rather than gRPC or a proxy."""
    info = error_details_pb2.ErrorInfo()
    return any(
        _unpacked(packed, info) and info.domain == ERROR_DOMAIN
        for packed in _unpack(status_details)
    )


def clean(text: str, limit_bytes: int) -> str:
    """Return a text that JSON and gRPC can carry, cut to the limit.

    A client's own words may have lone surrogates, which neither can.
    """
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= limit_bytes:
        return data.decode()
    return data[: limit_bytes - 3].decode("utf-8", "ignore") + "..."


def _pack(status: Any, message: Any) -> None:
    packed = AnyMessage()
    packed.Pack(message)
    status.details.append(packed)


def _unpacked(packed: Any, message: Any) -> bool:
    """Fill ``message`` if it is of the packed kind; the bytes may be any server's."""
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
