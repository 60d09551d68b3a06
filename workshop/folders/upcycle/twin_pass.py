"""Two passes of the same rows side by side: through a model, and through what is made of it.

What a layer is made into is fitted to the inputs that the new layers before it give, and makes up
for their errors.

Dimension letters: T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from workshop.folders.layerwise import LayeredModel, Observer
from workshop.folders.passes import Pass, Progress, Seen
from workshop.folders.text import Rows

Missed = Callable[[], torch.Tensor]
"""Returns what the states after a layer lack [T, H], by the source's own experts there."""


class TwinPass:
    """Rows of token ids on their way through a model and, a layer behind, through a new one."""

    def __init__(self, model: LayeredModel, rows: Rows, folder: Path) -> None:
        """``folder`` may have the states of the same passes, broken off."""
        self._source = Pass(model, rows.inputs, folder / "source")
        self._made = Pass(model, rows.inputs, folder / "made")

    def run(self, new_observer: Callable[[int, Missed], Observer], progress: Progress) -> Seen:
        """Pass all layers; returns what the observers of the new model's layers saw.

        An observer gives :meth:`LayerExperts.replace` the new experts of its layer, and may ask
        what the states lack before it does. Raises as :meth:`Pass.run` does.
        """

        def observer_of(layer_id: int) -> Observer:
            self._source.run_to(layer_id + 1)
            return new_observer(layer_id, lambda: self._missed(layer_id + 1))

        return self._made.run(observer_of, progress)

    def _missed(self, layer_id: int) -> torch.Tensor:
        """Return the difference of the states before a layer."""
        return self._source.states(layer_id) - self._made.states(layer_id)
