"""The frame codec: every frame survives the wire, every malformed one is a FrameError and cheap."""

from __future__ import annotations

import pickle
import struct
import time
import tracemalloc
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
from cluster.wire.frames import (
    ALIGNMENT,
    DTYPE_BYTES,
    FRAME_VERSION,
    MAX_EXPERTS,
    MAX_HEADER_BYTES,
    MAX_HIDDEN_SIZE,
    MAX_ROWS,
    DispatchFrame,
    ErrorFrame,
    Frame,
    FrameKind,
    RowsFrame,
    decode,
    encode,
    joined,
)

NUMBERS = st.integers(0, (1 << 63) - 1)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40)
PLAIN_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
DTYPES = st.sampled_from(sorted(DTYPE_BYTES))
DISPATCH_FIELDS = (
    "request_id",
    "epoch",
    "placement_version",
    "model",
    "layer_id",
    "expert_ids",
    "num_tokens_per_expert",
    "dtype",
    "hidden_size",
    "deadline_s",
)
TRACEPARENT = r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]"
ROWS_FIELDS = ("request_id", "dtype", "num_rows", "hidden_size")
ERROR_FIELDS = ("request_id", "error_kind", "error")


@st.composite
def dispatch_frames(draw: st.DrawFn) -> DispatchFrame:
    expert_ids = draw(st.lists(st.integers(0, MAX_EXPERTS), min_size=1, max_size=5, unique=True))
    size = len(expert_ids)
    counts = draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))
    dtype, hidden_size = draw(DTYPES), draw(st.integers(1, 8))
    num_bytes = sum(counts) * hidden_size * DTYPE_BYTES[dtype]
    return DispatchFrame(
        request_id=draw(NUMBERS),
        epoch=draw(NUMBERS),
        placement_version=draw(NUMBERS),
        model=draw(NAMES),
        layer_id=draw(st.integers(0, 1 << 20)),
        expert_ids=tuple(expert_ids),
        num_tokens_per_expert=tuple(counts),
        dtype=dtype,
        hidden_size=hidden_size,
        deadline_s=draw(st.floats(allow_nan=False)),
        rows=draw(st.binary(min_size=num_bytes, max_size=num_bytes)),
        traceparent=draw(st.none() | st.from_regex(TRACEPARENT, fullmatch=True)),
    )


@st.composite
def rows_frames(draw: st.DrawFn) -> RowsFrame:
    dtype, num_rows, hidden_size = draw(DTYPES), draw(st.integers(1, 4)), draw(st.integers(1, 8))
    num_bytes = num_rows * hidden_size * DTYPE_BYTES[dtype]
    rows = draw(st.binary(min_size=num_bytes, max_size=num_bytes))
    return RowsFrame(draw(NUMBERS), dtype, num_rows, hidden_size, (rows,))


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
    epoch=1,
    placement_version=2,
    model="m",
    layer_id=3,
    expert_ids=(4, 6),
    num_tokens_per_expert=(2, 1),
    dtype="float32",
    hidden_size=3,
    deadline_s=1.5,
    rows=bytes(36),
)
ROWS = RowsFrame(7, "bfloat16", 2, 3, (bytes(12),))
ERROR = ErrorFrame(7, "OverloadedError", OverloadedError("full", "queue", 0.5))


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


def assembled(
    header: bytes, payload: bytes = b"", kind: int = 1, version: int = FRAME_VERSION
) -> bytes:
    """A frame of any header and payload, laid out as the format says."""
    start = struct.pack("<HHI", version, kind, len(header)) + header
    return start + bytes(-len(start) % ALIGNMENT) + payload


