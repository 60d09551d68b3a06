"""Frames of the data plane: what a router sends to an expert actor for one layer, and the answer.

A frame is eight bytes (version, kind, length of the header), a header (a msgpack array), and the
raw bytes of the rows, which begin at a multiple of ``ALIGNMENT`` so that a tensor can be made over
a received frame in place. Encoding gives the parts unjoined, so that rows are not copied to be
sent. Decoding takes memory in proportion to the header's own length; shapes and lengths are checked
against each other before a tensor is made of them, and nothing is ever unpickled.

Dimension letters: P (token, expert) pairs of a frame, H hidden size.
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack

from cluster.errors import (
    Code,
    ExpertMeshError,
    FrameError,
    WrongPlacementError,
    error_from_wire,
    shown,
)
from cluster.native import native

FRAME_VERSION = 2
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_HEADER_BYTES = 1 << 20
MAX_ROWS = 1 << 20
MAX_HIDDEN_SIZE = 1 << 20
MAX_EXPERTS = 1 << 16
MAX_RETRY_AFTER_S = 86_400.0
ALIGNMENT = 16
ROWS_HEADER = 4
"""So many fields of a rows frame are its header, in their order."""
_ROWS = ROWS_HEADER + 1
_DISPATCH_HEADER = 10
"""The same of a dispatch frame, without the trace context, which comes last."""
_START = struct.Struct("<HHI")  # version, kind, bytes of the header

Buffer = bytes | memoryview
Parts = tuple[Buffer, ...]
"""The bytes of one frame in pieces, to be sent one after the other."""


class FrameKind(enum.IntEnum):
    """What stands after the version in every frame."""

    DISPATCH = 1
    ROWS = 2
    ERROR = 3


# Tuples: made in one step, and the header is a piece of one.
class DispatchFrame(NamedTuple):
    """One layer's token rows for the experts of one actor.

    ``rows`` are P×H values of ``dtype``, row-major, little-endian, grouped by expert: the first
    ``num_tokens_per_expert[0]`` rows are for ``expert_ids[0]``, and so on. A token that two experts
    of the actor take is there twice, so that each expert's rows lie together as its product wants
    them. The answer has one row per pair in the same order. ``deadline_s`` is wall-clock time; an
    actor may drop the work after it. ``traceparent`` is the W3C trace context of a frame that is
    traced; others' headers are without it.
    """

    request_id: int
    epoch: int
    placement_version: int
    model: str
    layer_id: int
    expert_ids: tuple[int, ...]
    num_tokens_per_expert: tuple[int, ...]
    dtype: str
    hidden_size: int
    deadline_s: float
    rows: Buffer
    traceparent: str | None = None

    @property
    def num_pairs(self) -> int:
        """P, the number of rows."""
        return sum(self.num_tokens_per_expert)


class RowsFrame(NamedTuple):
    """An actor's answer: P×H unweighted output rows of ``dtype``, in the order of the pairs.

    They may be in several pieces, which are sent one after the other; received they are one.
    """

    request_id: int
    dtype: str
    num_rows: int
    hidden_size: int
    rows: Parts


@dataclass(frozen=True, slots=True)
class ErrorFrame:
    """An actor's refusal; ``kind`` is the error's class name, so that a router can react to it."""

    request_id: int
    kind: str
    error: ExpertMeshError


Frame = DispatchFrame | RowsFrame | ErrorFrame
_KNOWN_ERRORS = {cls.__name__: cls for cls in (WrongPlacementError, FrameError)}


def encode(frame: Frame) -> Parts:
    """Return the frame's bytes in parts; the rows are not copied."""
    if isinstance(frame, DispatchFrame):
        header: tuple[Any, ...] = frame[:_DISPATCH_HEADER]
        if frame.traceparent is not None:
            header = (*header, frame.traceparent)
        return _start(FrameKind.DISPATCH, header), frame.rows
    if isinstance(frame, RowsFrame):
        return _start(FrameKind.ROWS, frame[:ROWS_HEADER]), *frame.rows
    refusal = (frame.request_id, frame.kind, frame.error.to_wire())
    return (_start(FrameKind.ERROR, refusal),)


