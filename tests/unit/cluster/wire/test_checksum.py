"""Checksums of frames: CRC-32C as its standard has it, and every flipped bit is found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.wire.checksum import CHECKSUM_BYTES, sealed, unsealed


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        # RFC 3720, B.4, little-endian as the bytes travel.
        (bytes(32), "aa36918a"),
        (b"\xff" * 32, "43aba862"),
        (bytes(range(32)), "4e79dd46"),
        (b"123456789", "839206e3"),
        (b"", "00000000"),
    ],
)
def test_the_checksum_is_the_standards(data: bytes, checksum: str) -> None:
    assert b"".join(sealed((data,)))[len(data) :].hex() == checksum


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_a_frame_comes_back_from_its_buffers(buffers: list[bytes]) -> None:
    data = b"".join(sealed(tuple(buffers)))
    assert len(data) == sum(map(len, buffers)) + CHECKSUM_BYTES
    for given_as in (data, memoryview(data), memoryview(bytearray(data))):
        frame = unsealed(given_as)
        assert frame is not None
        assert bytes(frame) == b"".join(buffers)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_damage_is_found(frame: bytes, data: st.DataObject) -> None:
    whole = b"".join(sealed((frame,)))
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = int.from_bytes(whole, "little") ^ 1 << bit
    assert unsealed(flipped.to_bytes(len(whole), "little")) is None
    # All but one of 2**32 frames that are cut short are found; none of these is that one.
    assert all(unsealed(whole[:end]) is None for end in range(len(whole) - 4, len(whole)))


@pytest.mark.parametrize("size", range(CHECKSUM_BYTES))
def test_what_is_shorter_than_a_checksum_is_damaged(size: int) -> None:
    assert unsealed(bytes(size)) is None
