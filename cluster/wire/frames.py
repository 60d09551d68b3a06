"""Frames of the data plane: what a router sends to an expert actor for one layer, and the answer.

A frame is a header and a body. The header begins with the fields of :data:`_START`; the fields of
its kind follow. The body of a dispatch frame and of a rows frame is the raw
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
DAMAGED_FRAME = "DamagedFrame"
"""The kind of the error that answers a corrupted frame."""
_NO_SIZES = 0, 0, 0
"""The sizes that only a dispatch frame has, in the headers of other frames."""


# Every header begins so. The version's place never changes; a change to any other field is another
# FRAME_VERSION.
_START = struct.Struct(
    "<"
    "H"  # version
    "B"  # kind
    "B"  # dtype, by DTYPE_CODES; 0 in an error frame
    "B"  # A; 0 in an error frame
    "H"  # E; 0 in other than dispatch frames
    "B"  # bytes of the model's name; likewise
    "B"  # bytes of the trace context; likewise, and in a frame that is not traced
    "Q"  # request id
    "I"  # P; 0 in an error frame
)
_ROWS = "{0}I"  # axes of a row
_DISPATCH = (
    "{0}I"  # axes of a row
    "{1}H"  # expert ids
    "{1}I"  # rows of each expert
    "d"  # time left, seconds
    "I"  # layer id
    "{2}s"  # the model's name
    "{3}s"  # trace context
)
MAX_AXES = 4
"""The most axes of one row."""
DTYPE_CODES = {"float32": 1, "bfloat16": 2, "float16": 3, "float64": 4}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}

Buffer = bytes | memoryview
Shape = tuple[int, ...]
Buffers = tuple[Buffer, ...]
"""The bytes of one frame, to be sent one buffer after the other."""


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
    model: str
    layer_id: int
    expert_ids: tuple[int, ...]
    num_tokens_per_expert: tuple[int, ...]
    num_rows: int
    row_shape: Shape
    dtype: str
    rows: Buffer
    time_left_s: float
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

    @property
    def is_damage(self) -> bool:
        """Whether the frame was corrupted, which says nothing about its sender."""
        return self.kind == DAMAGED_FRAME

    @classmethod
    def of_damage(cls) -> ErrorFrame:
        """Return the answer to a frame whose checksum is wrong."""
        error = FrameError("is corrupted: its checksum does not match", "frame")
        return cls(0, DAMAGED_FRAME, error)


Frame = DispatchFrame | RowsFrame | ErrorFrame
_ERROR_KEYS = {"code", "message", "field", "retry_after_s"}
_KNOWN_ERRORS = {cls.__name__: cls for cls in (WrongPlacementError, FrameError, ExpertFailedError)}


def encode(frame: Frame, more_rows: Buffers = ()) -> Buffers:
    """Return the frame's bytes; the rows are not copied.

    ``more_rows`` are the rows of a dispatch frame that lie elsewhere than its first rows.
    Raises ``struct.error`` for a number or a name that does not fit its field.
    """
    if isinstance(frame, DispatchFrame):
        return _dispatch_header(frame), frame.rows, *more_rows
    if isinstance(frame, RowsFrame):
        num_axes, dtype_code = len(frame.row_shape), DTYPE_CODES[frame.dtype]
        header = _rows_layout(num_axes).header.pack(
            FRAME_VERSION,
            ROWS_KIND,
            dtype_code,
            num_axes,
            *_NO_SIZES,
            frame.request_id,
            frame.num_rows,
            *frame.row_shape,
        )
        return header, *frame.rows
    header = _ERROR.pack(FRAME_VERSION, ERROR_KIND, 0, 0, *_NO_SIZES, frame.request_id, 0)
    return (header + msgpack.packb((frame.kind, frame.error.to_wire())),)


def _dispatch_header(frame: DispatchFrame) -> bytes:
    name, trace = frame.model.encode(), (frame.traceparent or "").encode()
    sizes = len(frame.row_shape), len(frame.expert_ids), len(name), len(trace)
    return _dispatch_layout(*sizes).header.pack(
        FRAME_VERSION,
        DISPATCH_KIND,
        DTYPE_CODES[frame.dtype],
        *sizes,
        frame.request_id,
        frame.num_rows,
        *frame.row_shape,
        *frame.expert_ids,
        *frame.num_tokens_per_expert,
        frame.time_left_s,
        frame.layer_id,
        name,
        trace,
    )


class _Layout(NamedTuple):
    """The layout of a header, with padding to the body, and that of its fields after the start."""

    header: struct.Struct
    own: struct.Struct


def _layout(fields: str) -> _Layout:
    header = f"{_START.format}{fields}"
    padded = f"{header}{-struct.calcsize(header) % ALIGNMENT}x"
    return _Layout(struct.Struct(padded), struct.Struct(f"<{fields}"))


@lru_cache(1024)
def _dispatch_layout(num_axes: int, num_experts: int, name_bytes: int, trace_bytes: int) -> _Layout:
    return _layout(_DISPATCH.format(num_axes, num_experts, name_bytes, trace_bytes))


@lru_cache
def _rows_layout(num_axes: int) -> _Layout:
    return _layout(_ROWS.format(num_axes))


_ERROR = _layout("").header


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
    (
        version,
        kind,
        dtype_code,
        num_axes,
        num_experts,
        name_bytes,
        trace_bytes,
        request_id,
        num_rows,
    ) = _START.unpack_from(view)
    if version != FRAME_VERSION:
        raise FrameError(f"version {version}; this build reads {FRAME_VERSION}", "frame")
    if kind == DISPATCH_KIND:
        layout = _dispatch_layout(num_axes, num_experts, name_bytes, trace_bytes)
    elif kind == ROWS_KIND:
        layout = _rows_layout(num_axes)
    elif kind == ERROR_KIND:
        return _decode_error(view, request_id)
    else:
        raise FrameError(f"unknown kind {kind}", "frame.kind")
    begin = layout.header.size
    if num_bytes < begin:
        raise _cut_off(num_bytes, begin)
    fields = layout.own.unpack_from(view, _START.size)
    dtype = _DTYPES.get(dtype_code)
    if dtype is None:
        raise FrameError(f"unknown dtype {dtype_code}", "frame.dtype")
    if not 0 < num_axes <= MAX_AXES:
        raise FrameError(f"must have 1 to {MAX_AXES} axes (given: {num_axes})", "frame.row_shape")
    row_shape, rows = fields[:num_axes], view[begin:]
    rows_bytes = num_rows * prod(row_shape) * DTYPE_BYTES[dtype]
    if len(rows) != rows_bytes or not rows_bytes:
        raise FrameError(
            f"must be {num_rows} rows of {' x '.join(map(str, row_shape))} values of {dtype} "
            f"(given: {len(rows)} bytes)",
            "frame.rows",
        )
    if kind == ROWS_KIND:
        return RowsFrame(request_id, num_rows, row_shape, dtype, (rows,))
    ids_end = num_axes + num_experts
    counts_end = ids_end + num_experts
    expert_ids, counts = fields[num_axes:ids_end], fields[ids_end:counts_end]
    time_left_s, layer_id, name, trace = fields[counts_end:]
    if len(set(expert_ids)) != num_experts:
        raise FrameError("must differ from each other", "frame.expert_ids")
    if not all(counts) or sum(counts) != num_rows:
        raise FrameError(
            f"must each be at least 1, and {num_rows} together", "frame.num_tokens_per_expert"
        )
    traceparent = _traceparent(trace) if trace_bytes else None
    # In the order of the fields: by name it takes twice as long.
    return DispatchFrame(
        request_id,
        _model(name),
        layer_id,
        expert_ids,
        counts,
        num_rows,
        row_shape,
        dtype,
        rows,
        time_left_s,
        traceparent,
    )


def _cut_off(num_bytes: int, header_bytes: int) -> FrameError:
    return FrameError(
        f"is cut off: its header has {header_bytes} bytes, the frame {num_bytes}", "frame"
    )


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


def _decode_error(view: memoryview, request_id: int) -> ErrorFrame:
    if len(view) < _ERROR.size:
        raise _cut_off(len(view), _ERROR.size)
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