def joined(parts: Parts) -> Buffer:
    """Return the bytes in one piece."""
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _start(kind: FrameKind, header: tuple[Any, ...]) -> bytes:
    start = None if native is None else native.pack(FRAME_VERSION, kind, header)
    return _packed(kind, header) if start is None else start


def _packed(kind: FrameKind, header: tuple[Any, ...]) -> bytes:
    packed: bytes = msgpack.packb(header)
    padding = -(_START.size + len(packed)) % ALIGNMENT
    return _START.pack(FRAME_VERSION, kind, len(packed)) + packed + bytes(padding)


def decode(data: Buffer) -> Frame:
    """Parse and check a frame; the rows of the result are a view of ``data``.

    Raises :class:`FrameError` naming the field for anything malformed: an unknown version, kind or
    dtype, a wrong type, a count outside its bounds, or bytes whose length disagrees with the shape.
    """
    view = memoryview(data)
    fields = None if native is None else native.decode(view, FRAME_VERSION)
    if fields is None:
        return _decode(view)
    kind: type[DispatchFrame | RowsFrame] = RowsFrame if len(fields) == _ROWS else DispatchFrame
    return tuple.__new__(kind, fields)


def _decode(view: memoryview) -> Frame:
    if len(view) < _START.size:
        raise FrameError(f"must have at least {_START.size} bytes (given: {len(view)})", "frame")
    version, kind, size = _START.unpack_from(view)
    if version != FRAME_VERSION:
        raise FrameError(f"version {version}; this build reads {FRAME_VERSION}", "frame")
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise FrameError(f"unknown kind {kind}", "frame.kind")
    end = _START.size + size
    if size > MAX_HEADER_BYTES or end > len(view):
        raise FrameError(f"a header of {size} bytes in a frame of {len(view)}", "frame")
    try:
        header = msgpack.unpackb(view[_START.size : end], use_list=False, raw=False)
    except Exception as error:  # msgpack raises a family of types for malformed input
        raise FrameError(f"is not msgpack ({type(error).__name__})", "frame.header") from None
    if not isinstance(header, tuple):
        raise FrameError("must be an array", "frame.header")
    return decoder(header, view[end + -end % ALIGNMENT :])


