"""Which actor holds which expert: the versioned map, and the pure functions that decide it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cluster.errors import ConfigError


class ExpertKey(NamedTuple):
    """A logical expert: which model, which layer of it, which expert of that layer."""

    model: str
    layer_id: int
    expert_id: int


@dataclass(frozen=True, slots=True)
class ModelExperts:
    """The experts of one model as placement sees them: how many, where, how large."""

    model: str
    layers: tuple[int, ...]
    num_experts: int
    expert_bytes: int

    def expert_keys(self) -> list[ExpertKey]:
        """Return every logical expert of the model, layer by layer."""
        return [
            ExpertKey(self.model, layer_id, expert_id)
            for layer_id in self.layers
            for expert_id in range(self.num_experts)
        ]


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
    memory_budget_bytes: int | None,
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
    Raises :class:`ConfigError` when there are more copies than actors, or a share is larger than
    ``memory_budget_bytes``.
    """
    if min_copies > len(actor_ids):
        raise ConfigError(
            f"must be at most the number of actors, {len(actor_ids)} (given: {min_copies})",
            "args.experts.min_copies",
        )
    shares: dict[str, list[ExpertKey]] = {actor_id: [] for actor_id in actor_ids}
    share_bytes = dict.fromkeys(actor_ids, 0)
    kept_by = {actor_id: frozenset((held or {}).get(actor_id, ())) for actor_id in actor_ids}
    for model in models:
        for layer_id in model.layers:
            kept = [
                [
                    actor
                    for actor in actor_ids
                    if ExpertKey(model.model, layer_id, e) in kept_by[actor]
                ]
                for e in range(model.num_experts)
            ]
            holders = _spread_layer(layer_id, kept, actor_ids, min_copies, nodes or {}, held or {})
            for expert_id, actors in enumerate(holders):
                for actor_id in actors:
                    shares[actor_id].append(ExpertKey(model.model, layer_id, expert_id))
                    share_bytes[actor_id] += model.expert_bytes
    largest = max(share_bytes.values())
    if memory_budget_bytes is not None and largest > memory_budget_bytes:
        raise ConfigError(
            f"{len(actor_ids)} actors need up to {largest} bytes each for their experts; the "
            f"budget is {memory_budget_bytes}. Raise it or the number of actors.",
            "args.experts.memory_budget_bytes",
        )
    return shares


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


def _spread_layer(
    layer_id: int,
    kept: Sequence[list[str]],
    actor_ids: Sequence[str],
    num_copies: int,
    nodes: Mapping[str, str],
    running: Collection[str],
) -> list[list[str]]:
    """Return the actors that are to hold each expert of a layer, those that do already first."""
    held = {actor_id: sum(actor_id in actors for actors in kept) for actor_id in actor_ids}
    shared: Counter[frozenset[str]] = Counter()  # experts that two actors both hold
    layer: list[list[str]] = []
    for expert_id, actors in enumerate(kept):
        begin = (expert_id + layer_id) % len(actor_ids)
        in_turn = [*actor_ids[begin:], *actor_ids[:begin]]
        has_surplus = len(actors) > num_copies
        if has_surplus:  # chosen anew, from those who hold it
            held.update({actor: held[actor] - 1 for actor in actors})
        chosen = [] if has_surplus else list(actors)
        while len(chosen) < num_copies:
            candidates = [
                actor
                for actor in in_turn
                if actor not in chosen and (not has_surplus or actor in actors)
            ]
            actor_id = min(  # the first in turn where all else is equal
                candidates,
                key=lambda actor: (
                    # An actor whose node is not known counts as one on a node of its own.
                    sum(nodes.get(actor, actor) == nodes.get(other, other) for other in chosen),
                    actor in running,
                    held[actor],
                    sum(shared[frozenset((actor, other))] for other in chosen),
                ),
            )
            held[actor_id] += 1
            shared.update(frozenset((actor_id, other)) for other in chosen)
            chosen.append(actor_id)
        layer.append(chosen)
    return layer
