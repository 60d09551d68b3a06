"""The frame codec: every frame survives the wire, every malformed one is a FrameError and cheap."""

from __future__ import annotations

import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from math import prod
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    ExpertMeshError,
    FrameError,
    InternalError,
    OverloadedError,
    WrongPlacementError,
    error_from_wire,
)
from cluster.spec import FRAME_VERSION
from cluster.wire.frames import (
    ALIGNMENT,
    DISPATCH_KIND,
    DTYPE_BYTES,
    ERROR_KIND,
    MAX_AXES,
    MAX_ERROR_BYTES,
    ROWS_KIND,
    DispatchFrame,
    ErrorFrame,
    Frame,
    RowsFrame,
    decode,
    encode,
    joined,
)
from tests.unit.bomb import EXECUTED, pickled_bomb

NUMBERS = st.integers(0, (1 << 64) - 1)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=60)
PLAIN_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
DTYPES = st.sampled_from(sorted(DTYPE_BYTES))
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=MAX_AXES).map(tuple)
TRACEPARENT = r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]"


@st.composite
def dispatch_frames(draw: st.DrawFn) -> DispatchFrame:
    expert_ids = draw(st.lists(st.integers(0, 65_535), min_size=1, max_size=5, unique=True))
    size = len(expert_ids)
    counts = draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))
    dtype, shape = draw(DTYPES), draw(SHAPES)
    num_bytes = sum(counts) * prod(shape) * DTYPE_BYTES[dtype]
    return DispatchFrame(
        request_id=draw(NUMBERS),
        num_rows=sum(counts),
        time_left_s=draw(st.floats(allow_nan=False)),
        layer_id=draw(st.integers(0, (1 << 32) - 1)),
        row_shape=shape,
        model=draw(NAMES),
        expert_ids=tuple(expert_ids),
        num_tokens_per_expert=tuple(counts),
        dtype=dtype,
        rows=draw(st.binary(min_size=num_bytes, max_size=num_bytes)),
        traceparent=draw(st.none() | st.from_regex(TRACEPARENT, fullmatch=True)),
    )


@st.composite
def rows_frames(draw: st.DrawFn) -> RowsFrame:
    dtype, num_rows, shape = draw(DTYPES), draw(st.integers(1, 4)), draw(SHAPES)
    num_bytes = num_rows * prod(shape) * DTYPE_BYTES[dtype]
    rows = draw(st.binary(min_size=num_bytes, max_size=num_bytes))
    return RowsFrame(draw(NUMBERS), num_rows, shape, dtype, (rows,))


@st.composite
def error_frames(draw: st.DrawFn) -> ErrorFrame:
    kinds: tuple[type[ExpertMeshError], ...] = (
        CancelledRequestError,
        DeadlineExceededError,
        FrameError,
        InternalError,
        OverloadedError,
        WrongPlacementError,
    )
    cls = draw(st.sampled_from(kinds))
    # The actor's own two errors never carry a retry hint, and their frames drop one.
    hint = None if cls in (FrameError, WrongPlacementError) else draw(st.floats(0, 100))
    error = cls(draw(PLAIN_TEXT), draw(PLAIN_TEXT), hint)
    return ErrorFrame(draw(NUMBERS), cls.__name__, error)


FRAMES: st.SearchStrategy[Frame] = dispatch_frames() | rows_frames() | error_frames()
DISPATCH = DispatchFrame(
    request_id=7,
    num_rows=3,
    time_left_s=1.5,
    layer_id=3,
    row_shape=(3,),
    model="m",
    expert_ids=(4, 6),
    num_tokens_per_expert=(2, 1),
    dtype="float32",
    rows=bytes(36),
)
ROWS = RowsFrame(7, 2, (3,), "bfloat16", (bytes(12),))
DEEP = DISPATCH._replace(row_shape=(1, 3, 1, 1))
DEEP_ROWS = ROWS._replace(row_shape=(3, 1))
ERROR = ErrorFrame(7, "OverloadedError", OverloadedError("full", "queue", 0.5))
CONTEXT = f"00-{'a' * 32}-{'b' * 16}-01"
TRACED = DISPATCH._replace(traceparent=CONTEXT)


def wire_of(frame: Frame) -> bytes:
    """All bytes of a frame."""
    return b"".join(encode(frame))


