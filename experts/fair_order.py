"""The order of an actor's frames: by turns over models, so that none holds up another's.

Deficit round robin: Shreedhar and Varghese 1995, "Efficient fair queueing using deficit round
robin", section 3. The unit is the row. Pure; the caller has a lock.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

from cluster.wire.frames import DispatchFrame

TURN_ROWS = 256
"""The rows that a model's credit grows by in a turn; a batch holds several turns."""


class _HasFrame(Protocol):
    @property
    def frame(self) -> DispatchFrame: ...


Item = TypeVar("Item", bound=_HasFrame)


class FairOrder(Generic[Item]):
    """Frames that wait; the frames of one model keep their order."""

    def __init__(self) -> None:
        """Start empty."""
        self._items: list[Item] = []
        self._num_rows = 0
        self._credit_rows: dict[str, int] = {}
        """By model, in the order of turns; empty unless more waited than a batch holds."""

    def __bool__(self) -> bool:
        """Return whether any frame waits."""
        return bool(self._items)

    def append(self, item: Item) -> None:
        """Put a frame behind all others of its model."""
        self._items.append(item)
        self._num_rows += item.frame.num_rows

    def next_batch(self, most_rows: int) -> list[Item]:
        """Take the frames that are computed next: of at most so many rows, or a single frame.

        Empty where nothing waits. All that wait are taken where they have so few rows.
        """
        if self._num_rows > most_rows and len(self._items) > 1:
            return self._in_turn(most_rows)
        batch, self._items, self._num_rows = self._items, [], 0
        if self._credit_rows:
            self._credit_rows.clear()
        return batch

    def _in_turn(self, most_rows: int) -> list[Item]:
        """Take frames by turns, up to the first without room, which begins the next batch."""
        lines: dict[str, deque[Item]] = {model: deque() for model in self._credit_rows}
        for item in self._items:
            lines.setdefault(item.frame.model, deque()).append(item)
        credit_rows = {model: self._credit_rows.get(model, 0) for model in lines if lines[model]}
        batch: list[Item] = []
        room_rows = most_rows
        while credit_rows:
            model = next(iter(credit_rows))
            num_rows = lines[model][0].frame.num_rows
            if batch and num_rows > room_rows:
                break
            if num_rows > credit_rows[model] and len(credit_rows) > 1:
                credit_rows[model] = credit_rows.pop(model) + TURN_ROWS  # the next model's turn
                continue
            batch.append(lines[model].popleft())
            room_rows -= num_rows
            credit_rows[model] = max(0, credit_rows[model] - num_rows)
            if not lines[model]:  # what waits no longer saves no credit
                del credit_rows[model]
        taken = set(map(id, batch))
        self._items = [item for item in self._items if id(item) not in taken]
        self._num_rows -= most_rows - room_rows
        self._credit_rows = credit_rows
        return batch
