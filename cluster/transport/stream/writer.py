"""Writes the bytes that a socket does not take at once, while the router's thread computes.

A frame of a prefill may be longer than the socket's buffer. The actor takes the rest as it reads,
which it does while the router attends other tokens. Short frames never come here: the thread that
sends them hands all of their bytes to the socket.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from cluster.transport.stream.channel import Channel

WRITE_MS = 50
"""The longest time between two notes of progress, and of a look at whether to end."""
HANDOVER_S = 0.005
"""The longest wait for the thread to begin. It needs the interpreter for it, which the caller may
soon hold for the whole of a native call."""
CLOSE_S = 5.0


class Writer:
    """Writes the outgoing bytes of one channel on a thread that is idle otherwise.

    The channel bounds nothing: its user bounds the number of unanswered calls.
    """

    def __init__(self, channel: Channel) -> None:
        """Start the thread."""
        self._channel = channel
        self._changed = threading.Condition()
        self._is_writing = False
        self._writing = threading.Lock()
        """Held during a write; taken last."""
        self._is_closed = False
        self.latest_at_s = time.monotonic()
        """When the last byte left."""
        self._ends: deque[tuple[int, int | None]] = deque()
        """By call whose bytes wait: the number of bytes up to its last one, and its id.

        The id is ``None`` for a call that is forgotten.
        """
        self._left_at_s: dict[int, float] = {}
        """When the last byte of each other call left."""
        self._thread = threading.Thread(target=self._run, name="stream-writer", daemon=True)
        self._thread.start()

    def take_over(self, call_id: int) -> None:
        """Write the rest of the call that was queued last; returns when the thread has begun."""
        with self._changed:
            if not self._ends:
                self.latest_at_s = time.monotonic()
            self._ends.append((self._channel.queued_bytes, call_id))
            self._note_progress()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_writing or not self._ends, HANDOVER_S)

    def moved_at_s(self, call_id: int) -> float:
        """Return when the last byte of a call left, or any byte while some of the call wait.

        Minus infinity for a call that was not taken over.
        """
        with self._changed:
            if any(call_id == waiting for _, waiting in self._ends):
                return self.latest_at_s
            return self._left_at_s.get(call_id, float("-inf"))

    def forget(self, call_id: int) -> None:
        """Forget a call; bytes of it that wait are written all the same, from memory of their own.

        Where bytes of it wait, this takes up to :data:`WRITE_MS`: the write under way has to end.
        """
        with self._changed:
            self._left_at_s.pop(call_id, None)
            calls = [call for _, call in self._ends]
            if call_id in calls:
                end, _ = self._ends[calls.index(call_id)]
                self._ends[calls.index(call_id)] = end, None
                with self._writing:
                    self._channel.own_outgoing()

    def close(self) -> None:
        """End the thread, and with it the connection."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._channel.shut_down()  # ends a write
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while self._is_to_write():
            try:
                with self._writing:
                    sent = self._channel.write(WRITE_MS)
            except OSError as error:
                self._channel.shut_down(error)  # wakes the thread that waits for answers
                return
            if sent:
                with self._changed:
                    self.latest_at_s = time.monotonic()
                    self._note_progress()

    def _is_to_write(self) -> bool:
        """Wait for outgoing bytes; returns false when the writer is closed."""
        with self._changed:
            self._is_writing = False
            self._changed.wait_for(lambda: self._is_closed or self._channel.outgoing)
            self._is_writing = True
            self._changed.notify_all()
            return not self._is_closed

    def _note_progress(self) -> None:
        """Note the calls whose last byte has left."""
        while self._ends and self._ends[0][0] <= self._channel.written_bytes:
            _, call_id = self._ends.popleft()
            if call_id is not None:
                self._left_at_s[call_id] = self.latest_at_s