def described(frame: Frame) -> Any:
    """A frame in a form that compares by value, errors too."""
    if isinstance(frame, ErrorFrame):
        return (frame.request_id, frame.kind, type(frame.error), frame.error.to_wire())
    if isinstance(frame, RowsFrame):
        return frame._replace(rows=(bytes(joined(frame.rows)),))
    return frame._replace(rows=bytes(frame.rows))


# The layout a second time, and what stands in the frames above, so that one field can be wrong.
START = {"version": ("H", 6), "kind": ("B", 1), "dtype": ("B", 1), "num_axes": ("B", 1)}
SIZES = {"num_experts": ("H", 2), "name_bytes": ("B", 1), "trace_bytes": ("B", 0)}
NO_SIZES = {name: (code, 0) for name, (code, _) in SIZES.items()}
DISPATCH_FIELDS: dict[str, tuple[str, Any]] = {
    **START,
    **SIZES,
    "request_id": ("Q", 7),
    "num_rows": ("I", 3),
    "row_shape": ("I", (3,)),
    "expert_ids": ("H", (4, 6)),
    "num_tokens_per_expert": ("I", (2, 1)),
    "time_left_s": ("d", 1.5),
    "layer_id": ("I", 3),
    "model": ("s", b"m"),
    "traceparent": ("s", b""),
}
ROWS_FIELDS: dict[str, tuple[str, Any]] = {
    **START,
    "kind": ("B", 2),
    "dtype": ("B", 2),
    **NO_SIZES,
    "request_id": ("Q", 7),
    "num_rows": ("I", 2),
    "row_shape": ("I", (3,)),
}
ERROR_FIELDS: dict[str, tuple[str, Any]] = {
    **START,
    "kind": ("B", 3),
    "dtype": ("B", 0),
    "num_axes": ("B", 0),
    **NO_SIZES,
    "request_id": ("Q", 7),
    "num_rows": ("I", 0),
}


def header_of(fields: dict[str, tuple[str, Any]], **changes: object) -> bytes:
    """A header with some fields' values changed, padded."""
    assert changes.keys() <= fields.keys()
    header = b""
    for name, (code, value) in fields.items():
        value = changes.get(name, value)
        if isinstance(value, bytes):
            header += value
        else:
            values = value if isinstance(value, tuple) else (value,)
            header += struct.pack(f"<{len(values)}{code}", *values)
    return header + bytes(-len(header) % ALIGNMENT)


def dispatch_wire(rows: bytes = bytes(36), **changes: object) -> bytes:
    """The bytes of ``DISPATCH`` with some fields changed."""
    return header_of(DISPATCH_FIELDS, **changes) + rows


def rows_wire(rows: bytes = bytes(12), **changes: object) -> bytes:
    """The bytes of ``ROWS`` with some fields changed."""
    return header_of(ROWS_FIELDS, **changes) + rows


def error_wire(body: object, **changes: object) -> bytes:
    """An error frame of any body."""
    packed: bytes = body if isinstance(body, bytes) else msgpack.packb(body)
    return header_of(ERROR_FIELDS, **changes) + packed


def test_frames_have_the_layout_that_is_documented() -> None:
    assert wire_of(DISPATCH) == dispatch_wire()
    sizes = {"trace_bytes": 55, "traceparent": CONTEXT.encode()}
    assert wire_of(TRACED) == dispatch_wire(**sizes)
    assert wire_of(ROWS) == rows_wire()
    assert wire_of(ERROR) == error_wire(["OverloadedError", ERROR.error.to_wire()])
    # As others may read it: little-endian, version and kind first, rows at the end.
    assert wire_of(ROWS).hex() == (
        "06000202010000000007000000000000000200000003000000" + "00" * 7 + "00" * 12
    )


@given(FRAMES)
def test_every_frame_is_read_back_as_it_was_written(frame: Frame) -> None:
    if isinstance(frame, ErrorFrame):
        expected = error_from_wire(frame.error.to_wire())
        if frame.kind in ("FrameError", "WrongPlacementError"):
            expected = frame.error
        frame = ErrorFrame(frame.request_id, frame.kind, expected)
    assert described(decode(wire_of(frame))) == described(frame)
    assert described(decode(memoryview(bytearray(wire_of(frame))))) == described(frame)
    header, *rows = encode(frame)
    assert not rows or len(header) % ALIGNMENT == 0


