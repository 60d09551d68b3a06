"""Permute: orders a layer's rows by the actors that compute them, and back by token.

The pairs of a layer are ordered by the actors that hold the experts, so that each actor's rows are
contiguous. Each function here needs several small array operations. In a step of few tokens their
number decides the time of a layer, so native code (:mod:`cluster.native`) does them at once. numpy
does them where the native code is not built.

Dimension letters: T tokens, K experts per token, P = T x K pairs, E experts, H hidden size. Pair
t * K + r is token t with the expert that the gate put at rank r.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from cluster.native import native
from cluster.placement.placement import Placement
from cluster.wire.frames import Buffers, Shape
from cluster.wire.tensors import to_bytes, to_raw
from experts.compute.kernel_classes import NATIVE_CLASSES
from router.moe.device_rows import LayerRows
from router.moe.missing import Awaited

if TYPE_CHECKING:  # the workshop computes layers without Ray, which the view imports
    from router.control.placement_view import PlacementView


@dataclass(frozen=True, slots=True)
class Holder:
    """The actor of some experts of a layout; ``actor_id`` is ``None`` for missing experts."""

    actor_id: str | None
    generation: int


@dataclass(frozen=True, slots=True)
class Layout:
    """One layer's experts, ordered so that the experts of one holder are adjacent.

    ``ordered_ids`` [E] are the experts in that order; ``ends`` are where the holders' experts end.
    """

    ordered_ids: np.ndarray
    ends: np.ndarray
    holders: tuple[Holder, ...]


class Part(NamedTuple):
    """The pairs of a layer that one actor computes, grouped by expert.

    ``expert_ids`` are those with pairs, ``counts`` their numbers of pairs.
    """

    actor_id: str
    generation: int
    expert_ids: tuple[int, ...]
    counts: tuple[int, ...]
    pairs: np.ndarray


def as_sent(row_shape: Shape) -> Shape:
    """Return the same shape: the experts of a language model map hidden states to their like."""
    return row_shape


def lay_out(holders: Mapping[int, str | None], generations: Mapping[str, int]) -> Layout:
    """Order a layer's experts by holder, then by id; experts without a holder come first.

    ``holders`` maps every expert of the layer to its actor, or to ``None``.
    """
    expert_ids = sorted(holders, key=lambda expert_id: (holders[expert_id] or "", expert_id))
    sizes: Counter[str | None] = Counter()  # in the order of the experts
    for expert_id in expert_ids:
        sizes[holders[expert_id]] += 1
    return Layout(
        np.array(expert_ids, np.int64),
        np.cumsum(list(sizes.values()), dtype=np.int64),
        tuple(
            Holder(actor_id, 0 if actor_id is None else generations[actor_id]) for actor_id in sizes
        ),
    )


def split(
    layout: Layout, expert_ids: np.ndarray, k: int, pairs: np.ndarray | None
) -> tuple[np.ndarray, list[Part], np.ndarray]:
    """Divide a layer's pairs among its actors.

    ``expert_ids`` [P] is the expert of every pair of the layer. ``pairs`` are the pairs to divide,
    ascending; ``None`` is all of them. Returns three things: the pairs that have an actor, ordered
    by actor, then by expert as the layout has them, then by rank, then by token; the actors' parts,
    each a slice of that order; the pairs whose expert is missing. An expert's rows come by rank as
    in transformers: in torch's products a row's bits depend on its place.
    """
    ordered, shares = route(expert_ids, k, layout.ordered_ids, layout.ends, pairs)
    parts: list[Part] = []
    first = 0
    for holder, (share_ids, counts, begin, end) in zip(layout.holders, shares, strict=True):
        if holder.actor_id is None:  # missing experts, which :func:`lay_out` puts first
            first = end
        elif share_ids:
            part_pairs = ordered[begin:end]
            parts.append(Part(holder.actor_id, holder.generation, share_ids, counts, part_pairs))
    return ordered[first:], parts, ordered[:first]


def summands_of(ids: np.ndarray) -> np.ndarray:
    """Return which of the summands each pair's row is, int64 [P].

    The summands of token t are ``t * K`` to ``t * K + K - 1``, by ascending expert. Summed in this
    order, rows give the same result whichever actors compute them. ``ids`` [T, K] are the gate's
    choices, int64 and contiguous.
    """
    k = ids.shape[1]
    summand_of = np.empty(ids.size, np.int64)
    if native is not None:
        native.summands_of(ids, k, summand_of)
        return summand_of
    by_expert = ids.argsort(axis=1, kind="stable")  # a token's ranks, by ascending expert
    summand_of[(by_expert + np.arange(0, ids.size, k)[:, None]).ravel()] = np.arange(ids.size)
    return summand_of


Share = tuple[tuple[int, ...], tuple[int, ...], int, int]
"""A holder's experts with pairs: ids, numbers of pairs, and where their pairs begin and end."""


