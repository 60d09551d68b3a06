"""A mixture made of a dense model's feed-forward layers.

It is made of a checkpoint with one expert a layer
(:func:`workshop.folders.as_mixture.one_expert`).

Dimension letters: I neurons, H hidden size, N experts.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from experts.checkpoint.checkpoint import Checkpoint
from workshop.folders.as_mixture import EXPERT_PARTS
from workshop.folders.merge.likeness import DOWN
from workshop.folders.rewritten import NewTensors

_SHARED = re.compile(rf"\.(\d+)\.mlp\.shared_expert\.({'|'.join(EXPERT_PARTS)})\.")
SHARED_FACTOR = 2
"""Makes up for the shared expert's weight, the sigmoid of 0; a power of two changes no bits."""
_INITIAL_RANGE = 0.02
"""The deviation of a new gate's rows, transformers' ``initializer_range``."""


class _Upcycled(NewTensors):
    """The tensors of a mixture; ``checkpoint`` is the dense model with one expert a layer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        # A layer's matrices are kept for its other experts.
        self.whole = lru_cache(len(EXPERT_PARTS))(self._whole)

    def _whole(self, layer_id: int, index: int) -> np.ndarray:
        return self.part(layer_id, 0, index, self.checkpoint.dtype)


class Copies(_Upcycled):
    """Each expert is the dense layer, and a gate is random by its seed."""

    def __init__(self, checkpoint: Checkpoint, num_experts: int, seed: int) -> None:
        super().__init__(checkpoint)
        self._num_experts = num_experts
        self._seed = seed

    def matrix(self, layer_id: int, expert_id: int, index: int) -> np.ndarray:
        """Return the dense matrix."""
        return self.whole(layer_id, index)

    def gate_rows(self, layer_id: int, rows: np.ndarray) -> np.ndarray:
        """Return a random gate."""
        draw = np.random.default_rng([zlib.crc32(b"gate"), self._seed, layer_id])
        drawn = draw.standard_normal((self._num_experts, *rows.shape[1:]))
        return (drawn * _INITIAL_RANGE).astype(np.float32)


@dataclass(frozen=True, slots=True)
class LayerSplit:
    """A layer's neurons, the shared ones and each expert's, and the gate's rows [N, H].

    ``down`` is another last matrix [H, I], if it is not the dense one.
    """

    shared: np.ndarray
    experts: Sequence[np.ndarray]
    gate: np.ndarray
    down: np.ndarray | None = None


class Split(_Upcycled):
    """Experts are parts of the dense layer; their sum, with the shared one, is that layer.

    A token's weights of the experts are 1/N each, and that of the shared expert is 1/2: so down is
    multiplied by N, and by 2.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Mapping[int, LayerSplit]) -> None:
        super().__init__(checkpoint)
        self._layers = layers

    def matrix(self, layer_id: int, expert_id: int, index: int) -> np.ndarray:
        """Return the rows of an expert's neurons, or their columns of down times N."""
        experts = self._layers[layer_id].experts
        return self._of(layer_id, experts[expert_id], index, len(experts))

    def gate_rows(self, layer_id: int, rows: np.ndarray) -> np.ndarray:
        """Return the gate of the split."""
        return self._layers[layer_id].gate

    def dense(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return a matrix of the shared expert too; its own gate stays zeros."""
        match = _SHARED.search(name)
        if match is None:
            return super().dense(name, shape)
        layer_id = int(match[1])
        shared, index = self._layers[layer_id].shared, EXPERT_PARTS.index(match[2])
        return np.ascontiguousarray(self._of(layer_id, shared, index, SHARED_FACTOR))

    def _of(self, layer_id: int, neurons: np.ndarray, index: int, factor: int) -> np.ndarray:
        if index != DOWN:
            return self.whole(layer_id, index)[neurons]
        down = self._layers[layer_id].down
        whole = self.whole(layer_id, index) if down is None else down
        return whole[:, neurons].astype(np.float32) * np.float32(factor)
