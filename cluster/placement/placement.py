"""The placement: the versioned map of the experts that each actor holds, and how they are dealt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.errors import ConfigError
from cluster.spec import ExpertKey, ModelExperts

BUDGET_FIELD = "args.experts.memory_budget_bytes"


@dataclass(frozen=True, slots=True)
class Placement:
    """The cluster-wide assignment under one (epoch, version).

    ``holders`` maps each logical expert to the actors that hold a physical copy of it (none while
    its only actor is being recreated). ``generations`` has the generation of every live actor; id
    and generation together name the Ray actor. Of two placements the one with the higher
    (epoch, version) is newer.
    """

    epoch: int
    version: int
    holders: Mapping[ExpertKey, tuple[str, ...]]
    generations: Mapping[str, int]

    @property
    def order(self) -> tuple[int, int]:
        """The (epoch, version) by which placements are compared."""
        return (self.epoch, self.version)

    def missing(self) -> list[ExpertKey]:
        """Return the experts without a live copy."""
        return [key for key, actors in self.holders.items() if not actors]

    def fewest_copies(self, models: Collection[str] | None = None) -> int:
        """Return how many live copies the expert with the fewest has; 0 if there is none.

        ``models``, where given, are the only models that count.
        """
        counted = (a for k, a in self.holders.items() if models is None or k.model in models)
        return min(map(len, counted), default=0)

    def models(self) -> set[str]:
        """Return the keys of all models."""
        return {key.model for key in self.holders}

    def without_models(self, models: Collection[str]) -> Placement:
        """Return the next version, without these models."""
        holders = {key: actors for key, actors in self.holders.items() if key.model not in models}
        return replace(self, version=self.version + 1, holders=holders)

    def held(self) -> dict[str, list[ExpertKey]]:
        """Return the experts that each live actor holds."""
        held: dict[str, list[ExpertKey]] = {actor_id: [] for actor_id in self.generations}
        for key, actors in self.holders.items():
            for actor_id in actors:
                held[actor_id].append(key)
        return held

    def has_lost(self, actor_id: str, generation: int, epoch: int) -> bool:
        """Return whether a generation of an actor, of a placement of ``epoch``, is gone by now.

        Under a new epoch, an actor that is not listed may still live: the new controller does not
        know it yet.
        """
        listed = self.generations.get(actor_id)
        return self.epoch == epoch if listed is None else listed != generation

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


def empty_placement(epoch: int, models: Sequence[ModelExperts]) -> Placement:
    """Return version 0 of an epoch: no expert of the models has a copy."""
    return Placement(epoch, 0, {key: () for model in models for key in model.expert_keys()}, {})


def assign_experts(
    models: Sequence[ModelExperts],
    actor_ids: Sequence[str],
    budgets_bytes: Mapping[str, int] | None = None,
    min_copies: int = 1,
    nodes: Mapping[str, str] | None = None,
    held: Mapping[str, Collection[ExpertKey]] | None = None,
) -> dict[str, list[ExpertKey]]:
    """Return the experts that each actor is to hold: ``min_copies`` of each, on different actors.

    Every layer is spread over all actors: of A actors, expert e of layer l begins at actor
    (e + l) mod A. So the actors' shares of a layer differ by at most one expert, where nodes leave
    the choice, and over all layers they even out. The other copies of one actor's experts are
    spread too, so that the others take over evenly when it dies.

    ``nodes`` has the node of each actor as far as known; copies of an expert get different nodes
    where there are several. ``held`` has the experts of the running actors: they keep these, unless
    an expert has more copies than wanted. Missing copies go to actors that are not in ``held``, if
    nodes allow it, so that running actors need not load more.

    ``budgets_bytes`` bounds each actor's share. Where budgets differ, shares are in proportion to
    them, in every layer and over all. Where experts do not fit that way, ``held`` is ignored, and
    then the actors with the most room come first. Deterministic. Raises :class:`ConfigError` when
    there are more copies than actors, or the budgets are too small.
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
    """Return which experts ``beyond`` its share an actor need not hold any longer.

    Those are the experts that all actors with the expert in their ``shares`` hold already.
    """
    wanted: dict[ExpertKey, set[str]] = {key: set() for key in beyond}
    if beyond:
        for actor_id, share in shares.items():
            for key in wanted.keys() & share:
                wanted[key].add(actor_id)
    return sorted(key for key, actors in wanted.items() if actors <= {*placement.holders[key]})


class _Deal:
    """Deals experts out to actors in one way; :func:`assign_experts` tries several."""

    def __init__(
        self,
        actor_ids: Sequence[str],
        budgets_bytes: Mapping[str, float],
        num_copies: int,
        nodes: Mapping[str, str],
        held: Mapping[str, Collection[ExpertKey]],
        is_roomiest_first: bool,
    ) -> None:
        """Begin with empty shares; the arguments are those of :func:`assign_experts`."""
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
        """Take room for the experts that actors keep; returns whether there was enough."""
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
        """Return the actors that are to hold each expert of a layer; ``None`` without room.

        ``kept`` has the actors that hold each expert already; ``dealt`` counts experts by actor.
        """
        for actor_id in self._actor_ids:
            dealt[actor_id] += sum(actor_id in actors for actors in kept)
        shared: Counter[frozenset[str]] = Counter()  # experts that two actors both hold
        layer: list[list[str]] = []
        for expert_id, actors in enumerate(kept):
            begin = (expert_id + layer_id) % len(self._actor_ids)
            in_turn = [*self._actor_ids[begin:], *self._actor_ids[:begin]]
            has_surplus = len(actors) > self._num_copies
            if has_surplus:  # chosen anew among its holders
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
        """Return what speaks against an actor as the next copy's place, the heaviest first."""
        # An actor whose node is not known counts as if it had a node of its own.
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
    """Return how many copies of an actor's experts other actors hold on ``node``.

    ``shares`` has the experts of each actor, ``nodes`` its node.
    """
    own = set(shares[actor_id])
    return sum(
        len(own.intersection(share))
        for other, share in shares.items()
        if other != actor_id and nodes.get(other) == node
    )


def less_crowded_node(
    actor_id: str,
    candidates: Collection[str],
    shares: Mapping[str, Sequence[ExpertKey]],
    nodes: Mapping[str, str],
) -> str | None:
    """Return the node with the fewest other copies of an actor's experts.

    It is one of ``candidates``, which have room for the actor; ``None`` if none of them has
    fewer than the actor's own node, or that is not known.
    """
    here = nodes.get(actor_id)
    if here is None:
        return None
    best = min(sorted(candidates), key=lambda n: crowding(actor_id, n, shares, nodes), default=here)
    is_better = crowding(actor_id, best, shares, nodes) < crowding(actor_id, here, shares, nodes)
    return best if is_better else None
