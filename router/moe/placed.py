"""One model as the newest placement has it: whether it is placed, and which experts are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from cluster.placement.placement import Placement
from router.control.placement_view import PlacementView
from router.moe.missing import Awaited
from router.moe.permute import Layout, lay_out


def missing_by_layer(placement: Placement, model: str) -> dict[int, np.ndarray]:
    """Return the missing experts, bool [E], of each layer with missing experts."""
    missing = [key for key in placement.missing() if key.model == model]
    sizes = Counter(key.layer_id for key in placement.holders if key.model == model)
    masks = {key.layer_id: np.zeros(sizes[key.layer_id], dtype=bool) for key in missing}
    for key in missing:
        masks[key.layer_id][key.expert_id] = True
    return masks


class Layouts:
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
        holders = self.holders(placement, layer_id)
        if layer_id not in self._fixed:
            layout = None
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
        self._view = view
        self._was_placed = False
        self.layouts = Layouts(model)

    def is_placed(self) -> bool:
        """Return whether a placement is known that has the model."""
        placement = self._view.placement
        is_placed = placement is not None and self.layouts.has_model(placement)
        self._was_placed = self._was_placed or is_placed
        return is_placed

    def is_withdrawn(self) -> bool:
        """Return whether the placement had the model and has it no longer: it was replaced."""
        return not self.is_placed() and self._was_placed

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
