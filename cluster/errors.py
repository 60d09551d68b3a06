"""Every error that ExpertMesh raises on purpose, each with the code that a client sees.

An error contains the given value, the allowed values and the place (``field``). The codes
(:class:`Code`) are gRPC's; ``router/gateway/errors.py`` has the table of HTTP statuses. Errors
cross process boundaries as plain dictionaries (:meth:`ExpertMeshError.to_wire`), never as pickled
exceptions, so that no stack, pid or path of a server reaches a client.
"""

from __future__ import annotations

import enum
from collections.abc import Sized
from typing import Any, ClassVar


class Code(enum.StrEnum):
    """The kind of a failure, as a client sees it; the names are those of gRPC's status codes."""

    INVALID_ARGUMENT = "invalid_argument"
    NOT_FOUND = "not_found"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    UNAVAILABLE = "unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    UNIMPLEMENTED = "unimplemented"
    INTERNAL = "internal"


class ExpertMeshError(Exception):
    """Base of all errors raised on purpose.

    ``field`` is the path of the wrong input (``sampling.top_p``, ``args.models[0].dtype``), or
    empty. ``retry_after_s`` is set where another attempt can succeed.
    """

    code: ClassVar[Code] = Code.INTERNAL

    def __init__(self, message: str, field: str = "", retry_after_s: float | None = None) -> None:
        # All arguments reach the base constructor, so that the error survives pickling by Ray.
        super().__init__(message, field, retry_after_s)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message

    def to_wire(self) -> dict[str, Any]:
        """Return the error as a msgpack-able dictionary; :func:`error_from_wire` reads it back."""
        return {
            "code": self.code.value,
            "message": self.message,
            "field": self.field,
            "retry_after_s": self.retry_after_s,
        }


class ConfigError(ExpertMeshError):
    """The deployment's configuration is wrong; ``field`` is its YAML path."""

    code = Code.INVALID_ARGUMENT


class CheckpointError(ExpertMeshError):
    """A checkpoint's files are missing, damaged or contradictory; ``field`` is the file."""

    code = Code.INVALID_ARGUMENT


class CheckpointMissingError(CheckpointError):
    """No checkpoint lies under the path, on this node or on any other node that was asked."""


class InvalidRequestError(ExpertMeshError):
    """A request is wrong; ``field`` is the wrong part."""

    code = Code.INVALID_ARGUMENT


class SlowBodyError(InvalidRequestError):
    """A request body did not arrive in time."""


class MediaTypeError(InvalidRequestError):
    """A request body has a type that the API does not accept."""


class UnauthenticatedError(ExpertMeshError):
    """A request without a key of this deployment, where it asks for one."""

    code = Code.UNAUTHENTICATED


class ForbiddenError(ExpertMeshError):
    """A request that this client, or this page in a browser, may not make."""

    code = Code.PERMISSION_DENIED


class UnknownModelError(ExpertMeshError):
    """A request names a model that is not served here."""

    code = Code.NOT_FOUND


class UnsupportedError(ExpertMeshError):
    """A request uses a feature of the API that this deployment does not have."""

    code = Code.UNIMPLEMENTED


class OverloadedError(ExpertMeshError):
    """A bounded queue is full; the caller may try again after ``retry_after_s``."""

    code = Code.RESOURCE_EXHAUSTED


class TooLargeError(OverloadedError):
    """A request is larger than the deployment accepts; another attempt cannot succeed."""


class SlowReaderError(OverloadedError):
    """A client did not read its stream for too long, so the stream was ended."""


REPLACED = "the model was replaced while the request was in flight; retry the request"


class ExpertUnavailableError(ExpertMeshError):
    """No live copy of an expert answered in time."""

    code = Code.UNAVAILABLE


class UnavailableError(ExpertMeshError):
    """A part of the cluster (a router, the controller) does not answer at the moment."""

    code = Code.UNAVAILABLE


