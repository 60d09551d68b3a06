"""Frames of the data plane: what a router sends to an expert actor for one layer, and the answer.

A frame is a header and a body. The header begins with the fields of :data:`_START`; the fields of
each kind follow, listed beside it. The body of a dispatch frame and of a rows frame is the raw
rows. They begin at a multiple of ``ALIGNMENT``, so that a tensor can be made over a received frame
in place. The body of an error frame is msgpack. All numbers are little-endian.

Encoding does not join header and rows, so that rows are not copied to be sent. Decoding compares
every length with the bytes that have come before it takes memory, and unpickles nothing.

Dimension letters: E experts of a frame, P its (token, expert) pairs, A axes of a row.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import msgpack

from cluster.errors import (
    Code,
    ExpertFailedError,
    ExpertMeshError,
    FrameError,
    WrongPlacementError,
    error_from_wire,
    shown,
)
from cluster.spec import FRAME_VERSION

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
MAX_ERROR_BYTES = 1 << 16
MAX_RETRY_AFTER_S = 86_400.0
ALIGNMENT = 16
DISPATCH_KIND, ROWS_KIND, ERROR_KIND = 1, 2, 3


def _padded(fields: str) -> struct.Struct:
    return struct.Struct(f"{fields}{-struct.calcsize(fields) % ALIGNMENT}x")


# The fields of all headers. Any change to them is another FRAME_VERSION, whose place never changes.
_START = struct.Struct(
    "<"
    "H"  # version
    "B"  # kind
    "B"  # dtype, by _DTYPE_CODES; 0 in an error frame
    "B"  # A; 0 in an error frame
    "H"  # E; 0 in other than dispatch frames
    "B"  # bytes of the model's name; likewise
    "B"  # bytes of the trace context; likewise, and in a frame that is not traced
)
_ROWS = (
    f"{_START.format}"
    "Q"  # request id
    "I"  # P
    "{0}I"  # axes of a row
)
_DISPATCH = (
    f"{_START.format}"
    "Q"  # request id
    "I"  # P
    "Q"  # epoch
    "Q"  # placement version
    "d"  # time left, seconds
    "I"  # layer id
    "{0}I"  # axes of a row
    "{1}H"  # expert ids
    "{1}I"  # rows of each expert
    "{2}s"  # the model's name
    "{3}s"  # trace context
)
_ERROR = _padded(
    f"{_START.format}Q"  # request id
)
_START_END, _ROWS_END, _DISPATCH_END = 7, 9, 13
"""Among a header's fields: the ends of the start, and of the numbers behind it."""
MAX_AXES = 4
"""The most axes of one row."""
_DTYPE_CODES = {"float32": 1, "bfloat16": 2, "float16": 3, "float64": 4}
_DTYPES = {code: dtype for dtype, code in _DTYPE_CODES.items()}

Buffer = bytes | memoryview
Shape = tuple[int, ...]
Buffers = tuple[Buffer, ...]
"""The bytes of one frame, to be sent one buffer after the other."""


# Tuples, whose first fields are those of the header: they are packed and made in one step.
class DispatchFrame(NamedTuple):
    """One layer's token rows for the experts of one actor.

    ``rows`` are P×``row_shape`` values of ``dtype``, little-endian, grouped by expert: the first
    ``num_tokens_per_expert[0]`` rows are for ``expert_ids[0]``, and so on. A token that two experts
    of the actor take is there twice, so that each expert's rows lie together as its product wants
    them. The answer has one row per pair in the same order. An actor may drop the work once the
    frame has been there for ``time_left_s``; hosts' clocks are never compared. ``traceparent`` is
    the W3C trace context of a frame that is traced.
    """

    request_id: int
    num_rows: int
    epoch: int
    placement_version: int
    time_left_s: float
    layer_id: int
    row_shape: Shape
    model: str
    expert_ids: tuple[int, ...]
    num_tokens_per_expert: tuple[int, ...]
    dtype: str
    rows: Buffer
    traceparent: str | None = None