def route(
    expert_ids: np.ndarray,
    k: int,
    ordered_ids: np.ndarray,
    ends: np.ndarray,
    pairs: np.ndarray | None,
) -> tuple[np.ndarray, list[Share]]:
    """Order pairs by their expert, as the layout orders experts, then by rank, then by token.

    ``expert_ids`` int64 [P] is the expert of every pair of the layer. ``ordered_ids`` int64 [E] and
    ``ends`` int64 are those of a :class:`Layout`. ``pairs`` ascend; ``None`` is all of them.
    Returns the pairs in order, and the share of each holder.
    """
    if native is not None:
        ordered = np.empty(len(expert_ids if pairs is None else pairs), np.int64)
        shares: list[Share] = native.route(expert_ids, k, ordered_ids, ends, pairs, ordered)
        return ordered, shares
    pairs = np.arange(len(expert_ids)) if pairs is None else pairs
    index_of = np.empty_like(ordered_ids)
    index_of[ordered_ids] = np.arange(len(ordered_ids))
    indices = index_of[expert_ids[pairs]]
    keys = (indices * k + pairs % k) * len(expert_ids) + pairs
    counts = np.bincount(indices, minlength=len(index_of))
    bounds = [0, *np.cumsum(counts).tolist()]
    shares = []
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        used = start + np.flatnonzero(counts[start:end])
        ids, numbers = tuple(ordered_ids[used].tolist()), tuple(counts[used].tolist())
        shares.append((ids, numbers, bounds[start], bounds[end]))
    return pairs[keys.argsort()], shares


