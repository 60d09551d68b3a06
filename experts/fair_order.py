"""The order of an actor's frames: by turns over models, so that none holds up another's.

Deficit round robin: Shreedhar and Varghese 1995, "Efficient fair queueing using deficit round
robin", section 3. The unit is the row. Pure; the caller has a lock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from cluster.wire.frames import DispatchFrame

TURN_ROWS = 256
"""The rows that a model's credit grows by in a turn, which a batch holds several of."""


class _HasFrame(Protocol):
    @property
    def frame(self) -> DispatchFrame: ...


Item = TypeVar("Item", bound=_HasFrame)


@dataclass(slots=True)
class _Line(Generic[Item]):
    """The frames of one model in the order of their arrival, and the rows that are its due."""

    items: deque[Item] = field(default_factory=deque)
    credit_rows: int = 0


class FairOrder(Generic[Item]):
    """Frames that wait; the frames of one model keep their order."""

    def __init__(self) -> None:
        """Start empty."""
        self._lines: dict[str, _Line[Item]] = {}
        """By model, in the order of turns."""

    def append(self, item: Item) -> None:
        """Put a frame behind all others of its model."""
        self._lines.setdefault(item.frame.model, _Line()).items.append(item)

    def next_batch(self, most_rows: int) -> list[Item]:
        """Take the frames that are computed next: of at most so many rows, or a single frame.

        Empty where nothing waits. The batch ends before the first frame in turn without room, which
        begins the next one.
        """
        batch: list[Item] = []
        room_rows = most_rows
        while self._lines:
            model, line = next(iter(self._lines.items()))
            num_rows = line.items[0].frame.num_rows
            if batch and num_rows > room_rows:
                break
            if num_rows > line.credit_rows and len(self._lines) > 1:
                line.credit_rows += TURN_ROWS
                self._lines[model] = self._lines.pop(model)
                continue
            batch.append(line.items.popleft())
            room_rows -= num_rows
            line.credit_rows = max(0, line.credit_rows - num_rows)
            if not line.items:  # what waits no longer saves no credit
                del self._lines[model]
        return batch
