"""Channels: messages over one socket, with native code and without."""

from __future__ import annotations

import secrets
import socket
import struct
import tempfile
import threading
import time
from types import ModuleType

import pytest

from cluster.transport.stream import channel as channel_module
from cluster.transport.stream.channel import BUFFER_BYTES, KEPT_BUFFER_BYTES, Channel
from tests.unit.cluster.transport.channels import read_messages

LIMIT_S = 60.0
pytestmark = pytest.mark.usefixtures("native")


def channels() -> tuple[Channel, Channel]:
    left, right = socket.socketpair()
    return Channel(left), Channel(right)


def test_messages_that_come_byte_by_byte_are_put_together() -> None:
    left, right = channels()
    sent = [(1, b"abc"), (2, b""), (3, bytes(range(64)))]
    wire = b"".join(
        struct.pack("<QQ", len(frame), call_id) + frame + bytes(-len(frame) % 16)
        for call_id, frame in sent
    )
    messages: list[tuple[int, bytes]] = []
    for place in range(len(wire)):
        left.sock.send(wire[place : place + 1])
        messages += [(call_id, bytes(frame)) for call_id, frame in right.receive()]
    assert messages == sent


def test_many_messages_in_one_piece_are_taken_apart() -> None:
    left, right = channels()
    sent = [(i, secrets.token_bytes(i % 50)) for i in range(100)]
    for call_id, frame in sent:
        left.send(call_id, (frame,))
    assert read_messages(right, 100) == sent


def test_what_the_socket_does_not_take_is_sent_later_in_order() -> None:
    left, right = channels()
    sent = [(i, secrets.token_bytes(300_001)) for i in range(5)]
    for call_id, frame in sent:
        left.send(call_id, (frame[:7], frame[7:]))
    assert left.outgoing
    messages: list[tuple[int, bytes]] = []
    deadline_s = time.monotonic() + LIMIT_S
    while len(messages) < 5:
        assert time.monotonic() < deadline_s
        left.flush()
        messages += [(call_id, bytes(frame)) for call_id, frame in right.receive()]
    assert messages == sent
    assert not left.outgoing


def test_a_message_in_many_parts_is_one() -> None:
    left, right = channels()
    buffers = tuple(secrets.token_bytes(7) for _ in range(3000))  # more than one call can send
    left.send(1, buffers[:64])
    left.send(2, buffers)
    left.send(3)
    whole = [(1, b"".join(buffers[:64])), (2, b"".join(buffers)), (3, b"")]
    assert read_messages(right, 3) == whole


def test_nothing_is_sent_or_received_once_a_channel_is_closed() -> None:
    left, right = channels()
    left.close()
    with tempfile.TemporaryFile() as file:  # has the number of what was closed
        with pytest.raises(OSError, match=r"\w"):
            left.send(1, (b"lost",))
        with pytest.raises(OSError, match=r"\w"):
            left.receive()
        assert file.read() == b""
    with pytest.raises(OSError, match=r"\w"):
        right.send(1, (b"lost",))
    with pytest.raises(ConnectionError):
        right.receive()


def test_a_channel_waits_for_what_comes_and_no_longer_than_it_is_told(
    native: ModuleType | None,
) -> None:
    left, right = channels()
    assert right.can_wait == (native is not None)
    begun_s = time.monotonic()
    assert right.receive(50) == []
    assert (time.monotonic() - begun_s >= 0.05) == (native is not None)
    begun_s = time.monotonic()
    sender = threading.Timer(0.05, left.send, (7, (b"late",)))
    sender.start()
    messages: list[tuple[int, memoryview]] = []
    while not messages and time.monotonic() < begun_s + LIMIT_S:
        messages = right.receive(1000)
    assert [(call_id, bytes(frame)) for call_id, frame in messages] == [(7, b"late")]
    assert time.monotonic() - begun_s < 0.9
    sender.join()
    right.send(1, (bytes(4 << 20),))
    assert right.outgoing


def test_memory_grows_with_what_has_come_and_not_with_what_a_length_says() -> None:
    left, right = channels()
    left.sock.send(struct.pack("<QQ", channel_module.MAX_MESSAGE_BYTES, 1) + bytes(1000))
    assert right.receive() == []
    assert right.receive() == []
    assert len(right._buffer) <= 4 * BUFFER_BYTES


def test_a_buffer_that_grew_for_a_long_message_is_given_back() -> None:
    left, right = channels()
    long = bytes(4 * KEPT_BUFFER_BYTES)
    sender = threading.Thread(target=lambda: left.sock.setblocking(True) or left.send(1, (long,)))
    sender.start()
    assert read_messages(right, 1) == [(1, long)]
    sender.join(LIMIT_S)
    left.send(2, (b"x",))
    assert read_messages(right, 1) == [(2, b"x")]
    assert len(right._buffer) <= KEPT_BUFFER_BYTES
