"""An actor that answers frames without experts; light, so that tests can start many."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import ray

from cluster.transport.stream.handshake import Network, StreamOffer
from cluster.transport.stream.server import StreamServer
from cluster.wire.checksum import sealed, unsealed
from cluster.wire.frames import Buffer, Buffers


class Echo:
    """Answers a frame with itself, backwards; waits where the frame says so."""

    def __init__(self) -> None:
        self._server = StreamServer(self.compute_all, "127.0.0.1", None)

    def compute_all(self, frames: Sequence[Buffer]) -> list[Buffers]:
        """Answer frames that came over streams."""
        return [(self._answer(bytes(frame)),) for frame in frames]

    def compute(self, data: bytes) -> bytes:
        """Answer a frame that came as a Ray call."""
        frame = unsealed(data)
        assert frame is not None
        return b"".join(sealed((self._answer(bytes(frame)),)))

    def _answer(self, frame: bytes) -> bytes:
        if frame.startswith(b"wait "):
            threading.Event().wait(float(frame[5:]))
        return frame[::-1]

    @ray.method(concurrency_group="control")
    def offer_stream(self, network: Network) -> StreamOffer:
        """See :class:`experts.actor.ExpertActor`."""
        return self._server.offer(network)

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        """Return the process's id."""
        return os.getpid()
