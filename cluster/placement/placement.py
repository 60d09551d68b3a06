"""Which actor holds which expert: the versioned map, and the pure functions that decide it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import ConfigError
from cluster.spec import ExpertKey, ModelExperts

BUDGET_FIELD = "args.experts.memory_budget_bytes"


@dataclass(frozen=True, slots=True)
class Placement:
    """The cluster-wide assignment under one (epoch, version).

    ``holders`` maps each logical expert to the actors that hold a physical copy of it (none, while
    its only actor is being recreated). ``generations`` has every live actor's generation; together
    they name the Ray actor. A higher epoch, or the same and a higher version, is newer.
    """

    epoch: int
    version: int
    holders: Mapping[ExpertKey, tuple[str, ...]]
    generations: Mapping[str, int]

    @property
    def order(self) -> tuple[int, int]:
        """What decides which of two placements is newer."""
        return (self.epoch, self.version)

    def missing(self) -> list[ExpertKey]:
        """Return the experts without a live copy."""
        return [key for key, actors in self.holders.items() if not actors]

    def fewest_copies(self) -> int:
        """Return how many live copies the expert with the fewest has; 0 where there is none."""
        return min((len(actors) for actors in self.holders.values()), default=0)

    def without(self, actor_id: str) -> Placement:
        """Return the next version, in which ``actor_id`` is dead and holds nothing."""
        holders = {
            key: tuple(a for a in actors if a != actor_id) for key, actors in self.holders.items()
        }
        generations = {a: g for a, g in self.generations.items() if a != actor_id}
        return replace(self, version=self.version + 1, holders=holders, generations=generations)

    def with_actor(self, actor_id: str, generation: int, keys: Iterable[ExpertKey]) -> Placement:
        """Return the next version, in which ``actor_id`` is alive and holds ``keys``."""
        added = set(keys)
        holders = {
            key: (*actors, actor_id) if key in added and actor_id not in actors else actors
            for key, actors in self.holders.items()
        }
        generations = {**self.generations, actor_id: generation}
        return replace(self, version=self.version + 1, holders=holders, generations=generations)

    def without_copies(self, actor_id: str, keys: Iterable[ExpertKey]) -> Placement:
        """Return the next version, in which ``actor_id`` is not asked for ``keys`` any more."""
        retired = set(keys)
        holders = {
            key: tuple(a for a in actors if a != actor_id) if key in retired else actors
            for key, actors in self.holders.items()
        }
        return replace(self, version=self.version + 1, holders=holders)

    def to_wire(self) -> dict[str, Any]:
        """Return the placement as plain data."""
        return {
            "epoch": self.epoch,
            "version": self.version,
            "holders": [[*key, list(actors)] for key, actors in self.holders.items()],
            "generations": dict(self.generations),
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Placement:
        """Rebuild a placement from :meth:`to_wire`."""
        holders = {ExpertKey(m, i, e): tuple(actors) for m, i, e, actors in wire["holders"]}
        return cls(wire["epoch"], wire["version"], holders, dict(wire["generations"]))


def empty_placement(epoch: int, models: Sequence[ModelExperts]) -> Placement:
    """Return version 0 of an epoch: every expert of the models, none with a copy."""
    return Placement(epoch, 0, {key: () for model in models for key in model.expert_keys()}, {})


def assign_experts(
    models: Sequence[ModelExperts],
    actor_ids: Sequence[str],
    budgets_bytes: Mapping[str, int] | None = None,
    min_copies: int = 1,
    nodes: Mapping[str, str] | None = None,
    held: Mapping[str, Collection[ExpertKey]] | None = None,
) -> dict[str, list[ExpertKey]]:
    """Decide which experts each actor holds: ``min_copies`` each, on different actors.

    ``nodes`` has the node of each actor, as far as known; copies sit on different nodes as far as
    there are several. Every layer is spread over all actors: of A actors, expert e of layer l
    begins at (e + l) mod A, so that the actors' shares of any layer differ by at most one expert
    where nodes leave the choice, and those of all layers even out. The copies of what one actor
    holds are spread over the others too, which take over evenly. An actor keeps what it has
    ``held``, unless that has more copies than wanted; copies that are missing go to actors that are
    not in ``held``, if nodes allow it, so that nothing that runs has to load more. Deterministic.

    ``budgets_bytes`` bounds what each actor holds; where they differ, an actor's share is in
    proportion to its budget, in every layer and over all of them. Where experts do not fit that
    way, what is held is not kept, and at last the roomiest actors come first. Raises
    :class:`ConfigError` when there are more copies than actors, or the budgets are too small.
    """
    if min_copies > len(actor_ids):
        raise ConfigError(
            f"must be at most the number of actors, {len(actor_ids)} (given: {min_copies})",
            "args.experts.min_copies",
        )
    budgets: Mapping[str, float] = budgets_bytes or dict.fromkeys(actor_ids, math.inf)
    for kept, is_roomiest_first in ((held or {}, False), ({}, False), ({}, True)):
        deal = _Deal(actor_ids, budgets, min_copies, nodes or {}, kept, is_roomiest_first)
        if deal.reserve(models) and all(deal.add(model) for model in models):
            return deal.shares
    raise ConfigError(_does_not_fit(models, list(budgets.values()), min_copies), BUDGET_FIELD)


def _does_not_fit(models: Sequence[ModelExperts], budgets: Sequence[float], copies: int) -> str:
    num_bytes = copies * sum(len(m.expert_keys()) * m.expert_bytes for m in models)
    return (
        f"{len(budgets)} actors with budgets of {sum(budgets):.0f} bytes in all cannot hold "
        f"{num_bytes} bytes of whole experts. Raise the budgets or the number of actors."
    )


def surplus(
    placement: Placement, shares: Mapping[str, Sequence[ExpertKey]], beyond: Collection[ExpertKey]
) -> list[ExpertKey]:
    """Return what an actor need not hold ``beyond`` its share, since all who are to hold it do.

    ``shares`` has the experts that each actor is to hold.
    """
    wanted: dict[ExpertKey, set[str]] = {key: set() for key in beyond}
    if beyond:
        for actor_id, share in shares.items():
            for key in wanted.keys() & share:
                wanted[key].add(actor_id)
    return sorted(key for key, actors in wanted.items() if actors <= {*placement.holders[key]})


class _Deal:
    """One way of dealing experts out to actors, as far as it has come."""

    def __init__(
        self,
        actor_ids: Sequence[str],
        budgets_bytes: Mapping[str, float],
        num_copies: int,
        nodes: Mapping[str, str],
        held: Mapping[str, Collection[ExpertKey]],
        is_roomiest_first: bool,
    ) -> None:
        """Nothing is dealt yet; the arguments are as :func:`assign_experts` explains them."""
        self.shares: dict[str, list[ExpertKey]] = {actor_id: [] for actor_id in actor_ids}
        self._actor_ids = actor_ids
        self._room_bytes = {actor_id: budgets_bytes[actor_id] for actor_id in actor_ids}
        self._is_even = len(set(self._room_bytes.values())) == 1
        self._weights = dict.fromkeys(actor_ids, 1.0) if self._is_even else {**self._room_bytes}
        self._num_copies = num_copies
        self._nodes = nodes
        self._running = held.keys()
        self._held = {actor_id: frozenset(held.get(actor_id, ())) for actor_id in actor_ids}
        self._is_roomiest_first = is_roomiest_first

    def _holders(self, key: ExpertKey) -> list[str]:
        return [actor_id for actor_id in self._actor_ids if key in self._held[actor_id]]

    def reserve(self, models: Sequence[ModelExperts]) -> bool:
        """Take room for what is kept; returns whether there was enough."""
        for model in models:
            for key in model.expert_keys():
                holders = self._holders(key)
                for actor_id in holders if len(holders) <= self._num_copies else ():
                    self._room_bytes[actor_id] -= model.expert_bytes
        return min(self._room_bytes.values()) >= 0

    def add(self, model: ModelExperts) -> bool:
        """Deal out a model's experts; returns whether there was room for all of them."""
        dealt = dict.fromkeys(self._actor_ids, 0)
        for layer_id in model.layers:
            if self._is_even:  # else each layer goes on where the last one was rounded
                dealt = dict.fromkeys(self._actor_ids, 0)
            kept = [
                self._holders(ExpertKey(model.model, layer_id, e)) for e in range(model.num_experts)
            ]
            layer = self._spread_layer(layer_id, kept, dealt, model.expert_bytes)
            if layer is None:
                return False
            for expert_id, actors in enumerate(layer):
                for actor_id in actors:
                    self.shares[actor_id].append(ExpertKey(model.model, layer_id, expert_id))
        return True

    def _spread_layer(
        self, layer_id: int, kept: Sequence[list[str]], dealt: dict[str, int], num_bytes: int
    ) -> list[list[str]] | None:
        """Return the actors that are to hold each expert of a layer, those that do already first.

        ``dealt`` counts what each actor has been dealt; ``None`` when there is no room.
        """
        for actor_id in self._actor_ids:
            dealt[actor_id] += sum(actor_id in actors for actors in kept)
        shared: Counter[frozenset[str]] = Counter()  # experts that two actors both hold
        layer: list[list[str]] = []
        for expert_id, actors in enumerate(kept):
            begin = (expert_id + layer_id) % len(self._actor_ids)
            in_turn = [*self._actor_ids[begin:], *self._actor_ids[:begin]]
            has_surplus = len(actors) > self._num_copies
            if has_surplus:  # chosen anew, from those who hold it
                dealt.update({actor: dealt[actor] - 1 for actor in actors})
            chosen = [] if has_surplus else list(actors)
            while len(chosen) < self._num_copies:
                candidates = [
                    actor
                    for actor in in_turn  # the first in turn where all else is equal
                    if actor not in chosen
                    and (actor in actors or not has_surplus)
                    and self._room_bytes[actor] >= num_bytes
                ]
                if not candidates:
                    return None
                actor_id = min(candidates, key=lambda a: self._cost(a, chosen, dealt, shared))
                dealt[actor_id] += 1
                self._room_bytes[actor_id] -= num_bytes
                shared.update(frozenset((actor_id, other)) for other in chosen)
                chosen.append(actor_id)
            layer.append(chosen)
        return layer

    def _cost(
        self,
        actor: str,
        chosen: Sequence[str],
        dealt: Mapping[str, int],
        shared: Mapping[frozenset[str], int],
    ) -> tuple[float, ...]:
        """What speaks against an actor as the next copy's place, the heaviest first."""
        # An actor whose node is not known counts as one on a node of its own.
        node = self._nodes.get(actor, actor)
        return (
            -self._room_bytes[actor] if self._is_roomiest_first else 0,
            sum(node == self._nodes.get(other, other) for other in chosen),
            actor in self._running,
            (dealt[actor] + 1) / self._weights[actor],
            sum(shared[frozenset((actor, other))] for other in chosen),
        )


def crowding(
    actor_id: str,
    node: str,
    shares: Mapping[str, Sequence[ExpertKey]],
    nodes: Mapping[str, str],
) -> int:
    """Return how many copies of an actor's experts others hold on ``node``.

    ``shares`` has what each actor holds, ``nodes`` where each is.
    """
    own = set(shares[actor_id])
    return sum(
        len(own.intersection(share))
        for other, share in shares.items()
        if other != actor_id and nodes.get(other) == node
    )


def node_apart(
    actor_id: str,
    candidates: Collection[str],
    shares: Mapping[str, Sequence[ExpertKey]],
    nodes: Mapping[str, str],
) -> str | None:
    """Return the node where an actor would have fewer of its copies beside it than where it is.

    Of ``candidates``, which have room for it, the one with the fewest; ``None`` where none is
    better.
    """
    here = nodes.get(actor_id)
    if here is None:
        return None
    best = min(sorted(candidates), key=lambda n: crowding(actor_id, n, shares, nodes), default=here)
    is_better = crowding(actor_id, best, shares, nodes) < crowding(actor_id, here, shares, nodes)
    return best if is_better else None
