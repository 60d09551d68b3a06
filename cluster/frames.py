"""Frames of the data plane: what a router sends to an expert actor for one layer, and the answer.

A frame is a msgpack array whose last element is the raw bytes of the rows. Decoding takes memory in
proportion to the frame's own length; shapes and lengths are checked against each other before a
tensor is made of them, and nothing is ever unpickled.

Dimension letters: N unique token rows of the frame, P (token row, expert) pairs, H hidden size.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from cluster.errors import Code, ExpertMeshError, FrameError, WrongPlacementError, error_from_wire

FRAME_VERSION = 1
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_ROWS = 1 << 20
MAX_HIDDEN_SIZE = 1 << 20
MAX_EXPERTS = 1 << 16
INDEX_BYTES = 4


class FrameKind(enum.IntEnum):
    """First number after the version in every frame."""

    DISPATCH = 1
    ROWS = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class DispatchFrame:
    """One layer's token rows for the experts of one actor.

    ``rows`` are N×H values of ``dtype``, row-major, little-endian. The pairs are grouped by expert:
    ``num_tokens_per_expert[i]`` of them belong to ``expert_ids[i]``, and ``row_index`` (P
    little-endian int32) says which row each pair takes. The answer has one row per pair in the
    same order. ``deadline_s`` is wall-clock time; an actor may drop the work after it.
    """

    request_id: int
    epoch: int
    placement_version: int
    model: str
    layer_id: int
    expert_ids: tuple[int, ...]
    num_tokens_per_expert: tuple[int, ...]
    dtype: str
    num_rows: int
    hidden_size: int
    deadline_s: float
    row_index: bytes
    rows: bytes | memoryview

    @property
    def num_pairs(self) -> int:
        """P, the number of (token row, expert) pairs."""
        return sum(self.num_tokens_per_expert)


@dataclass(frozen=True, slots=True)
class RowsFrame:
    """An actor's answer: P×H unweighted output rows of ``dtype``, in the order of the pairs."""

    request_id: int
    dtype: str
    num_rows: int
    hidden_size: int
    rows: bytes | memoryview


@dataclass(frozen=True, slots=True)
class ErrorFrame:
    """An actor's refusal; ``kind`` is the error's class name, so that a router can react to it."""

    request_id: int
    kind: str
    error: ExpertMeshError


Frame = DispatchFrame | RowsFrame | ErrorFrame
_KNOWN_ERRORS = {cls.__name__: cls for cls in (WrongPlacementError, FrameError)}


def encode(frame: Frame) -> bytes:
    """Return the frame as bytes."""
    if isinstance(frame, DispatchFrame):
        body = [
            FRAME_VERSION,
            FrameKind.DISPATCH,
            frame.request_id,
            frame.epoch,
            frame.placement_version,
            frame.model,
            frame.layer_id,
            frame.expert_ids,
            frame.num_tokens_per_expert,
            frame.dtype,
            frame.num_rows,
            frame.hidden_size,
            frame.deadline_s,
            frame.row_index,
            frame.rows,
        ]
    elif isinstance(frame, RowsFrame):
        body = [
            FRAME_VERSION,
            FrameKind.ROWS,
            frame.request_id,
            frame.dtype,
            frame.num_rows,
            frame.hidden_size,
            frame.rows,
        ]
    else:
        error = frame.error.to_wire()
        body = [FRAME_VERSION, FrameKind.ERROR, frame.request_id, frame.kind, error]
    return msgpack.packb(body)  # type: ignore[no-any-return]


def decode(data: bytes | memoryview) -> Frame:
    """Parse and check a frame.

    Raises :class:`FrameError` naming the field for anything malformed: an unknown version, kind or
    dtype, a wrong type, a count outside its bounds, or bytes whose length disagrees with the shape.
    """
    try:
        body = msgpack.unpackb(data, use_list=False, raw=False)
    except Exception as error:  # msgpack raises a family of types for malformed input
        raise FrameError(f"is not msgpack ({type(error).__name__})", "frame") from None
    if not isinstance(body, tuple) or len(body) < 3:
        raise FrameError("must be an array of at least 3 elements", "frame")
    version, kind = body[0], body[1]
    if type(version) is not int or version != FRAME_VERSION:
        raise FrameError(f"version {_shown(version)}; this build reads {FRAME_VERSION}", "frame")
    if type(kind) is not int:
        raise FrameError(f"unknown kind {_shown(kind)}", "frame.kind")
    decoders: dict[int, Callable[[tuple[Any, ...]], Frame]] = {
        FrameKind.DISPATCH: _decode_dispatch,
        FrameKind.ROWS: _decode_rows,
        FrameKind.ERROR: _decode_error,
    }
    decoder = decoders.get(kind)
    if decoder is None:
        raise FrameError(f"unknown kind {_shown(kind)}", "frame.kind")
    return decoder(body[2:])


def _shown(value: Any) -> str:
    """Return a value for a message; never the inside of a container, which can be deep or huge."""
    if isinstance(value, (str, bytes)):
        return repr(value[:40])
    scalar = value is None or isinstance(value, (bool, int, float))
    return repr(value) if scalar else f"a {type(value).__name__}"


