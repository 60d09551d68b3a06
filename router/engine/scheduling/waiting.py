"""Admission: the sequences that wait for cache pages, and which of them comes next.

They wait in order of priority. Within a priority their tenants take turns
(:mod:`router.config.tenants`), where a sequence costs the most tokens that it may have. Within a
tenant they wait in order of arrival. A sequence that needs more pages than are free lets later ones
pass, until these have taken as many pages as it needs itself. From then on all freed pages are kept
for it. So neither a large sequence nor the small ones behind it wait forever. A priority likewise
holds only until others have taken the whole cache :data:`AGED_CACHES` times: then an overtaken
sequence is next, whatever its priority. Among several of these the earliest arrival is next;
otherwise others of a higher priority could starve it.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from router.config.tenants import TenantTurns, Turn
from router.engine.sequence import Sequence
from router.model.page_pool import pages_needed

AGED_CACHES = 4


@dataclass(slots=True, eq=False)
class _Waiting:
    """``passed_pages`` are the pages that sequences with a later turn have taken before this one.

    ``tenant_turn`` is its tenant's turn, which is the same for all if there is only one tenant.
    """

    sequence: Sequence
    num_pages: int
    passed_pages: int = 0
    is_aged: bool = False
    tenant_turn: Turn = (0, 0)

    @property
    def tenant(self) -> str:
        """The tenant of the sequence's request."""
        return self.sequence.request.tenant

    @property
    def _priority(self) -> int:
        """Its request's priority; none once aged, or later ones could still starve it."""
        return 0 if self.is_aged else self.sequence.request.priority

    def turn(self) -> tuple[bool, int, Turn, int]:
        """Return the key by which sequences wait, lowest first."""
        return not self.is_aged, self._priority, self.tenant_turn, self.sequence.arrival

    def own_turn(self) -> tuple[bool, int, int]:
        """Return the key by which the sequences of one tenant wait."""
        return not self.is_aged, self._priority, self.sequence.arrival

    def comes_before(self, other: _Waiting) -> bool:
        """Return whether its turn is before another's, ignoring their priorities."""
        if self.tenant != other.tenant:
            return self.tenant_turn < other.tenant_turn
        return self.sequence.arrival < other.sequence.arrival


class WaitingSequences:
    """The waiting sequences, in order; used only by the engine's thread.

    ``len`` may be called on any thread.
    """

    def __init__(self, num_pages: int, page_size: int, quantum_tokens: int) -> None:
        """Start empty, for a cache of ``num_pages`` pages of ``page_size`` tokens.

        ``quantum_tokens`` is how many tokens a tenant may take in a round.
        """
        self._cache_pages = num_pages
        self._page_size = page_size
        self._waiting: list[_Waiting] = []
        self.num_tokens = 0
        """The most tokens that all of them together may have."""
        self._fruitless: tuple[int, int] | None = None
        self._turns = TenantTurns(quantum_tokens)
        self._has_turns = False
        self._num_of_tenant: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter([waiting.sequence for waiting in self._waiting])

    def add(self, sequence: Sequence) -> None:
        """Add a sequence to those that wait."""
        num_pages = pages_needed(sequence.max_length, self._page_size)
        insort(self._waiting, _Waiting(sequence, num_pages), key=_Waiting.turn)
        self.num_tokens += sequence.max_length
        self._num_of_tenant[sequence.request.tenant] += 1
        self._fruitless = None

    def has(self, tenant: str) -> bool:
        """Return whether a tenant has a waiting sequence."""
        return tenant in self._num_of_tenant

    def remove(self, sequence: Sequence) -> None:
        """Remove a waiting sequence; ignore one that is not waiting."""
        for place, waiting in enumerate(self._waiting):
            if waiting.sequence is sequence:
                self._pop(place)
                return

    def next(self, num_free: int, num_attainable: int) -> Sequence | None:
        """Remove and return the sequence to admit next, if there is one.

        ``num_free`` pages are free; ``num_attainable`` are free or will be once the sequences being
        computed end. No pages are kept for a sequence that needs more than these: parked sequences
        hold the others for as long as an expert is unavailable.
        """
        if self._fruitless == (num_free, num_attainable):
            return None
        self._take_turns()
        most = num_free
        for place, waiting in enumerate(self._waiting):
            if waiting.num_pages <= most:
                self._pop(place)
                self._note_passed(waiting)
                self._turns.spend(waiting.tenant, waiting.sequence.max_length)
                return waiting.sequence
            if num_free < waiting.num_pages <= num_attainable:
                most = min(most, waiting.num_pages - waiting.passed_pages)
            if most <= 0:
                break
        self._fruitless = num_free, num_attainable
        return None

    def _take_turns(self) -> None:
        """Sort the sequences of several tenants; a single tenant's are already sorted."""
        if len(self._num_of_tenant) < 2:
            if self._has_turns:
                self._forget_turns()
            return
        self._has_turns = True
        of_tenant: dict[str, list[_Waiting]] = {tenant: [] for tenant in self._num_of_tenant}
        for waiting in sorted(self._waiting, key=_Waiting.own_turn):
            of_tenant[waiting.tenant].append(waiting)
        costs = {
            tenant: [waiting.sequence.max_length for waiting in own]
            for tenant, own in of_tenant.items()
        }
        for tenant, turns in self._turns.turns(costs).items():
            for waiting, turn in zip(of_tenant[tenant], turns, strict=True):
                waiting.tenant_turn = turn
        self._waiting.sort(key=_Waiting.turn)

    def _forget_turns(self) -> None:
        """Sort the only tenant's sequences, and keep that tenant's own turn."""
        for waiting in self._waiting:
            waiting.tenant_turn = 0, 0
        self._waiting.sort(key=_Waiting.turn)
        self._turns.keep(self._num_of_tenant)
        self._has_turns = False

    def _pop(self, place: int) -> None:
        sequence = self._waiting.pop(place).sequence
        self.num_tokens -= sequence.max_length
        tenant = sequence.request.tenant
        self._num_of_tenant[tenant] -= 1
        if not self._num_of_tenant[tenant]:
            del self._num_of_tenant[tenant]
        if not self._waiting:
            self._forget_turns()
        self._fruitless = None

    def _note_passed(self, admitted: _Waiting) -> None:
        """Add an admitted sequence's pages to each waiting one whose turn came earlier."""
        limit = AGED_CACHES * self._cache_pages
        has_aged = False
        for waiting in self._waiting:
            if waiting.comes_before(admitted):
                waiting.passed_pages += admitted.num_pages
                if waiting.passed_pages >= limit and not waiting.is_aged:
                    waiting.is_aged = has_aged = True
        if has_aged:
            self._waiting.sort(key=_Waiting.turn)