def gather(rows: torch.Tensor, ordered: np.ndarray, k: int) -> memoryview:
    """Return the bytes of rows [T, ...], permuted: the row of each pair's token."""
    if native is not None:
        row_bytes = rows.nbytes // rows.shape[0]
        return memoryview(native.gather(to_bytes(rows), ordered, k, row_bytes))
    return to_raw(rows).take(ordered // k, axis=0).data.cast("B")


def rows_of_parts(
    rows: LayerRows, ordered: np.ndarray, parts: Sequence[Part], k: int
) -> list[Buffers]:
    """Return the bytes of each part's rows; ``ordered`` are the pairs of all parts."""
    if not isinstance(rows, torch.Tensor):
        return [rows.of(part.pairs) for part in parts]
    # All are gathered at once; each part's rows are a slice of them.
    gathered = gather(rows, ordered, k)
    row_bytes = len(gathered) // len(ordered)
    ends = itertools.accumulate([len(part.pairs) * row_bytes for part in parts], initial=0)
    return [(gathered[begin:end],) for begin, end in itertools.pairwise(ends)]


def missing_by_layer(placement: Placement, model: str) -> dict[int, np.ndarray]:
    """Return the missing experts, bool [E], of each layer with missing experts."""
    missing = [key for key in placement.missing() if key.model == model]
    sizes = Counter(key.layer_id for key in placement.holders if key.model == model)
    masks = {key.layer_id: np.zeros(sizes[key.layer_id], dtype=bool) for key in missing}
    for key in missing:
        masks[key.layer_id][key.expert_id] = True
    return masks


class LayoutCache:
    """The layouts of one model's layers under the latest placement that was asked about."""

    def __init__(self, model: str) -> None:
        """``model`` is the model's key in the placement."""
        self._model = model
        self._placement: Placement | None = None
        self._holders: dict[int, list[tuple[str, ...]]] = {}
        self._fixed: dict[int, Layout | None] = {}
        self._missing: dict[int, np.ndarray] = {}
        self._has_model = False

    def holders(self, placement: Placement, layer_id: int) -> list[tuple[str, ...]]:
        """Return the actors that hold a copy of each expert of a layer."""
        self._keep(placement)
        holders = self._holders.get(layer_id)
        if holders is None:
            actors_of = {
                key.expert_id: actors
                for key, actors in placement.holders.items()
                if (key.model, key.layer_id) == (self._model, layer_id)
            }
            holders = self._holders[layer_id] = [actors_of[e] for e in range(len(actors_of))]
        return holders

    def fixed(self, placement: Placement, layer_id: int) -> Layout | None:
        """Return the only possible layout of a layer; ``None`` where an expert has several copies.

        Missing experts are laid out without an actor.
        """
        self._keep(placement)
        if layer_id not in self._fixed:
            holders, layout = self.holders(placement, layer_id), None
            if all(len(actors) < 2 for actors in holders):
                only = {e: actors[0] if actors else None for e, actors in enumerate(holders)}
                layout = lay_out(only, placement.generations)
            self._fixed[layer_id] = layout
        return self._fixed[layer_id]

    def missing(self, placement: Placement, layer_id: int) -> np.ndarray | None:
        """Return the missing experts of a layer, bool [E]; ``None`` where none is missing."""
        self._keep(placement)
        return self._missing.get(layer_id)

    def has_model(self, placement: Placement) -> bool:
        """Return whether the placement has the model."""
        self._keep(placement)
        return self._has_model

    def _keep(self, placement: Placement) -> None:
        """Forget the layouts of an earlier placement."""
        if placement is not self._placement:
            self._placement = placement
            self._holders, self._fixed = {}, {}
            self._missing = missing_by_layer(placement, self._model)
            self._has_model = any(key.model == self._model for key in placement.holders)


class PlacedModel:
    """Answers questions about a model's placement, which it follows; for one thread."""

    def __init__(self, model: str, view: PlacementView) -> None:
        """``model`` is the model's key."""
        self._model = model
        self._view = view
        self.layouts = LayoutCache(model)

    def is_placed(self) -> bool:
        """Return whether a placement is known that has the model."""
        placement = self._view.placement
        return placement is not None and self.layouts.has_model(placement)

    def is_withdrawn(self) -> bool:
        """Return whether the placement no longer has the model, which it had: it was replaced."""
        return not self.is_placed() and self._model in self._view.models

    @property
    def generations(self) -> Mapping[str, int]:
        """The generation of each expert actor in the placement."""
        placement = self._view.placement
        return {} if placement is None else placement.generations

    @property
    def other_classes(self) -> frozenset[str]:
        """The kernel classes of experts that are not native code's, so a row may need its batch."""
        return self._view.expert_classes - NATIVE_CLASSES

    def missing(self, layer_id: int) -> np.ndarray | None:
        """Return the missing experts of a layer, bool [E]; ``None`` where none is missing."""
        placement = self._view.placement
        return None if placement is None else self.layouts.missing(placement, layer_id)

    def have_all(self, experts: Iterable[Awaited]) -> bool:
        """Return whether each of the (layer, expert) pairs has a live copy."""
        for layer_id, expert_id in experts:
            missing = self.missing(layer_id)
            if missing is not None and missing[expert_id]:
                return False
        return True
