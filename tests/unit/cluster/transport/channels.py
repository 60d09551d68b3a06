"""What arrives on a channel, for tests."""

from __future__ import annotations

import threading
import time

from cluster.transport.stream.channel import Channel

LIMIT_S = 60.0


def read_messages(
    channel: Channel, count: int = 1, pause_s: float = 0.001
) -> list[tuple[int, bytes]]:
    """Read until ``count`` messages are there, with a pause after each read."""
    found: list[tuple[int, bytes]] = []
    tick, deadline_s = threading.Event(), time.monotonic() + LIMIT_S
    while len(found) < count:
        assert time.monotonic() < deadline_s, "no message has come"
        found += [
            (call_id, bytes(frame)) for call_id, frame in channel.receive() if frame is not None
        ]
        tick.wait(pause_s)
    return found