def _integer(value: Any, field: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise FrameError(f"must be an integer in {low}..{high} (given: {shown(value)})", field)
    return value


def _text(value: Any, field: str) -> str:
    if type(value) is not str or not 0 < len(value) <= 256:
        raise FrameError(f"must be a string of 1 to 256 characters (given: {shown(value)})", field)
    return value


def _check_size(payload: memoryview, expected_bytes: int) -> None:
    if len(payload) != expected_bytes:
        raise FrameError(
            f"must be {expected_bytes} bytes as the shape says (given: {len(payload)})",
            "frame.rows",
        )


def _dtype(value: Any) -> str:
    if type(value) is not str or value not in DTYPE_BYTES:
        allowed = ", ".join(sorted(DTYPE_BYTES))
        raise FrameError(f"must be one of {allowed} (given: {shown(value)})", "frame.dtype")
    return value


def _check_arity(header: tuple[Any, ...], *allowed: int) -> None:
    if len(header) not in allowed:
        sizes = " or ".join(map(str, allowed))
        raise FrameError(f"must have {sizes} elements (given: {len(header)})", "frame.header")


def _traceparent(value: Any) -> str:
    if type(value) is not str or not _TRACEPARENT.fullmatch(value):
        raise FrameError(
            f"must be a W3C trace context, 00-…-…-… (given: {shown(value)})", "frame.traceparent"
        )
    return value


_U63 = (1 << 63) - 1
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def _decode_dispatch(header: tuple[Any, ...], payload: memoryview) -> DispatchFrame:
    _check_arity(header, 10, 11)
    expert_ids = _id_list(header[5], "frame.expert_ids", 0, MAX_EXPERTS)
    counts = _id_list(header[6], "frame.num_tokens_per_expert", 1, MAX_ROWS)
    if not expert_ids or len(expert_ids) != len(counts) or len(set(expert_ids)) != len(expert_ids):
        raise FrameError("needs distinct ids, one count each", "frame.expert_ids")
    num_pairs = _integer(sum(counts), "frame.num_tokens_per_expert", 1, MAX_ROWS)
    dtype = _dtype(header[7])
    hidden_size = _integer(header[8], "frame.hidden_size", 1, MAX_HIDDEN_SIZE)
    deadline_s = header[9]
    if type(deadline_s) is not float:
        raise FrameError("must be a float", "frame.deadline_s")
    _check_size(payload, num_pairs * hidden_size * DTYPE_BYTES[dtype])
    return DispatchFrame(
        request_id=_integer(header[0], "frame.request_id", 0, _U63),
        epoch=_integer(header[1], "frame.epoch", 0, _U63),
        placement_version=_integer(header[2], "frame.placement_version", 0, _U63),
        model=_text(header[3], "frame.model"),
        layer_id=_integer(header[4], "frame.layer_id", 0, 1 << 20),
        expert_ids=expert_ids,
        num_tokens_per_expert=counts,
        dtype=dtype,
        hidden_size=hidden_size,
        deadline_s=deadline_s,
        rows=payload,
        traceparent=_traceparent(header[10]) if len(header) > 10 else None,
    )


def _id_list(value: Any, field: str, low: int, high: int) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > MAX_EXPERTS:
        raise FrameError(f"must be an array of at most {MAX_EXPERTS} integers", field)
    if set(map(type, value)) - {int} or (value and (min(value) < low or max(value) > high)):
        for item in value:
            _integer(item, field, low, high)  # names the first that is wrong
    return value


def _decode_rows(header: tuple[Any, ...], payload: memoryview) -> RowsFrame:
    _check_arity(header, 4)
    dtype = _dtype(header[1])
    num_rows = _integer(header[2], "frame.num_rows", 1, MAX_ROWS)
    hidden_size = _integer(header[3], "frame.hidden_size", 1, MAX_HIDDEN_SIZE)
    _check_size(payload, num_rows * hidden_size * DTYPE_BYTES[dtype])
    request_id = _integer(header[0], "frame.request_id", 0, _U63)
    return RowsFrame(request_id, dtype, num_rows, hidden_size, (payload,))


def _decode_error(header: tuple[Any, ...], payload: memoryview) -> ErrorFrame:
    _check_arity(header, 3)
    _check_size(payload, 0)
    request_id = _integer(header[0], "frame.request_id", 0, _U63)
    kind = _text(header[1], "frame.error_kind")
    wire = header[2]
    if not isinstance(wire, dict) or set(wire) != {"code", "message", "field", "retry_after_s"}:
        raise FrameError("must be an error's dictionary", "frame.error")
    if type(wire["code"]) is not str or wire["code"] not in set(Code):
        raise FrameError(f"unknown code {shown(wire['code'])}", "frame.error.code")
    if type(wire["message"]) is not str or type(wire["field"]) is not str:
        raise FrameError("message and field must be strings", "frame.error")
    retry_after_s = wire["retry_after_s"]
    if retry_after_s is not None and not _is_wait(retry_after_s):
        raise FrameError(
            f"must be nil or from 0 to {MAX_RETRY_AFTER_S:g} (given: {shown(retry_after_s)})",
            "frame.error.retry_after_s",
        )
    known = _KNOWN_ERRORS.get(kind)
    error = error_from_wire(wire) if known is None else known(wire["message"], wire["field"])
    return ErrorFrame(request_id, kind, error)


def _is_wait(value: Any) -> bool:
    # NaN compares false.
    return type(value) in (int, float) and 0 <= value <= MAX_RETRY_AFTER_S


_DECODERS: dict[int, Callable[[tuple[Any, ...], memoryview], Frame]] = {
    FrameKind.DISPATCH: _decode_dispatch,
    FrameKind.ROWS: _decode_rows,
    FrameKind.ERROR: _decode_error,
}
