"""Turns of tenants: deficit round robin (Shreedhar and Varghese, SIGCOMM 1995), by tokens. Pure.

In each round every tenant with items may spend a quantum more, in the order in which the tenants
came; what it does not spend is kept while it has items. So the ``k``-th item of a tenant is served
in the round ``ceil((spent + cost of items up to k) / quantum)`` of the tenant's own. That closed
form gives the turns of all items without a simulation, and they stay right where an item is served
out of turn, which its tenant then pays for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

Turn = tuple[int, int]
"""A round, and the tenant's place in it; lower ones come first."""


@dataclass(slots=True)
class _Tenant:
    """``since`` is the round before a tenant's first, ``spent`` what it has had from then on."""

    place: int
    since: int
    spent: int = 0


class TenantTurns:
    """The tenants that compete, and what each has had since it began to."""

    def __init__(self, quantum: int) -> None:
        """``quantum`` is what a tenant may spend in a round."""
        self._quantum = quantum
        self._places = itertools.count()
        self._tenants: dict[str, _Tenant] = {}

    def turns(self, costs: Mapping[str, Sequence[int]]) -> dict[str, list[Turn]]:
        """Return the turns of each tenant's items, whose ``costs`` are in the tenant's own order.

        Every tenant has an item at least. New ones join, in the order of ``costs``, the round in
        which the next item of the others is served, after them. Tenants that are not there any more
        are forgotten.
        """
        self.keep(costs)
        current = min(
            (self._round(tenant, costs[name][0]) for name, tenant in self._tenants.items()),
            default=math.inf,
        )
        for name, own in costs.items():
            if name not in self._tenants:
                since = 0 if current == math.inf else int(current) - 1
                self._tenants[name] = tenant = _Tenant(next(self._places), since)
                current = min(current, self._round(tenant, own[0]))
        return {name: self._turns_of(self._tenants[name], costs[name]) for name in costs}

    def keep(self, names: Container[str]) -> None:
        """Forget all tenants but these."""
        self._tenants = {name: self._tenants[name] for name in self._tenants if name in names}

    def spend(self, name: str, cost: int) -> None:
        """Note what a tenant was served; one that has never had a turn has nothing to pay for."""
        if name in self._tenants:
            self._tenants[name].spent += cost

    def _turns_of(self, tenant: _Tenant, costs: Sequence[int]) -> list[Turn]:
        sums = itertools.accumulate(costs)
        return [(self._round(tenant, total), tenant.place) for total in sums]

    def _round(self, tenant: _Tenant, cost: int) -> int:
        return tenant.since - -(tenant.spent + cost) // self._quantum