def test_rows_are_views_of_what_was_received_and_may_be_sent_from_several_pieces() -> None:
    pieces = ROWS._replace(rows=(memoryview(bytes(range(5))), bytes(range(5, 12))))
    assert described(decode(wire_of(pieces))) == described(ROWS._replace(rows=(bytes(range(12)),)))
    received = bytearray(wire_of(DISPATCH))
    frame = decode(memoryview(received))
    assert isinstance(frame, DispatchFrame)
    received[-1] = 77
    assert frame.rows[-1] == 77


@settings(max_examples=300)
@given(st.data())
def test_mutated_frames_are_read_or_refused_and_never_fail_otherwise(data: st.DataObject) -> None:
    wire = bytearray(wire_of(data.draw(FRAMES)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(wire) - 1))
        wire[place] = data.draw(st.integers(0, 255))
    try:
        frame = decode(bytes(wire))
    except FrameError:
        return
    if not isinstance(frame, ErrorFrame):
        rows = joined(frame.rows) if isinstance(frame, RowsFrame) else frame.rows
        assert len(rows) == frame.num_rows * prod(frame.row_shape) * DTYPE_BYTES[frame.dtype]
    # What was accepted is itself a frame that can be written and read.
    encode(frame)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(wire: bytes) -> None:
    with pytest.raises(FrameError):
        decode(wire)


@pytest.mark.parametrize("frame", [DISPATCH, DEEP, TRACED, ROWS, DEEP_ROWS, ERROR])
def test_a_frame_cut_anywhere_or_followed_by_anything_is_refused(frame: Frame) -> None:
    wire = wire_of(frame)
    for end in range(len(wire)):
        with pytest.raises(FrameError) as caught:
            decode(wire[:end])
        assert caught.value.field.startswith("frame")
    with pytest.raises(FrameError):
        decode(wire + b"\xc0")


MOST_32 = (1 << 32) - 1
BAD_DISPATCH: list[tuple[dict[str, Any], str]] = [
    *(({"dtype": code}, "frame.dtype") for code in (0, 5, 255)),
    *(({"dtype": code}, "frame.rows") for code in (2, 3)),
    *(({"row_shape": (size,)}, "frame.rows") for size in (0, 2, 4, 1 << 31, MOST_32)),
    *(({"num_rows": count}, "frame.rows") for count in (0, 2, 4, 1 << 31, MOST_32)),
    *(({"rows": rows}, "frame.rows") for rows in (b"", bytes(24), bytes(35), bytes(37))),
    ({"num_rows": 0, "row_shape": (0,), "rows": b""}, "frame.rows"),
    ({"num_rows": 0, "rows": b""}, "frame.rows"),
    ({"row_shape": (0,), "rows": b""}, "frame.rows"),
    # As many bytes as there are, where the product is taken in 32 or 64 bits.
    ({"num_rows": 1 << 30, "row_shape": (1 << 30,), "rows": b""}, "frame.rows"),
    ({"num_rows": (1 << 30) + 3, "row_shape": (3,)}, "frame.rows"),
    ({"expert_ids": (4, 4)}, "frame.expert_ids"),
    ({"num_axes": 0, "row_shape": ()}, "frame.row_shape"),
    ({"num_axes": 5, "row_shape": (1, 3, 1, 1, 1)}, "frame.row_shape"),
    ({"num_axes": 255}, "frame"),
    ({"num_axes": 2, "row_shape": (3, 0)}, "frame.rows"),
    ({"num_axes": 4, "row_shape": (1 << 31, 1 << 31, 1 << 31, 1 << 31)}, "frame.rows"),
    ({"num_experts": 0, "expert_ids": (), "num_tokens_per_expert": ()}, "frame.num_tokens"),
    ({"num_experts": 1}, "frame"),
    ({"num_experts": 65_535}, "frame"),
    *(
        ({"num_tokens_per_expert": counts}, "frame.num_tokens")
        for counts in [(3, 0), (0, 3), (1, 1), (2, 2), (MOST_32, 4), (MOST_32, MOST_32)]
    ),
    ({"name_bytes": 0, "model": b""}, "frame.model"),
    *(({"model": name}, "frame.model") for name in (b"\xff", b"\xc3", b"\x80")),
    ({"name_bytes": 3, "model": b"\xed\xa0\x80"}, "frame.model"),
    ({"name_bytes": 255}, "frame"),
    ({"trace_bytes": 255}, "frame"),
    ({"trace_bytes": 1}, "frame.traceparent"),
]


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"num_axes": 0, "row_shape": (), "rows": b""}, "frame.row_shape"),
    ({"num_axes": 5, "row_shape": (1, 3, 1, 1, 1)}, "frame.row_shape"),
    ({"dtype": 5}, "frame.dtype"),
    *(({"num_rows": count}, "frame.rows") for count in (0, 3, MOST_32)),
    *(({"rows": rows}, "frame.rows") for rows in (b"", bytes(11), bytes(13))),
]


