"""Targets: what routers and expert actors send each other, and what strangers send them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from benchmarks.fuzzing.target import Target, check_refusal
from cluster.errors import FrameError, OverloadedError, WrongPlacementError
from cluster.transport.stream.channel import Channel
from cluster.transport.stream.connect import greet, open_socket
from cluster.transport.stream.handshake import (
    KEY_ID_BYTES,
    Network,
    Side,
    StreamOffer,
    new_nonce,
    proof,
)
from cluster.transport.stream.server import StreamServer
from cluster.wire.frames import (
    ALIGNMENT,
    Buffer,
    Buffers,
    DispatchFrame,
    ErrorFrame,
    Frame,
    RowsFrame,
    decode,
    encode,
)
from cluster.wire.tensors import from_bytes, to_bytes

LIMIT_S = 10.0
_START = struct.Struct("<QQ")

ROWS = np.arange(12, dtype=np.float32).tobytes()
CONTEXT = f"00-{'a' * 32}-{'b' * 16}-01"
FRAMES: tuple[Frame, ...] = (
    DispatchFrame(
        request_id=7,
        model="tiny",
        layer_id=3,
        expert_ids=(0, 5),
        num_tokens_per_expert=(2, 1),
        num_rows=3,
        row_shape=(4,),
        dtype="float32",
        rows=ROWS,
        time_left_s=2e9,
    ),
    DispatchFrame(
        request_id=8,
        model="é",
        layer_id=0,
        expert_ids=(1, 2, 9),
        num_tokens_per_expert=(1, 2, 3),
        num_rows=6,
        row_shape=(1, 1),
        dtype="float16",
        rows=ROWS[:12],
        time_left_s=2e9,
        traceparent=CONTEXT,
    ),
    RowsFrame(7, 2, (3,), "bfloat16", (ROWS[:12],)),
    ErrorFrame(7, "OverloadedError", OverloadedError("full", "queue", 0.01)),
    ErrorFrame(7, "WrongPlacementError", WrongPlacementError("not here", "tiny")),
)


def joined(frame: Frame) -> bytes:
    """Return a frame in one piece."""
    return b"".join(encode(frame))


def message(data: bytes, call_id: int = 1) -> bytes:
    """Return bytes as a stream carries them."""
    return _START.pack(len(data), call_id) + data + bytes(-len(data) % ALIGNMENT)


def frame() -> Target:
    """Return the target of frames, and of the tensors in them."""
    return Target([joined(one) for one in FRAMES], _decode)


def _decode(data: bytes) -> None:
    try:
        found = decode(data)
    except FrameError as error:
        check_refusal(error, "frame")
        return
    again = decode(joined(found))
    if isinstance(found, ErrorFrame):
        assert found.error.retry_after_s is None or 0 <= found.error.retry_after_s < 1e6
        return
    assert not isinstance(again, ErrorFrame)
    rows = from_bytes(_rows_of(found), found.dtype, found.num_rows, found.row_shape)
    assert bytes(to_bytes(rows)) == _rows_of(found) == _rows_of(again)


def _rows_of(found: DispatchFrame | RowsFrame) -> bytes:
    return b"".join(found.rows) if isinstance(found, RowsFrame) else bytes(found.rows)


def stranger() -> Target:
    """Return the target of a stream server to which somebody without a key connects."""
    return _served(lambda offer, nonce: b"")


def router() -> Target:
    """Return the target of a stream server to which a router with a key sends anything."""

    def hello(offer: StreamOffer, nonce: bytes) -> bytes:
        own = new_nonce()
        shown = proof(offer.secret, Side.ROUTER, nonce, own)
        return message(offer.key_id + own + shown, 0)

    return _served(hello)


def _served(hello: object) -> Target:
    server = StreamServer(_answers, "127.0.0.1", None)

    def run(data: bytes) -> None:
        offer = server.offer(Network.UNIX)
        with open_socket(offer, None) as sock:
            sock.settimeout(LIMIT_S)
            nonce = _nonce(sock)
            with suppress(ConnectionError):
                sock.sendall(hello(offer, nonce) + data)  # type: ignore[operator]
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):  # until it is cut off
                    pass
        _still_answers(server)

    frames = b"".join(message(joined(one)) for one in FRAMES)
    hello_bytes = message(bytes(KEY_ID_BYTES) + bytes(48), 0)
    return Target([frames, hello_bytes, hello_bytes + frames, message(b"")], run)


def _nonce(sock: socket.socket) -> bytes:
    with sock.makefile("rb") as stream:
        length, _ = _START.unpack(stream.read(_START.size))
        return bytes(stream.read(length + -length % ALIGNMENT)[:length])


def _answers(frames: Sequence[Buffer]) -> list[Buffers]:
    return [_answer(one) for one in frames]


def _answer(data: Buffer) -> Buffers:
    try:
        found = decode(data)
    except FrameError as error:
        return encode(ErrorFrame(0, "FrameError", error))
    return encode(found)


def _still_answers(server: StreamServer) -> None:
    """Check that an honest router is served: the same frame comes back."""
    offer = server.offer(Network.UNIX)
    channel = greet(open_socket(offer, None), offer)
    try:
        channel.sock.settimeout(LIMIT_S)
        channel.send(5, encode(FRAMES[0]))
        while not (got := channel.receive()):
            pass
        assert [(call_id, bytes(data or b"")) for call_id, data in got] == [(5, joined(FRAMES[0]))]
    finally:
        channel.close()


def actor() -> Target:
    """Return the target of a router to which somebody who is no actor answers."""
    offer = StreamOffer(Network.UNIX, b"", bytes(16), bytes(32))

    def run(data: bytes) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            try:
                greet(ours, offer).close()
            except OSError:
                pass
            else:
                raise AssertionError("a stranger was taken for the actor")
        _read_all(data)

    frames = b"".join(message(joined(one)) for one in FRAMES)
    greeting = message(bytes(16), 0) + message(bytes(32), 0)
    return Target([greeting, greeting + frames, frames], run)


def _read_all(data: bytes) -> None:
    """Have a channel that trusts its peer read anything."""
    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours)
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            while True:
                for _, got in channel.receive():
                    assert got is not None  # a Unix socket has no checksum
                    _decode(bytes(got))
        channel.close()
