"""One model as the newest placement has it: whether it is placed, and which experts are missing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from router.control.placement_view import PlacementView
from router.moe.missing import Awaited
from router.moe.permute import Layouts


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