class NoRoomError(UnavailableError):
    """A memory has no room: ``needed_bytes`` are wanted of ``where``, and ``free_bytes`` are free.

    More may be free than are needed, but in pieces.
    """

    def __init__(self, where: str, needed_bytes: int, free_bytes: int, field: str) -> None:
        missing_bytes = needed_bytes - free_bytes
        if missing_bytes > 0:
            lack = f"lacks {missing_bytes:,} bytes of the {needed_bytes:,} that are needed"
        else:
            lack = f"has no {needed_bytes:,} contiguous bytes, though more are free"
        super().__init__(f"{where} {lack}", field)
        self.args = (where, needed_bytes, free_bytes, field)  # what pickling calls this with
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes

    @property
    def missing_bytes(self) -> int:
        """The bytes that are needed beyond the free ones, at least 0."""
        return max(0, self.needed_bytes - self.free_bytes)


class ModelReplacedError(UnavailableError):
    """The model was replaced by a redeploy while a request was under way; nothing is mixed."""

    def __init__(self, message: str = REPLACED) -> None:
        super().__init__(message, "", 1.0)


class DeadlineExceededError(ExpertMeshError):
    """The request's own deadline has passed."""

    code = Code.DEADLINE_EXCEEDED


class CancelledRequestError(ExpertMeshError):
    """The client disconnected or cancelled the request."""

    code = Code.CANCELLED


class WrongPlacementError(ExpertMeshError):
    """An actor does not hold the requested expert: the caller's placement is old."""

    code = Code.UNAVAILABLE


class StaleEpochError(ExpertMeshError):
    """A controller that a newer controller has replaced still gives orders."""

    code = Code.UNAVAILABLE


class FrameError(ExpertMeshError):
    """A frame of the data plane is malformed."""

    code = Code.INVALID_ARGUMENT


class NotFiniteError(ExpertMeshError):
    """The model's own output for a request is NaN or infinite, so that no token can be drawn."""

    code = Code.INTERNAL


class PoisonedRequestError(ExpertMeshError):
    """A request that fails a step or kills a process even when computed alone."""

    code = Code.INTERNAL


class ExpertFailedError(ExpertMeshError):
    """An expert of a mixture raised an error for some rows; ``field`` is its name."""

    code = Code.INTERNAL


class InternalError(ExpertMeshError):
    """A failure of ExpertMesh itself; the details are only in the server's log."""

    code = Code.INTERNAL


def being_deleted() -> UnavailableError:
    """Return the error of a request whose deployment is deleted meanwhile."""
    return UnavailableError("the deployment is being deleted", "", 1.0)


_BY_CODE: dict[Code, type[ExpertMeshError]] = {
    Code.INVALID_ARGUMENT: InvalidRequestError,
    Code.NOT_FOUND: UnknownModelError,
    Code.UNAUTHENTICATED: UnauthenticatedError,
    Code.PERMISSION_DENIED: ForbiddenError,
    Code.RESOURCE_EXHAUSTED: OverloadedError,
    Code.UNAVAILABLE: UnavailableError,
    Code.DEADLINE_EXCEEDED: DeadlineExceededError,
    Code.CANCELLED: CancelledRequestError,
    Code.UNIMPLEMENTED: UnsupportedError,
    Code.INTERNAL: InternalError,
}


def error_from_wire(wire: dict[str, Any]) -> ExpertMeshError:
    """Rebuild an error from :meth:`ExpertMeshError.to_wire`; the code decides the class."""
    cls = _BY_CODE[Code(wire["code"])]
    return cls(wire["message"], wire["field"], wire["retry_after_s"])


_MAX_CHARS = 60
_MAX_NAME_CHARS = 120
_MAX_INTEGER_BITS = 128


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class where it has none.

    A device's driver adds lines of advice.
    """
    return next(iter(str(error).splitlines()), type(error).__name__)


def shown(value: object) -> str:
    """Return a short, printable form of a value, without the items of a container."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > _MAX_INTEGER_BITS:
            return "a very large integer"
    elif isinstance(value, (str, bytes)):
        value = value[: _MAX_CHARS + 1]
    elif value is not None and not isinstance(value, (bool, float)):
        kind = "mapping" if isinstance(value, dict) else type(value).__name__
        return f"a {kind} of {len(value)}" if isinstance(value, Sized) else f"a {kind}"
    text = repr(value)
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}..."


def shown_name(name: str) -> str:
    """Return a short, printable name unchanged, and any other name as :func:`shown` does."""
    return name if name.isprintable() and len(name) <= _MAX_NAME_CHARS else shown(name)