@pytest.mark.parametrize(
    ("wire", "changes", "field"),
    [
        *((dispatch_wire, *case) for case in BAD_DISPATCH),
        *((rows_wire, *case) for case in BAD_ROWS),
    ],
)
def test_a_frame_with_a_bad_field_is_refused(
    wire: Callable[..., bytes], changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(FrameError) as caught:
        decode(wire(**changes))
    assert caught.value.field.startswith(field)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "context", ["", "x", f"{CONTEXT}-", CONTEXT.upper(), f"\n{CONTEXT}", CONTEXT[:-1], "é" * 27]
)
def test_a_trace_context_that_is_none_is_refused(context: str) -> None:
    data = context.encode()
    wire = dispatch_wire(trace_bytes=len(data), traceparent=data)
    if not data:
        assert described(decode(wire)) == DISPATCH
        return
    with pytest.raises(FrameError, match="W3C") as caught:
        decode(wire)
    assert caught.value.field == "frame.traceparent"


WIRE = OverloadedError("full", "queue", 0.5).to_wire()
BAD_ERRORS: list[object] = [
    *([kind, WIRE] for kind in ["", "x" * 257, None, 3, b"x", ["x"], 1 << 63]),
    *(["x", wire] for wire in [None, [], "full", {}, {**WIRE, "more": 1}, {"code": 1}]),
    *(["x", {**WIRE, "code": code}] for code in ["", "no_such", None, 5, {}, [], [["x"]]]),
    *(["x", {**WIRE, "message": text}] for text in [None, 5, b"x", ["x"], {}]),
    *(["x", {**WIRE, "field": text}] for text in [None, 5, b"x", ["x"], {}]),
    *(["x", {**WIRE, "retry_after_s": hint}] for hint in ["1", True, [1], {}, b"1", -1, 1e9]),
    *(["x", {**WIRE, "retry_after_s": hint}] for hint in [float("nan"), float("inf")]),
    *(["x", {**WIRE, key: msgpack.ExtType(5, b"x" * 24)}] for key in WIRE),
    *([msgpack.Timestamp(1, 2), WIRE], ["x", msgpack.Timestamp(1, 2)]),
    *(["x"], ["x", WIRE, 0], [], "x", {"x": WIRE}, None),
    *(b"", b"\xc1", msgpack.packb(["x", WIRE]) + b"\xc0", b"\x92\xa1\xff\xc0"),
]


@pytest.mark.parametrize("body", BAD_ERRORS)
def test_an_error_frame_with_one_bad_field_is_refused(body: object) -> None:
    assert isinstance(decode(error_wire(["x", WIRE])), ErrorFrame)
    with pytest.raises(FrameError) as caught:
        decode(error_wire(body))
    assert caught.value.field.startswith("frame.error")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "wire", [dispatch_wire, rows_wire, lambda **k: error_wire(["x", WIRE], **k)]
)
def test_a_frame_of_another_version_or_kind_is_refused(wire: Any) -> None:
    for version in (0, FRAME_VERSION - 1, FRAME_VERSION + 1, 65_535):
        with pytest.raises(
            FrameError, match=f"version {version}; this build reads {FRAME_VERSION}"
        ):
            decode(wire(version=version))
    for kind in (0, 4, 255):
        with pytest.raises(FrameError, match="unknown kind"):
            decode(wire(kind=kind))
    good = decode(wire())
    for kind in (DISPATCH_KIND, ROWS_KIND, ERROR_KIND):
        try:
            other = decode(wire(kind=kind))
        except FrameError:
            continue
        assert type(other) is type(good)


