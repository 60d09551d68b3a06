"""The native code of streams and layers, over a world's network.

It takes descriptors, so each call gets pairs of real sockets: what has come for it is put in
before, and what it has sent is taken out after. So it runs as it is, and waits for nothing; the
waits are the world's.
"""

from __future__ import annotations

import random
import selectors
import socket
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

import router.moe.exchange
from cluster.native import native
from cluster.transport.stream.channel import Channel
from cluster.wire.frames import ALIGNMENT, RowsFrame, encode
from tests.world import sockets
from tests.world.kernel import kernel
from tests.world.network import End

if TYPE_CHECKING:
    from tests.world.weather import Scenario
    from tests.world.world import World

SHARE = 0.15
"""The share of the seeds without a rarity whose streams and layers are native."""
WAITS_MS = (30, 300)
"""How long native code waits for an actor, of every second seed: shorter than a layer takes, or
longer. On a real machine layers are faster."""
_START_BYTES = 16
_DTYPES = {1: ("float32", 4), 2: ("bfloat16", 2)}
_PAIRS = [socket.socketpair() for _ in range(16)]
"""For each lane of a call: the end that native code has, and the other one."""
for _ends in _PAIRS:
    for _end in _ends:
        _end.setblocking(False)


def with_native(scenario: Scenario) -> Scenario:
    """Return a scenario whose streams and layers are native, or the same; few have them.

    Native layers need all actors on the router's host, and one copy of each expert. It is drawn
    apart, so that the rest of a seed stays as it is.
    """
    if random.Random(f"native-{scenario.seed}").random() >= SHARE:
        return scenario
    setting = replace(
        scenario.setting, native=True, num_nodes=1, min_copies=1, transport="auto",
        num_actors=min(scenario.setting.num_actors, 5),
    )  # fmt: skip
    return replace(scenario, setting=setting)


def native_table(world: World) -> list[tuple[Any, str, Any]]:
    """Return what takes the place of native code in a world, as :mod:`tests.world.patches` does."""
    if native is None or not world.setting.native:
        return [(Channel, "_native", None)]
    return [
        (Channel, "_native", Native),
        (router.moe.exchange, "native", Native),
        (router.moe.exchange, "WAIT_MS", WAITS_MS[world.seed % 2]),
    ]


class Native:
    """The functions of ``expertmesh_native`` that take sockets."""

    @staticmethod
    def send(fd: int, call_id: int, buffers: Any, most_bytes: int) -> int | None:
        own, other = _PAIRS[0]
        left: int | None = _native().send(own.fileno(), call_id, buffers, most_bytes)
        if left is None:
            return None
        data = _drained(other)
        return left + len(data) - _end_of(fd).send(data)

    @staticmethod
    def write(fd: int, pieces: Sequence[Any], wait_ms: int) -> int:
        sent = _end_of(fd).send(b"".join(pieces))
        if sent or not wait_ms:
            return sent
        _wait(fd, selectors.EVENT_WRITE, wait_ms / 1000)
        return _end_of(fd).send(b"".join(pieces))

    @staticmethod
    def receive(fd: int, buffer: Any, begin: int, end: int, most_bytes: int, wait_ms: int) -> Any:
        data = _arrived(fd, len(buffer) - end, wait_ms / 1000)
        if data is None:
            return None
        if not data:
            raise ConnectionError("the peer closed the stream")
        own, other = _PAIRS[0]
        other.send(data)
        return _native().receive(own.fileno(), buffer, begin, end, most_bytes, 0)

    @staticmethod
    def send_layer(rows: Any, ids: Any, layer: Any, lanes: Any, *numbers: Any) -> Any:
        parts, fields = _parts(ids, layer), _with_pairs(lanes)
        assert _native().send_layer(rows, ids, layer, fields, *numbers) is None
        messages = [_drained(_PAIRS[lane][1]) for lane, _ in parts]
        left = [-1] * len(parts)
        for place in _order(parts, lanes):
            with suppress(OSError):
                end = _end_of(lanes[0][parts[place][0]])
                left[place] = len(messages[place]) - end.send(messages[place])
        return tuple(left) if any(left) else None

    @staticmethod
    def receive_layer(
        ids: Any, weights: Any, sums: Any, layer: Any, lanes: Any, *numbers: int
    ) -> Any:
        *of_call, wait_ms = numbers
        parts, has_waited = _parts(ids, layer), False
        came: dict[int, bytes] = {}
        for place in reversed(_order(parts, lanes)):
            lane, num_rows = parts[place]
            wanted, data = _answer_bytes(num_rows, layer), b""
            until_s = kernel().now_s + wait_ms / 1000
            while len(data) < wanted:
                has_waited |= not _is_readable(lanes[0][lane])
                with suppress(OSError):
                    left_s = max(0.0, until_s - kernel().now_s)
                    if piece := _arrived(lanes[0][lane], wanted - len(data), left_s):
                        data += piece
                        continue
                break
            came[lane] = data
            if len(data) < wanted:
                break
        for lane, data in came.items():
            _PAIRS[lane][1].send(data)
        asked, most_rows, _, received = _native().receive_layer(
            ids, weights, sums, layer, _with_pairs(lanes), *of_call, 0
        )
        for lane in came:
            _put_back(lanes[0][lane], _drained(_PAIRS[lane][0]))
        return asked, most_rows, has_waited, received


