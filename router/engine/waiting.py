"""Admission: the sequences that wait for pages of the cache, and which of them is next.

They wait in the order of their priority; those of equal priority by the turns of their tenants
(:mod:`router.tenants`), whose cost is the tokens that a sequence may ever have; those of one
tenant in the order of their arrival. Pages are the cost. A sequence that
needs more pages than are free lets later ones pass, until they have taken as many pages as it needs
itself; from then on all freed pages are kept for it. So neither a large sequence nor the small ones
behind it wait for ever. A priority holds likewise until others have taken the whole cache
:data:`AGED_CACHES` times: then a sequence that was overtaken is next, whatever its priority. Of
several such the first that came is next, or others of a higher priority could starve it.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from router.engine.sequence import Sequence
from router.model.page_pool import pages_needed
from router.tenants import TenantTurns, Turn

AGED_CACHES = 4


@dataclass(slots=True, eq=False)
class _Waiting:
    """``passed_pages`` are those that sequences whose turn is later have taken before this one.

    ``tenant_turn`` is the turn of its tenant, which is the same for all where there is one tenant.
    """

    sequence: Sequence
    num_pages: int
    passed_pages: int = 0
    is_aged: bool = False
    tenant_turn: Turn = (0, 0)

    @property
    def tenant(self) -> str:
        """The tenant that the sequence's request is of."""
        return self.sequence.request.tenant

    @property
    def _priority(self) -> int:
        """Its request's priority; aged sequences have none, or later ones could still starve it."""
        return 0 if self.is_aged else self.sequence.request.priority

    def turn(self) -> tuple[bool, int, Turn, int]:
        """Return the key by which sequences wait, lowest first."""
        return not self.is_aged, self._priority, self.tenant_turn, self.sequence.arrival

    def own_turn(self) -> tuple[bool, int, int]:
        """Return the key by which the sequences of one tenant wait."""
        return not self.is_aged, self._priority, self.sequence.arrival

    def comes_before(self, other: _Waiting) -> bool:
        """Return whether it is its turn before another's, whatever their priorities are."""
        if self.tenant != other.tenant:
            return self.tenant_turn < other.tenant_turn
        return self.sequence.arrival < other.sequence.arrival


class WaitingSequences:
    """The sequences that wait, in their order; used by the engine's thread alone.

    ``len`` may be asked on any thread.
    """

    def __init__(self, num_pages: int, page_size: int, quantum_tokens: int) -> None:
        """Start empty, before a cache of ``num_pages`` pages of ``page_size`` tokens.

        ``quantum_tokens`` are what a tenant may take in a round.
        """
        self._cache_pages = num_pages
        self._page_size = page_size
        self._waiting: list[_Waiting] = []
        self.num_tokens = 0
        """The tokens that all of them may ever have."""
        self._fruitless: tuple[int, int] | None = None
        self._turns = TenantTurns(quantum_tokens)
        self._has_turns = False
        self._num_of_tenant: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter([waiting.sequence for waiting in self._waiting])

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        num_pages = pages_needed(sequence.max_length, self._page_size)
        insort(self._waiting, _Waiting(sequence, num_pages), key=_Waiting.turn)
        self.num_tokens += sequence.max_length
        self._num_of_tenant[sequence.request.tenant] += 1
        self._fruitless = None

    def has(self, tenant: str) -> bool:
        """Return whether a sequence of a tenant waits."""
        return tenant in self._num_of_tenant

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
        """Put the sequences of several tenants in order; those of one tenant are."""
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
        """Put the sequences of the only tenant in order, whose own turn goes on being known."""
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
        """Count the pages of an admitted sequence for all that wait and whose turn was before."""
        limit = AGED_CACHES * self._cache_pages
        has_aged = False
        for waiting in self._waiting:
            if waiting.comes_before(admitted):
                waiting.passed_pages += admitted.num_pages
                if waiting.passed_pages >= limit and not waiting.is_aged:
                    waiting.is_aged = has_aged = True
        if has_aged:
            self._waiting.sort(key=_Waiting.turn)