@pytest.mark.parametrize(
    "frame",
    [
        DISPATCH._replace(model="m" * 256),
        DISPATCH._replace(model="é" * 128),
        DISPATCH._replace(request_id=-1),
        DISPATCH._replace(expert_ids=(4, 65_536)),
        DISPATCH._replace(num_tokens_per_expert=(2, -1)),
        DISPATCH._replace(expert_ids=(4, 6, 8)),
        DISPATCH._replace(layer_id=1 << 32),
        ROWS._replace(request_id=1 << 64),
        ROWS._replace(num_rows=-1),
        ErrorFrame(-1, ERROR.kind, ERROR.error),
    ],
)
def test_what_fits_no_field_is_not_written(frame: Frame) -> None:
    with pytest.raises(struct.error):
        encode(frame)


def test_experts_in_any_order_and_as_many_as_there_are_ids() -> None:
    ids = (*range(0, 65_536, 2), *range(1, 65_535, 2))
    counts = (1,) * 65_535
    frame = DISPATCH._replace(
        num_rows=65_535,
        row_shape=(1,),
        expert_ids=ids,
        num_tokens_per_expert=counts,
        rows=bytes(262_140),
    )
    assert described(decode(wire_of(frame))) == described(frame)


def test_nothing_is_kept_of_what_was_read_or_written() -> None:
    wire = memoryview(wire_of(DISPATCH))
    before = sys.getrefcount(wire)
    for _ in range(100):
        decode(wire)
        encode(DISPATCH)
    assert sys.getrefcount(wire) == before


def test_a_pickle_is_refused_and_its_code_does_not_run() -> None:
    pickled = pickled_bomb()
    for wire in (pickled, dispatch_wire(pickled), error_wire(pickled)):
        with pytest.raises(FrameError):
            decode(wire)
    assert EXECUTED == []


def nested(depth: int, innermost: bytes = b"\xc0") -> bytes:
    return b"\x91" * depth + innermost


BIG = MOST_32.to_bytes(4, "big")
ERROR_BOMBS: dict[str, bytes] = {
    "a deep array": nested(MAX_ERROR_BYTES - 1),
    "as deep as msgpack allows": nested(1000),
    "a deep error code": (
        b"\x92\xa1x\x84\xa4code"
        + nested(900)
        + b"\xa7message\xa0\xa5field\xa0\xadretry_after_s\xc0"
    ),
    "an array of 4 billion": b"\xdd" + BIG,
    "a map of 4 billion": b"\xdf" + BIG,
    "4 GB of bytes": b"\x92\xa1x\xc6" + BIG + b"x",
    "4 GB of text": b"\xdb" + BIG + b"x",
    "a 4 GB extension": b"\xc9" + BIG + b"\x01x",
    "arrays that each claim all that follows": (
        b"".join(b"\xdd" + (50_000).to_bytes(4, "big") for _ in range(1000)) + b"\xc0" * 50_000
    ),
    "many empty maps": b"\xdd" + (60_000).to_bytes(4, "big") + b"\x80" * 60_000,
    "a longer error than is read": msgpack.packb(["x", {**WIRE, "message": "x" * MAX_ERROR_BYTES}]),
    "a megabyte": bytes(1 << 20),
}
BOMBS: dict[str, bytes] = {
    **{name: error_wire(body) for name, body in ERROR_BOMBS.items()},
    "rows of 2**65 bytes": dispatch_wire(num_rows=MOST_32, row_shape=(MOST_32,)),
    "an answer of 2**65 bytes": rows_wire(num_rows=MOST_32, row_shape=(MOST_32,)),
    "all experts that there can be, and none": dispatch_wire(num_experts=65_535),
    "all experts that there can be, and no rows": dispatch_wire(
        b"",
        num_experts=65_535,
        expert_ids=tuple(range(65_535)),
        num_tokens_per_expert=(1,) * 65_535,
    ),
    "rows that are not there for all experts": dispatch_wire(
        b"",
        num_rows=MOST_32,
        num_experts=65_535,
        expert_ids=tuple(range(65_535)),
        num_tokens_per_expert=(MOST_32,) * 65_535,
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_quickly_and_within_little_memory(name: str) -> None:
    wire = BOMBS[name]
    tracemalloc.start()
    started_s = time.perf_counter()
    try:
        with pytest.raises(FrameError) as caught:
            decode(wire)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started_s < 2
    assert peak_bytes < 8 << 20
    assert len(str(caught.value)) < 200
