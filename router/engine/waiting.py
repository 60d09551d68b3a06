"""Admission: the sequences that wait for pages of the cache, and which of them is next.

They wait in the order of their priority, then of their arrival. Pages are the cost. A sequence that
needs more pages than are free lets later ones pass, until they have taken as many pages as it needs
itself; from then on all freed pages are kept for it. So neither a large sequence nor the small ones
behind it wait for ever. A priority holds likewise until others have taken the whole cache
:data:`AGED_CACHES` times: then a sequence that was overtaken is next, whatever its priority.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from router.engine.sequence import Sequence
from router.model.page_pool import pages_needed

AGED_CACHES = 4


@dataclass(slots=True, eq=False)
class _Waiting:
    """``passed_pages`` are those that sequences which came later have taken before this one."""

    sequence: Sequence
    num_pages: int
    passed_pages: int = 0
    is_aged: bool = False

    def turn(self) -> tuple[bool, int, int]:
        """Return the key by which sequences wait, lowest first."""
        return not self.is_aged, self.sequence.request.priority, self.sequence.arrival


class WaitingSequences:
    """The sequences that wait, in their order; used by the engine's thread alone.

    ``len`` may be asked on any thread.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """Start empty, before a cache of ``num_pages`` pages of ``page_size`` tokens."""
        self._cache_pages = num_pages
        self._page_size = page_size
        self._waiting: list[_Waiting] = []
        self.num_tokens = 0
        """The tokens that all of them may ever have."""
        self._fruitless: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter([waiting.sequence for waiting in self._waiting])

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        num_pages = pages_needed(sequence.max_length, self._page_size)
        insort(self._waiting, _Waiting(sequence, num_pages), key=_Waiting.turn)
        self.num_tokens += sequence.max_length
        self._fruitless = None

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence wait no longer; one that does not wait is ignored."""
        for place, waiting in enumerate(self._waiting):
            if waiting.sequence is sequence:
                self._pop(place)
                return

    def next(self, num_free: int, num_attainable: int) -> Sequence | None:
        """Return the sequence that is admitted next, which then waits no longer, if there is one.

        ``num_free`` pages are free; ``num_attainable`` are free or will be once the sequences that
        are computed end. No pages are kept for a sequence that needs more than these: the others
        are held by parked sequences, for as long as an expert is away.
        """
        if self._fruitless == (num_free, num_attainable):
            return None
        most = num_free
        for place, waiting in enumerate(self._waiting):
            if waiting.num_pages <= most:
                self._pop(place)
                self._note_passed(waiting)
                return waiting.sequence
            if num_free < waiting.num_pages <= num_attainable:
                most = min(most, waiting.num_pages - waiting.passed_pages)
            if most <= 0:
                break
        self._fruitless = num_free, num_attainable
        return None

    def _pop(self, place: int) -> None:
        self.num_tokens -= self._waiting.pop(place).sequence.max_length
        self._fruitless = None

    def _note_passed(self, admitted: _Waiting) -> None:
        """Count the pages of an admitted sequence for all that came before it and wait."""
        limit = AGED_CACHES * self._cache_pages
        has_aged = False
        for waiting in self._waiting:
            if waiting.sequence.arrival < admitted.sequence.arrival:
                waiting.passed_pages += admitted.num_pages
                if waiting.passed_pages >= limit and not waiting.is_aged:
                    waiting.is_aged = has_aged = True
        if has_aged:
            self._waiting.sort(key=_Waiting.turn)