class RowsFrame(NamedTuple):
    """An actor's answer: P unweighted output rows of ``dtype``, in the order of the pairs.

    They may be in several pieces, which are sent one after the other; received they are one.
    """

    request_id: int
    num_rows: int
    row_shape: Shape
    dtype: str
    rows: Buffers


@dataclass(frozen=True, slots=True)
class ErrorFrame:
    """An actor's refusal; ``kind`` is the error's class name, so that a router can react to it."""

    request_id: int
    kind: str
    error: ExpertMeshError


Frame = DispatchFrame | RowsFrame | ErrorFrame
_ERROR_KEYS = {"code", "message", "field", "retry_after_s"}
_KNOWN_ERRORS = {cls.__name__: cls for cls in (WrongPlacementError, FrameError, ExpertFailedError)}


def encode(frame: Frame) -> Buffers:
    """Return the frame's bytes; the rows are not copied.

    Raises ``struct.error`` for a number or a name that does not fit its field.
    """
    if isinstance(frame, DispatchFrame):
        return _dispatch_header(frame), frame.rows
    if isinstance(frame, RowsFrame):
        request_id, num_rows, shape, dtype, rows = frame
        num_axes, code = len(shape), _DTYPE_CODES[dtype]
        header = _rows(num_axes).pack(
            FRAME_VERSION, ROWS_KIND, code, num_axes, 0, 0, 0, request_id, num_rows, *shape
        )
        return header, *rows
    header = _ERROR.pack(FRAME_VERSION, ERROR_KIND, 0, 0, 0, 0, 0, frame.request_id)
    return (header + msgpack.packb((frame.kind, frame.error.to_wire())),)


def _dispatch_header(frame: DispatchFrame) -> bytes:
    name, trace = frame.model.encode(), (frame.traceparent or "").encode()
    sizes = len(frame.row_shape), len(frame.expert_ids), len(name), len(trace)
    return _dispatch(*sizes).pack(
        FRAME_VERSION,
        DISPATCH_KIND,
        _DTYPE_CODES[frame.dtype],
        *sizes,
        *frame[: _DISPATCH_END - _START_END],
        *frame.row_shape,
        *frame.expert_ids,
        *frame.num_tokens_per_expert,
        name,
        trace,
    )


@lru_cache(1024)
def _dispatch(num_axes: int, num_experts: int, name_bytes: int, trace_bytes: int) -> struct.Struct:
    """Return the layout of a dispatch frame's header, padded to where its rows begin."""
    return _padded(_DISPATCH.format(num_axes, num_experts, name_bytes, trace_bytes))


@lru_cache
def _rows(num_axes: int) -> struct.Struct:
    """Return the layout of a rows frame's header, padded to where its rows begin."""
    return _padded(_ROWS.format(num_axes))


def joined(buffers: Buffers) -> Buffer:
    """Return the bytes in one piece."""
    return buffers[0] if len(buffers) == 1 else b"".join(buffers)