def taken_apart(frame: Frame) -> tuple[list[Any], bytes, int]:
    """A frame's header, its payload and its kind."""
    wire = wire_of(frame)
    _, kind, size = struct.unpack_from("<HHI", wire)
    return msgpack.unpackb(wire[8 : 8 + size]), wire[-(-(8 + size) // 16) * 16 :], kind


def altered(frame: Frame, field: str, value: object) -> bytes:
    """The frame's bytes with one element replaced by ``value``."""
    header, payload, kind = taken_apart(frame)
    if field == "rows":
        assert isinstance(value, bytes)
        payload = value
    else:
        names = {DispatchFrame: DISPATCH_FIELDS, RowsFrame: ROWS_FIELDS, ErrorFrame: ERROR_FIELDS}
        header[names[type(frame)].index(field)] = value
    return assembled(msgpack.packb(header), payload, kind)


@settings(deadline=None)
@given(FRAMES)
def test_every_frame_is_read_back_as_it_was_written(frame: Frame) -> None:
    if isinstance(frame, ErrorFrame):
        expected = error_from_wire(frame.error.to_wire())
        if frame.kind in ("FrameError", "WrongPlacementError"):
            expected = frame.error
        frame = ErrorFrame(frame.request_id, frame.kind, expected)
    assert described(decode(wire_of(frame))) == described(frame)
    assert described(decode(memoryview(bytearray(wire_of(frame))))) == described(frame)


@settings(deadline=None)
@given(FRAMES)
def test_the_rows_begin_at_an_aligned_place(frame: Frame) -> None:
    assert len(encode(frame)[0]) % ALIGNMENT == 0


def test_rows_may_be_views_of_memory_in_several_pieces() -> None:
    frame = ROWS._replace(rows=(memoryview(bytes(range(5))), bytes(range(5, 12))))
    answer = decode(wire_of(frame))
    assert described(answer) == described(ROWS._replace(rows=(bytes(range(12)),)))


def test_the_rows_of_a_decoded_frame_are_views_of_what_was_received() -> None:
    received = bytearray(wire_of(DISPATCH))
    frame = decode(memoryview(received))
    assert isinstance(frame, DispatchFrame)
    received[-1] = 77
    assert frame.rows[-1] == 77


@settings(deadline=None, max_examples=300)
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
        count = frame.num_rows if isinstance(frame, RowsFrame) else frame.num_pairs
        rows = joined(frame.rows) if isinstance(frame, RowsFrame) else frame.rows
        assert len(rows) == count * frame.hidden_size * DTYPE_BYTES[frame.dtype]
    # What was accepted is itself a frame that can be written and read.
    encode(frame)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(wire: bytes) -> None:
    with pytest.raises(FrameError):
        decode(wire)


@pytest.mark.parametrize("frame", [DISPATCH, ROWS, ERROR])
def test_a_frame_cut_anywhere_or_followed_by_anything_is_refused(frame: Frame) -> None:
    wire = wire_of(frame)
    header = sum(map(len, encode(frame)[:1]))
    ends = [end for end in range(len(wire)) if end < header - ALIGNMENT or end >= header]
    for end in ends:
        with pytest.raises(FrameError):
            decode(wire[:end])
    with pytest.raises(FrameError, match="as the shape says"):
        decode(wire + b"\xc0")


BAD_INTEGERS: list[object] = [-1, 0.0, 1.0, True, False, None, "1", b"1", [1], {}, 1 << 63]
BAD_DISPATCH: list[tuple[str, object]] = [
    *(("request_id", value) for value in BAD_INTEGERS),
    *(("epoch", value) for value in BAD_INTEGERS),
    *(("placement_version", value) for value in BAD_INTEGERS),
    *(("layer_id", value) for value in [*BAD_INTEGERS, (1 << 20) + 1]),
    *(("hidden_size", value) for value in [*BAD_INTEGERS, 0, 2, 4, MAX_HIDDEN_SIZE + 1]),
    *(("model", value) for value in ["", "m" * 257, 1, None, b"m", ["m"]]),
    *(("dtype", value) for value in ["", "int8", "float64", "FLOAT32", 1, None, b"float32", {}]),
    *(("dtype", value) for value in ["bfloat16", "float16"]),
    *(("deadline_s", value) for value in [1, None, "1", True, [1.5]]),
    *(("rows", value) for value in [b"", bytes(24), bytes(35), bytes(37)]),
    *(("expert_ids", value) for value in [[4], [4, 4], [4, 6, 8], [], [4, -1], [4, True], {}]),
    *(("expert_ids", value) for value in [[4, 6.0], [4, MAX_EXPERTS + 1], 4, b"46", [[4], [6]]]),
    *(("num_tokens_per_expert", value) for value in [[3], [3, 0], [4, -1], [2, 1, 1], [], 3]),
    *(("num_tokens_per_expert", value) for value in [[2, True], [2, 1.0], [1, 1], [2, 2]]),
    *(("num_tokens_per_expert", value) for value in [[MAX_ROWS, MAX_ROWS], [1 << 62, 1 << 62]]),
]


CONTEXT = f"00-{'a' * 32}-{'b' * 16}-01"


def test_a_frame_that_is_not_traced_says_nothing_of_traces() -> None:
    """So that an actor of an older build reads it."""
    header, _, _ = taken_apart(DISPATCH)
    traced, _, _ = taken_apart(DISPATCH._replace(traceparent=CONTEXT))
    assert (len(header), traced) == (len(DISPATCH_FIELDS), [*header, CONTEXT])


@pytest.mark.parametrize(
    "value", ["", None, 1, CONTEXT.encode(), f"{CONTEXT}-", CONTEXT.upper(), f"\n{CONTEXT}", [1]]
)
def test_a_trace_context_that_is_none_is_refused(value: object) -> None:
    header, payload, kind = taken_apart(DISPATCH)
    with pytest.raises(FrameError, match="W3C") as caught:
        decode(assembled(msgpack.packb([*header, value]), payload, kind))
    assert caught.value.field == "frame.traceparent"
    with pytest.raises(FrameError, match="10 or 11 elements"):
        decode(assembled(msgpack.packb([*header, CONTEXT, 1]), payload, kind))


@pytest.mark.parametrize(("field", "value"), BAD_DISPATCH)
def test_a_dispatch_frame_with_one_bad_field_is_refused(field: str, value: object) -> None:
    with pytest.raises(FrameError) as caught:
        decode(altered(DISPATCH, field, value))
    assert caught.value.field.startswith("frame")
    assert len(str(caught.value)) < 200


BAD_ROWS: list[tuple[str, object]] = [
    *(("request_id", value) for value in BAD_INTEGERS),
    *(("num_rows", value) for value in [*BAD_INTEGERS, 0, 3, MAX_ROWS]),
    *(("hidden_size", value) for value in [*BAD_INTEGERS, 0, 4, MAX_HIDDEN_SIZE]),
    *(("dtype", value) for value in ["float32", "int8", None, 2]),
    *(("rows", value) for value in [b"", bytes(11), bytes(13)]),
]


@pytest.mark.parametrize(("field", "value"), BAD_ROWS)
def test_a_rows_frame_with_one_bad_field_is_refused(field: str, value: object) -> None:
    with pytest.raises(FrameError):
        decode(altered(ROWS, field, value))


WIRE = OverloadedError("full", "queue", 0.5).to_wire()
BAD_ERRORS: list[tuple[str, object]] = [
    *(("request_id", value) for value in BAD_INTEGERS),
    *(("error_kind", value) for value in ["", "x" * 257, None, 3, b"x", ["x"]]),
    *(("error", value) for value in [None, [], "full", {}, {**WIRE, "more": 1}, {"code": 1}]),
    *(("error", {**WIRE, "code": code}) for code in ["", "no_such", None, 5, {}, [], [["x"]]]),
    *(("error", {**WIRE, "message": text}) for text in [None, 5, b"x", ["x"], {}]),
    *(("error", {**WIRE, "field": text}) for text in [None, 5, b"x", ["x"], {}]),
    *(("error", {**WIRE, "retry_after_s": hint}) for hint in ["1", True, [1], {}, b"1"]),
]


@pytest.mark.parametrize(("field", "value"), BAD_ERRORS)
def test_an_error_frame_with_one_bad_field_is_refused(field: str, value: object) -> None:
    with pytest.raises(FrameError):
        decode(altered(ERROR, field, value))


@pytest.mark.parametrize("frame", [DISPATCH, ROWS, ERROR])
def test_a_frame_with_an_element_too_many_or_too_few_is_refused(frame: Frame) -> None:
    body, payload, kind = taken_apart(frame)
    for wrong in (body[:-1], [*body, 0], body[:1], [], body[0], {"frame": body}):
        with pytest.raises(FrameError):
            decode(assembled(msgpack.packb(wrong), payload, kind))


@pytest.mark.parametrize("frame", [DISPATCH, ROWS, ERROR])
def test_a_frame_of_another_version_kind_or_header_length_is_refused(frame: Frame) -> None:
    body, payload, kind = taken_apart(frame)
    header = msgpack.packb(body)
    for version in (0, FRAME_VERSION - 1, FRAME_VERSION + 1, 65_535):
        with pytest.raises(FrameError, match="version"):
            decode(assembled(header, payload, kind, version))
    for other in {0, 4, 65_535, *FrameKind} - {kind}:
        with pytest.raises(FrameError):
            decode(assembled(header, payload, other))
    wire = wire_of(frame)
    for size in (0, len(header) - 1, len(header) + 1, MAX_HEADER_BYTES + 1, (1 << 32) - 1):
        with pytest.raises(FrameError):
            decode(wire[:4] + struct.pack("<I", size) + wire[8:])


@pytest.mark.parametrize("place", range(len(DISPATCH_FIELDS)))
def test_extension_types_are_refused_in_every_field(place: int) -> None:
    for extension in (msgpack.ExtType(5, b"x" * 24), msgpack.Timestamp(1, 2)):
        body, payload, kind = taken_apart(DISPATCH)
        body[place] = extension
        with pytest.raises(FrameError):
            decode(assembled(msgpack.packb(body), payload, kind))


EXECUTED: list[str] = []


def execute(what: str) -> None:
    EXECUTED.append(what)


class Bomb:
    """Unpickled, it leaves a trace."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return execute, ("ran",)


def test_a_pickle_is_refused_and_its_code_does_not_run() -> None:
    pickled = pickle.dumps(Bomb())
    pickle.loads(pickled)
    assert EXECUTED == ["ran"]  # the bomb works
    EXECUTED.clear()
    for wire in (pickled, altered(DISPATCH, "rows", pickled), altered(DISPATCH, "model", pickled)):
        with pytest.raises(FrameError):
            decode(wire)
    assert EXECUTED == []


def nested(depth: int, innermost: bytes = b"\xc0") -> bytes:
    return b"\x91" * depth + innermost


BIG = (1 << 32) - 1
HEADER_BOMBS: dict[str, tuple[bytes, int]] = {
    "a deep array": (nested(1_000_000), 1),
    "as deep as msgpack allows": (nested(1000), 1),
    "a deep request id": (b"\x94" + nested(1000) + b"\xa7float32\x01\x01", 2),
    "a deep error code": (
        b"\x93\x07\xa1x\x84\xa4code"
        + nested(900)
        + b"\xa7message\xa0\xa5field\xa0\xadretry_after_s\xc0",
        3,
    ),
    "an array of 4 billion": (b"\xdd" + BIG.to_bytes(4, "big"), 1),
    "a map of 4 billion": (b"\xdf" + BIG.to_bytes(4, "big"), 1),
    "4 GB of bytes": (b"\x94\x07\xa7float32\x01\xc6" + BIG.to_bytes(4, "big") + b"x", 2),
    "4 GB of text": (b"\xdb" + BIG.to_bytes(4, "big") + b"x", 1),
    "a 4 GB extension": (b"\xc9" + BIG.to_bytes(4, "big") + b"\x01x", 1),
    "arrays that each claim all that follows": (
        b"".join(b"\xdd" + (200_000).to_bytes(4, "big") for _ in range(1000)) + b"\xc0" * 200_000,
        1,
    ),
    "many empty maps": (b"\xdd" + (100_000).to_bytes(4, "big") + b"\x80" * 100_000, 1),
}
BOMBS: dict[str, bytes] = {
    **{name: assembled(header, b"", kind) for name, (header, kind) in HEADER_BOMBS.items()},
    "rows of 2**40 bytes": altered(ROWS._replace(num_rows=MAX_ROWS), "hidden_size", 1 << 20),
    "a long text for a number": altered(DISPATCH, "epoch", "x" * 200_000),
    "many experts": altered(DISPATCH, "expert_ids", list(range(MAX_EXPERTS + 1))),
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
    assert peak_bytes < 96 << 20
    assert len(str(caught.value)) < 200