def _integer(value: Any, field: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise FrameError(f"must be an integer in {low}..{high} (given: {_shown(value)})", field)
    return value


def _text(value: Any, field: str) -> str:
    if type(value) is not str or not 0 < len(value) <= 256:
        raise FrameError(f"must be a string of 1 to 256 characters (given: {_shown(value)})", field)
    return value


def _rows(value: Any, field: str, expected_bytes: int) -> bytes:
    if type(value) is not bytes or len(value) != expected_bytes:
        size = len(value) if type(value) is bytes else type(value).__name__
        raise FrameError(f"must be {expected_bytes} bytes as the shape says (given: {size})", field)
    return value


def _dtype(value: Any) -> str:
    if type(value) is not str or value not in DTYPE_BYTES:
        allowed = ", ".join(sorted(DTYPE_BYTES))
        raise FrameError(f"must be one of {allowed} (given: {_shown(value)})", "frame.dtype")
    return value


def _arity(body: tuple[Any, ...], expected: int) -> None:
    if len(body) != expected:
        raise FrameError(f"must have {expected + 2} elements (given: {len(body) + 2})", "frame")


_U63 = (1 << 63) - 1


def _decode_dispatch(body: tuple[Any, ...]) -> DispatchFrame:
    _arity(body, 13)
    expert_ids = _id_list(body[5], "frame.expert_ids", 0, MAX_EXPERTS)
    counts = _id_list(body[6], "frame.num_tokens_per_expert", 1, MAX_ROWS)
    if not expert_ids or len(expert_ids) != len(counts) or len(set(expert_ids)) != len(expert_ids):
        raise FrameError("needs distinct ids, one count each", "frame.expert_ids")
    num_pairs = _integer(sum(counts), "frame.num_tokens_per_expert", 1, MAX_ROWS)
    dtype = _dtype(body[7])
    num_rows = _integer(body[8], "frame.num_rows", 1, MAX_ROWS)
    hidden_size = _integer(body[9], "frame.hidden_size", 1, MAX_HIDDEN_SIZE)
    deadline_s = body[10]
    if type(deadline_s) is not float:
        raise FrameError("must be a float", "frame.deadline_s")
    return DispatchFrame(
        request_id=_integer(body[0], "frame.request_id", 0, _U63),
        epoch=_integer(body[1], "frame.epoch", 0, _U63),
        placement_version=_integer(body[2], "frame.placement_version", 0, _U63),
        model=_text(body[3], "frame.model"),
        layer_id=_integer(body[4], "frame.layer_id", 0, 1 << 20),
        expert_ids=expert_ids,
        num_tokens_per_expert=counts,
        dtype=dtype,
        num_rows=num_rows,
        hidden_size=hidden_size,
        deadline_s=deadline_s,
        row_index=_rows(body[11], "frame.row_index", num_pairs * INDEX_BYTES),
        rows=_rows(body[12], "frame.rows", num_rows * hidden_size * DTYPE_BYTES[dtype]),
    )


def _id_list(value: Any, field: str, low: int, high: int) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > MAX_EXPERTS:
        raise FrameError(f"must be an array of at most {MAX_EXPERTS} integers", field)
    if set(map(type, value)) - {int} or (value and (min(value) < low or max(value) > high)):
        for item in value:
            _integer(item, field, low, high)  # names the first that is wrong
    return value


def _decode_rows(body: tuple[Any, ...]) -> RowsFrame:
    _arity(body, 5)
    dtype = _dtype(body[1])
    num_rows = _integer(body[2], "frame.num_rows", 1, MAX_ROWS)
    hidden_size = _integer(body[3], "frame.hidden_size", 1, MAX_HIDDEN_SIZE)
    rows = _rows(body[4], "frame.rows", num_rows * hidden_size * DTYPE_BYTES[dtype])
    request_id = _integer(body[0], "frame.request_id", 0, _U63)
    return RowsFrame(request_id, dtype, num_rows, hidden_size, rows)


def _decode_error(body: tuple[Any, ...]) -> ErrorFrame:
    _arity(body, 3)
    request_id = _integer(body[0], "frame.request_id", 0, _U63)
    kind = _text(body[1], "frame.error_kind")
    wire = body[2]
    if not isinstance(wire, dict) or set(wire) != {"code", "message", "field", "retry_after_s"}:
        raise FrameError("must be an error's dictionary", "frame.error")
    if type(wire["code"]) is not str or wire["code"] not in set(Code):
        raise FrameError(f"unknown code {_shown(wire['code'])}", "frame.error.code")
    if type(wire["message"]) is not str or type(wire["field"]) is not str:
        raise FrameError("message and field must be strings", "frame.error")
    if wire["retry_after_s"] is not None and type(wire["retry_after_s"]) not in (int, float):
        raise FrameError("must be a number or nil", "frame.error.retry_after_s")
    known = _KNOWN_ERRORS.get(kind)
    error = error_from_wire(wire) if known is None else known(wire["message"], wire["field"])
    return ErrorFrame(request_id, kind, error)