def decode(data: Buffer) -> Frame:
    """Parse and check a frame; the rows of the result are a view of ``data``.

    Raises :class:`FrameError` naming the field for anything malformed: an unknown version, kind or
    dtype, a count outside its bounds, or bytes whose length disagrees with the shape.
    """
    # One function: every call costs as much as a check where other processes have had the caches.
    view = memoryview(data)
    num_bytes = len(view)
    if num_bytes < _START.size:
        raise _cut_off(num_bytes, _START.size)
    version, kind, dtype_code, num_axes, num_experts, name_bytes, trace_bytes = _START.unpack_from(
        view
    )
    if version != FRAME_VERSION:
        raise FrameError(f"version {version}; this build reads {FRAME_VERSION}", "frame")
    if kind == DISPATCH_KIND:
        header = _dispatch(num_axes, num_experts, name_bytes, trace_bytes)
    elif kind == ROWS_KIND:
        header = _rows(num_axes)
    elif kind == ERROR_KIND:
        return _decode_error(view)
    else:
        raise FrameError(f"unknown kind {kind}", "frame.kind")
    begin = header.size
    if num_bytes < begin:
        raise _cut_off(num_bytes, begin)
    fields = header.unpack_from(view)
    dtype = _DTYPES.get(dtype_code)
    if dtype is None:
        raise FrameError(f"unknown dtype {dtype_code}", "frame.dtype")
    if not 0 < num_axes <= MAX_AXES:
        raise FrameError(f"must have 1 to {MAX_AXES} axes (given: {num_axes})", "frame.row_shape")
    numbers_end = _ROWS_END if kind == ROWS_KIND else _DISPATCH_END
    shape_end = numbers_end + num_axes
    num_rows, shape = fields[_START_END + 1], fields[numbers_end:shape_end]
    rows_bytes = num_rows * prod(shape) * DTYPE_BYTES[dtype]
    if num_bytes - begin != rows_bytes or not rows_bytes:
        raise FrameError(
            f"must be {num_rows} rows of {' x '.join(map(str, shape))} values of {dtype} "
            f"(given: {num_bytes - begin} bytes)",
            "frame.rows",
        )
    rows = view[begin:]
    if kind == ROWS_KIND:
        return tuple.__new__(RowsFrame, (*fields[_START_END:_ROWS_END], shape, dtype, (rows,)))
    counts_begin = shape_end + num_experts
    expert_ids, counts = fields[shape_end:counts_begin], fields[counts_begin:-2]
    if len(set(expert_ids)) != num_experts:
        raise FrameError("must differ from each other", "frame.expert_ids")
    if not all(counts) or sum(counts) != num_rows:
        raise FrameError(
            f"must each be at least 1, and {num_rows} together", "frame.num_tokens_per_expert"
        )
    return tuple.__new__(
        DispatchFrame,
        (
            *fields[_START_END:_DISPATCH_END],
            shape,
            _model(fields[-2]),
            expert_ids,
            counts,
            dtype,
            rows,
            _traceparent(fields[-1]) if trace_bytes else None,
        ),
    )


def _cut_off(num_bytes: int, header_bytes: int) -> FrameError:
    return FrameError(f"a header of {header_bytes} bytes in a frame of {num_bytes}", "frame")


def _model(name: bytes) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise FrameError(f"must be text in UTF-8 (given: {shown(name)})", "frame.model")
    return text


_TRACEPARENT = re.compile(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def _traceparent(context: bytes) -> str:
    if not _TRACEPARENT.fullmatch(context):
        raise FrameError(
            f"must be a W3C trace context, 00-…-…-… (given: {shown(context)})", "frame.traceparent"
        )
    return context.decode()


def _decode_error(view: memoryview) -> ErrorFrame:
    if len(view) < _ERROR.size:
        raise _cut_off(len(view), _ERROR.size)
    *_, request_id = _ERROR.unpack_from(view)
    body = view[_ERROR.size :]
    if len(body) > MAX_ERROR_BYTES:
        raise FrameError(f"must have at most {MAX_ERROR_BYTES} bytes", "frame.error")
    try:
        # Nested arrays that each claim to be long would take memory beyond the body's bytes.
        fields = msgpack.unpackb(
            body, use_list=False, raw=False, max_array_len=2, max_map_len=len(_ERROR_KEYS)
        )
    except Exception as malformed:  # msgpack raises a family of types for malformed input
        raise FrameError(f"is not msgpack ({type(malformed).__name__})", "frame.error") from None
    if not isinstance(fields, tuple) or len(fields) != 2:
        raise FrameError("must be a kind and an error's dictionary", "frame.error")
    kind, wire = fields
    if type(kind) is not str or not 0 < len(kind) <= 256:
        raise FrameError(
            f"must be a string of 1 to 256 characters (given: {shown(kind)})", "frame.error_kind"
        )
    if not isinstance(wire, dict) or set(wire) != _ERROR_KEYS:
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
