"""The fleet: the actors that an application is to have, pool by pool, which scaling changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import InvalidRequestError
from cluster.spec import ActorSpec, PoolSpec, budgets_of


@dataclass(frozen=True, slots=True)
class PoolMembers:
    """A pool's actors in use and on standby, and the number of actors configured at that time."""

    configured: int
    actors: tuple[str, ...]
    standby: tuple[str, ...] = ()


class Fleet:
    """The actors of each pool.

    ``specs``, ``pool_of`` and ``budgets_bytes`` are by actor; without pool budgets there are no
    budgets. ``standby`` actors run like others, but hold no experts until they are taken into use.
    """

    def __init__(self, pools: Sequence[PoolSpec]) -> None:
        """Begin with the numbers of the configuration."""
        self.pools = {pool.name: pool for pool in pools}
        self.specs: dict[str, ActorSpec] = {}
        self.pool_of: dict[str, str] = {}
        self.standby: set[str] = set()
        self.budgets_bytes: dict[str, int] | None = None if budgets_of(pools) is None else {}
        for pool in pools:
            for actor_id in pool.actor_ids():
                self._join(actor_id, pool)

    def of(self, pool: str) -> list[str]:
        """Return a pool's actors in use, in the order in which they joined."""
        return [a for a, name in self.pool_of.items() if name == pool and a not in self.standby]

    def standby_of(self, pool: str) -> list[str]:
        """Return a pool's standby actors, in the order in which they joined."""
        return [a for a, name in self.pool_of.items() if name == pool and a in self.standby]

    def in_use(self) -> list[str]:
        """Return all actors in use."""
        return [actor_id for actor_id in self.specs if actor_id not in self.standby]

    def pool_named(self, name: str) -> PoolSpec:
        """Return a pool by its name; without a name the only pool.

        Raises :class:`InvalidRequestError` if there is no such pool, or no name and several pools.
        """
        if name in self.pools:
            return self.pools[name]
        if not name and len(self.pools) == 1:
            return next(iter(self.pools.values()))
        raise InvalidRequestError(
            f"must be one of {', '.join(self.pools)} (given: {name!r:.80})", "pool"
        )

    def add(self, pool: str, is_standby: bool = False) -> str:
        """Add an actor to a pool; returns its id, the first free one."""
        number = 0
        while f"{pool}-{number}" in self.specs:
            number += 1
        actor_id = f"{pool}-{number}"
        self._join(actor_id, self.pools[pool])
        if is_standby:
            self.standby.add(actor_id)
        return actor_id

    def take_into_use(self, actor_id: str) -> None:
        """End an actor's standby; it counts as if it had just joined."""
        self.standby.remove(actor_id)
        self.specs[actor_id] = self.specs.pop(actor_id)
        self.pool_of[actor_id] = self.pool_of.pop(actor_id)

    def remove(self, actor_id: str) -> None:
        """Remove an actor."""
        self.standby.discard(actor_id)
        del self.specs[actor_id], self.pool_of[actor_id]
        if self.budgets_bytes is not None:
            del self.budgets_bytes[actor_id]

    def members(self) -> dict[str, PoolMembers]:
        """Return the members of each pool, for the next controller's :meth:`resume`."""
        return {
            name: PoolMembers(pool.num_actors, tuple(self.of(name)), tuple(self.standby_of(name)))
            for name, pool in self.pools.items()
        }

    def resume(self, kept: Mapping[str, PoolMembers]) -> None:
        """Continue with the members that the previous controller ``kept``.

        A pool keeps its number of actors, unless the configured number has changed since; an
        autoscaled pool stays within its bounds. Actors that were in use come first, then standby
        actors, then new ones.
        """
        for name, pool in self.pools.items():
            before = kept.get(name)
            if before is None:
                continue
            is_same = before.configured == pool.num_actors
            number = len(before.actors) if is_same else pool.num_actors
            if pool.autoscaling is not None:
                number = pool.autoscaling.bounded(number)
            for actor_id in self.of(name):
                self.remove(actor_id)
            known = (*before.actors, *before.standby)
            for actor_id in known[:number]:
                self._join(actor_id, pool)
            while len(self.of(name)) < number:
                self.add(name)
            for actor_id in before.standby:
                if actor_id not in self.specs:
                    self._join(actor_id, pool)
                    self.standby.add(actor_id)

    def _join(self, actor_id: str, pool: PoolSpec) -> None:
        self.specs[actor_id], self.pool_of[actor_id] = pool.actor, pool.name
        if self.budgets_bytes is not None and pool.memory_budget_bytes is not None:
            self.budgets_bytes[actor_id] = pool.memory_budget_bytes
