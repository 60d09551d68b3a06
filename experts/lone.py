"""Frames that come alone, answered in native code without the interpreter.

At one stream an actor has one frame at a time, and its products have driven the interpreter out of
the processor's caches when the answer is to be sent. So native code receives such a frame, computes
and sends (``native/wire/lone.c``). It answers as :mod:`experts.queue` does, which gets whatever
else comes: frames of several routers at once, malformed or traced frames, frames for experts that
are not here or not native, rows that are not finite, and one frame each :data:`MAX_WAIT_MS`, from
which the self-test takes its sample.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from contextlib import suppress

from cluster.native import native
from cluster.spec import FRAME_VERSION, ExpertKey
from cluster.transport.stream.server import ReceivedAlone
from cluster.wire.frames import Buffer
from experts.compute.native_ffn import NativeFfn

MAX_WAIT_MS = 250
"""The longest time until a frame is the queue's."""
IS_BUILT = hasattr(native, "answer_lone")
"""Whether there is native code for it: only on Linux."""
STEPS, FRAMES, BUSY_S, WAITING_ROWS = range(4)
"""The places of an actor's counters."""

_Layer = tuple[dict[int, Buffer], Counter[int], tuple[int, ...], int]
"""Packed weights and computed rows by expert, sizes (:attr:`NativeFfn.shape`), and threads."""


class NativeFastPath:
    """The native experts of an actor, as native code finds them.

    ``by_name`` has the experts of one shape for each layer, by its number and model as a frame's
    header has them.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.by_name: dict[bytes, _Layer] = {}

    def hold(self, key: ExpertKey, ffn: NativeFfn | None, tokens: Counter[int]) -> None:
        """Take an expert of a layer whose computed rows are ``tokens``, in place of any before.

        An expert that is not native (``None``), or not of its layer's shape, is left to Python.
        """
        self.release(key)
        if ffn is None:
            return
        layer = self.by_name.setdefault(_name(key), ({}, tokens, ffn.shape, ffn.threads))
        if layer[1] is tokens and layer[2:] == (ffn.shape, ffn.threads):
            layer[0][key.expert_id] = ffn.packed

    def release(self, key: ExpertKey) -> None:
        """Forget an expert, if it is here."""
        name = _name(key)
        if name in self.by_name:
            packed = self.by_name[name][0]
            packed.pop(key.expert_id, None)
            if not packed:
                del self.by_name[name]


def _name(key: ExpertKey) -> bytes:
    """Return a layer's number and model as a dispatch frame has them."""
    return key.layer_id.to_bytes(4, "little") + key.model.encode()


class Interruption:
    """Makes native code return that waits for frames; a file that is readable from a call on."""

    def __init__(self) -> None:
        """Begin without a call, and without a file until somebody asks for it."""
        self._file: int | None = None

    def fileno(self) -> int:
        """Return the descriptor that is readable."""
        if self._file is None:
            self._file = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return self._file

    def call(self) -> None:
        """Interrupt; callable from any thread."""
        os.eventfd_write(self.fileno(), 1)

    def clear(self) -> None:
        """Forget the calls until now."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fileno())


def answer_lone(
    epoll_fd: int, buffers: dict[int, memoryview], layers: NativeFastPath, counters: array[float]
) -> ReceivedAlone | None:
    """Answer frames of sockets; see :class:`cluster.transport.stream.server.AnswersAlone`."""
    received: ReceivedAlone | None = native.answer_lone(  # type: ignore[union-attr]
        epoll_fd, buffers, layers.by_name, counters, FRAME_VERSION, MAX_WAIT_MS
    )
    return received