def _native() -> Any:
    return native


def _end_of(fd: int) -> End:
    """Return a socket's end of a connection; raises ``OSError`` where it is closed."""
    sock = sockets.by_number.get(fd)
    if sock is None:
        raise OSError("the socket is closed")
    return sock.end()


def _is_readable(fd: int) -> bool:
    sock = sockets.by_number.get(fd)
    return sock is not None and bool(sock.ready(selectors.EVENT_READ))


def _wait(fd: int, events: int, timeout_s: float) -> None:
    with sockets.Selector() as selector:
        selector.register(sockets.by_number[fd], events)
        selector.select(timeout_s)


def _arrived(fd: int, most: int, timeout_s: float) -> bytes | None:
    """Return as :meth:`End.read` does, after a wait where nothing is there."""
    data = _end_of(fd).read(most)
    if data is None and timeout_s > 0:
        _wait(fd, selectors.EVENT_READ, timeout_s)
        data = _end_of(fd).read(most)
    return data


def _put_back(fd: int, data: bytes) -> None:
    if data:
        end = _end_of(fd)
        end.received[:0] = data
        end.changed()


def _drained(sock: socket.socket) -> bytes:
    return b"".join(_pieces(sock))


def _pieces(sock: socket.socket) -> Iterator[bytes]:
    with suppress(BlockingIOError):
        while piece := sock.recv(1 << 20):
            yield piece


def _with_pairs(lanes: Any) -> Any:
    own = array("i", [_PAIRS[lane][0].fileno() for lane in range(len(lanes[1]))])
    return own, *lanes[1:]


def _parts(ids: np.ndarray, layer: Any) -> list[tuple[int, int]]:
    """Return the lane and the rows of each actor that is asked, in the order of the actors."""
    ordered, ends, lane_of = layer[:3]
    begins = [0, *ends[:-1]]
    rows = [int(np.isin(ids, ordered[b:e]).sum()) for b, e in zip(begins, ends, strict=True)]
    return [(int(lane), number) for lane, number in zip(lane_of, rows, strict=True) if number]


def _order(parts: Sequence[tuple[int, int]], lanes: Any) -> list[int]:
    """Return the order in which native code sends parts: the latest answer's actor is first."""
    latest = lanes[2]
    return sorted(range(len(parts)), key=lambda place: -latest[parts[place][0]])


def _answer_bytes(num_rows: int, layer: Any) -> int:
    """Return the bytes of the message of an answer."""
    size, (dtype, num_bytes) = layer[5], _DTYPES[layer[6]]
    rows = bytes(num_rows * size * num_bytes)
    length = sum(map(len, encode(RowsFrame(0, num_rows, (size,), dtype, (rows,)))))
    return _START_BYTES + length + -length % ALIGNMENT
