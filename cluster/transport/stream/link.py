"""A router's connection to one generation of an actor, and the calls that are under way on it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cluster.transport.stream.channel import Channel
from cluster.transport.stream.writer import Writer

Pending = TypeVar("Pending")

SILENT_S = 2.0
"""A connection is replaced where a call is given up and no answer has come for so long. No checksum
covers a message's length: a damaged one takes all that follows for a part of its message."""


@dataclass(slots=True, eq=False)
class Link(Generic[Pending]):
    """A connection to one generation of an actor, and its unanswered calls."""

    actor_id: str
    generation: int
    channel: Channel
    unanswered: dict[int, Pending | None] = field(default_factory=dict)
    """By the id of the call; ``None`` for a call that is waited for no longer."""
    last_answer: int = 0
    """The number of the latest answer, counted over all connections."""
    waits_since_s: float = 0.0
    """When the latest answer came, or the first unanswered call was sent after it."""
    writer: Writer | None = None
    """Set once a frame was longer than the socket's buffer."""

    def is_silent(self) -> bool:
        """Return whether calls have waited for :data:`SILENT_S`, and no byte has moved."""
        moved_at_s = 0.0 if self.writer is None else self.writer.latest_at_s
        since_s = max(self.waits_since_s, moved_at_s)
        return bool(self.unanswered) and time.monotonic() - since_s >= SILENT_S

    def take_over(self, call_id: int) -> None:
        """Have the rest of a call written in the background."""
        if self.writer is None:
            self.writer = Writer(self.channel)
        self.writer.take_over(call_id)

    def moved_at_s(self, call_id: int) -> float:
        """Return when a call's last byte left; minus infinity if all of them left at once.

        While some of its bytes wait: when the actor took any byte last.
        """
        return float("-inf") if self.writer is None else self.writer.moved_at_s(call_id)

    def forget(self, call_id: int) -> None:
        """See :meth:`Writer.forget`."""
        if self.writer is not None:
            self.writer.forget(call_id)

    def close(self) -> None:
        """Close the connection, and end its thread."""
        if self.writer is not None:
            self.writer.close()
        self.channel.close()
