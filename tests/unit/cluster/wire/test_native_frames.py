"""The native codec of frames' headers against msgpack and the checks in Python."""

from __future__ import annotations

import struct
import sys
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import FrameError
from cluster.native import native
from cluster.wire import frames
from cluster.wire.frames import (
    FRAME_VERSION,
    MAX_EXPERTS,
    MAX_HEADER_BYTES,
    DispatchFrame,
    RowsFrame,
    decode,
    encode,
)
from tests.unit.cluster.wire.test_frames import DISPATCH, ERROR, FRAMES, ROWS, described, wire_of

NEEDED = "these tests need the native code, and so a C compiler where this is installed"

VALUES = (
    st.integers(0, 2**63 - 1)
    | st.sampled_from([0, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32])
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
)
ODD = st.integers(-(2**65), 2**65) | st.none() | st.booleans() | st.binary() | st.lists(st.just(1))
HEADERS = st.lists(
    VALUES | st.lists(st.integers(0, 70_000), max_size=40).map(tuple), max_size=20
).map(tuple)


def packed(header: tuple[Any, ...]) -> bytes | None:
    assert native is not None, NEEDED
    start: bytes | None = native.pack(FRAME_VERSION, 1, header)
    return start


@settings(deadline=None, max_examples=300)
@given(HEADERS)
def test_what_is_packed_natively_has_the_bytes_of_msgpack(header: tuple[Any, ...]) -> None:
    start = packed(header)
    if start is None:  # longer than is packed natively, or with a longer string
        assert len(msgpack.packb(header)) > 255
    else:
        assert start == frames._packed(frames.FrameKind.DISPATCH, header)


@settings(deadline=None)
@given(HEADERS, ODD)
def test_an_unusual_header_is_left_to_msgpack(header: tuple[Any, ...], odd: Any) -> None:
    start = packed((*header, odd))
    assert start is None or start == frames._packed(frames.FrameKind.DISPATCH, (*header, odd))
    assert packed((*header, -1)) is None
    assert packed((*header, 2**63)) is None
    assert packed((*header, "\ud800")) is None
    assert packed(([*header],)) is None
    assert packed((((header,),),)) is None
    with pytest.raises(UnicodeEncodeError):
        frames._start(frames.FrameKind.DISPATCH, ("\ud800",))


@settings(deadline=None, max_examples=200)
@given(FRAMES)
def test_a_frame_is_read_the_same_by_both(frame: frames.Frame) -> None:
    view = memoryview(wire_of(frame))
    assert described(decode(view)) == described(frames._decode(view))


def read(wire: bytes) -> tuple[Any, ...] | None:
    assert native is not None, NEEDED
    fields: tuple[Any, ...] | None = native.decode(memoryview(wire), FRAME_VERSION)
    return fields


def test_usual_frames_are_read_natively_and_others_are_not() -> None:
    assert read(wire_of(DISPATCH)) is not None
    assert read(wire_of(ROWS)) is not None
    assert read(wire_of(ERROR)) is None
    for size in range(8):
        assert read(wire_of(DISPATCH)[:size]) is None
    assert read(wire_of(DISPATCH) + b"x") is None


@settings(deadline=None, max_examples=600)
@given(st.data())
def test_what_is_read_natively_is_what_the_checks_let_pass(data: st.DataObject) -> None:
    wire = bytearray(wire_of(data.draw(st.sampled_from([DISPATCH, ROWS]) | FRAMES)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, min(len(wire), 80) - 1))
        wire[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 40)) if data.draw(st.booleans()) else 0
    view = memoryview(bytes(wire[: len(wire) - cut]))
    fields = read(view.tobytes())
    if fields is not None:
        made = DispatchFrame(*fields) if len(fields) > 5 else RowsFrame(*fields)
        assert repr(described(made)) == repr(described(frames._decode(view)))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.sampled_from([1, 2, 3]))
def test_noise_is_not_read(noise: bytes, kind: int) -> None:
    assert read(noise) is None
    wire = struct.pack("<HHI", FRAME_VERSION, kind, len(noise)) + noise
    if (fields := read(wire)) is not None:
        assert frames._decode(memoryview(wire)) is not None, fields


def with_header(*header: Any, rows: int = 0) -> bytes:
    start = frames._packed(frames.FrameKind.DISPATCH, header)
    return start + bytes(rows)


@pytest.mark.parametrize(
    "wire",
    [
        with_header(1, 1, 1, "m", 0, (1, 1), (1, 1), "float32", 1, 1.0, rows=8),
        with_header(1, 1, 1, "m", 0, (), (), "float32", 1, 1.0),
        with_header(1, 1, 1, "m", 0, (1, 2), (1,), "float32", 1, 1.0, rows=4),
        with_header(1, 1, 1, "m", 0, (1,), (0,), "float32", 1, 1.0),
        with_header(1, 1, 1, "m", 0, (MAX_EXPERTS + 1,), (1,), "float32", 1, 1.0, rows=4),
        with_header(1, 1, 1, "m" * 257, 0, (1,), (1,), "float32", 1, 1.0, rows=4),
        with_header(1, 1, 1, "", 0, (1,), (1,), "float32", 1, 1.0, rows=4),
        with_header(1, 1, 1, "m", 0, (1,), (1,), "float64", 1, 1.0, rows=8),
        with_header(1, 1, 1, "m", 0, (1,), (1,), "float32", 0, 1.0),
        with_header(1, 1, 1, "m", 0, (1,), (1,), "float32", 1, 1, rows=4),
        with_header(1, 1, 1, "m", 0, (1, 2), (2**20, 1), "float32", 1, 1.0, rows=4),
        with_header(1, 1, 2**63, "m", 0, (1,), (1,), "float32", 1, 1.0, rows=4),
        with_header(1, 1, 1, "m", 0, (1,), (1,), "float32", 1, 1.0, rows=3),
    ],
)
def test_what_the_checks_refuse_is_not_read(wire: bytes) -> None:
    assert read(wire) is None
    with pytest.raises(FrameError):
        decode(wire)


def test_experts_in_any_order_and_many_of_them_are_read() -> None:
    ids = (*range(0, 60_000, 2), *range(1, 60_000, 2))
    wire = with_header(1, 1, 1, "m", 0, ids, (1,) * 60_000, "bfloat16", 1, 1.0, rows=120_000)
    assert len(wire) < MAX_HEADER_BYTES
    assert read(wire) is None
    frame = decode(wire)
    assert isinstance(frame, DispatchFrame)
    assert frame.expert_ids == ids
    assert described(decode(wire_of(frame))) == described(frame)
    ascending = with_header(1, 1, 1, "m", 0, (1, 9), (1, 1), "bfloat16", 1, 1.0, rows=4)
    assert read(ascending) is not None


def test_nothing_is_kept_of_what_was_read_or_packed() -> None:
    wire = memoryview(wire_of(DISPATCH))
    before = sys.getrefcount(wire)
    for _ in range(100):
        decode(wire)
        encode(DISPATCH)
        read(wire_of(ERROR))
    assert sys.getrefcount(wire) == before
