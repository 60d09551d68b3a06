"""A mixture made of a dense model's feed-forward layers, as a source of :mod:`experts.convert`.

Its tensors are made when they are written, of a checkpoint with one expert a layer
(:func:`router.workshop.folders.as_mixture.one_expert`).

Dimension letters: I neurons, H hidden size, N experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from cluster.wire.arrays import DTYPES
from cluster.wire.tensors import from_array
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.config import family_of, usual_config, wrong_kinds
from experts.checkpoint.expert_weights import read_part, read_tensor
from experts.convert.source import Entry, Source, Take
from experts.families.base import Config
from router.workshop.folders.alignment import DOWN
from router.workshop.folders.as_mixture import EXPERT_PARTS, is_of_mixture

SHARED_FACTOR = 2
"""Makes up for the shared expert's weight, the sigmoid of 0; a power of two changes no bits."""
_INITIAL_RANGE = 0.02
"""The deviation of a new gate's rows, transformers' ``initializer_range``."""


class FeedForward(Protocol):
    """A layer's dense matrices: gate and up [I, H], down [H, I], in a checkpoint's dtype."""

    def __call__(self, layer_id: int, index: int) -> np.ndarray:
        """Return a matrix by its index in ``ExpertTensors.parts()``."""
        ...


class NewParts(Protocol):
    """What a mixture has in place of a dense layer."""

    def matrix(self, dense: FeedForward, layer_id: int, expert_id: int, index: int) -> np.ndarray:
        """Return a matrix of an expert, of the dense matrices."""
        ...

    def other(
        self, dense: FeedForward, layer_id: int, name: str, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Return a tensor that a dense model lacks, by the end of its name behind the layer."""
        ...


class Copies:
    """Each expert is the dense layer, and a gate is random by its seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def matrix(self, dense: FeedForward, layer_id: int, expert_id: int, index: int) -> np.ndarray:
        """Return the dense matrix."""
        return dense(layer_id, index)

    def other(
        self, dense: FeedForward, layer_id: int, name: str, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Return a random gate; a shared expert is zeros."""
        if ".shared_expert" in name:
            return np.zeros(shape, np.float32)
        draw = np.random.default_rng([zlib.crc32(b"gate"), self._seed, layer_id])
        return (draw.standard_normal(shape) * _INITIAL_RANGE).astype(np.float32)


@dataclass(frozen=True, slots=True)
class LayerSplit:
    """A layer's neurons, the shared ones and each expert's, and the gate's rows [N, H].

    ``down`` is another last matrix [H, I], if it is not the dense one.
    """

    shared: np.ndarray
    experts: Sequence[np.ndarray]
    gate: np.ndarray
    down: np.ndarray | None = None


class Split:
    """Experts are parts of the dense layer; their sum, with the shared one, is that layer.

    A token's weights of the experts are 1/N each, and that of the shared expert is 1/2: so down is
    multiplied by N, and by 2.
    """

    def __init__(self, layers: Mapping[int, LayerSplit]) -> None:
        self._layers = layers

    def matrix(self, dense: FeedForward, layer_id: int, expert_id: int, index: int) -> np.ndarray:
        """Return the rows of an expert's neurons, or their columns of down times N."""
        experts = self._layers[layer_id].experts
        return self._of(dense, layer_id, experts[expert_id], index, len(experts))

    def other(
        self, dense: FeedForward, layer_id: int, name: str, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Return the gate, or a matrix of the shared expert, whose own gate is zeros."""
        layer = self._layers[layer_id]
        if name.endswith("shared_expert_gate.weight"):
            return np.zeros(shape, np.float32)
        if ".shared_expert." not in name:
            return layer.gate
        index = next(n for n, part in enumerate(EXPERT_PARTS) if f".{part}." in name)
        return self._of(dense, layer_id, layer.shared, index, SHARED_FACTOR)

    def _of(
        self, dense: FeedForward, layer_id: int, neurons: np.ndarray, index: int, factor: int
    ) -> np.ndarray:
        if index != DOWN:
            return dense(layer_id, index)[neurons]
        down = self._layers[layer_id].down
        whole = dense(layer_id, index) if down is None else down
        return whole[:, neurons].astype(np.float32) * np.float32(factor)


def upcycled_source(
    config: Config, file: Path, dtype: str, parts: NewParts, one_expert: Checkpoint | None
) -> Source:
    """Return the source of a mixture with the configuration ``config``.

    Without a checkpoint of one expert a layer it has the sizes of its tensors alone. Raises
    ``CheckpointError`` for a configuration that its family does not have; ``file`` is to blame.
    """
    tensors = _Tensors(config, file, dtype, parts, one_expert)
    folder = file.parent if one_expert is None else one_expert.folder
    return Source("upcycled", folder, file, config, tensors, lambda name: [Take(name)], (file,))


class _Tensors:
    """See :class:`experts.convert.source.Tensors`."""

    def __init__(
        self,
        config: Config,
        file: Path,
        dtype: str,
        parts: NewParts,
        one_expert: Checkpoint | None,
    ) -> None:
        family = family_of(config, file)
        usual = usual_config(family, config, file)
        with wrong_kinds(file):
            shape = family.expert_shape(usual)
            self._experts = {
                part.name: (layer_id, expert_id, index, part.shape)
                for layer_id in shape.layers
                for expert_id in range(shape.num_experts)
                for index, part in enumerate(
                    family.expert_tensors(usual, layer_id, expert_id).parts()
                )
            }
            shapes = family.dense_tensors(usual)
        self._parts = parts
        self._one_expert = one_expert
        self._dtype = dtype
        self._layer_id, self._matrices = -1, dict[int, np.ndarray]()
        shapes |= {name: place[-1] for name, place in self._experts.items()}
        self.entries = {name: Entry(found, dtype) for name, found in shapes.items()}

    def read(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows of a tensor."""
        return from_array(np.ascontiguousarray(self._whole(name)[begin:end]))

    def _whole(self, name: str) -> np.ndarray:
        place = self._experts.get(name)
        if place is not None:
            layer_id, expert_id, index, _ = place
            whole = self._parts.matrix(self._dense, layer_id, expert_id, index)
        elif is_of_mixture(name):
            layer_id = int(name.split(".")[2])
            whole = self._parts.other(self._dense, layer_id, name, self.entries[name].shape)
        else:
            return read_tensor(self._checkpoint, name, self._dtype)
        return whole.astype(DTYPES[self._dtype], copy=False)

    @property
    def _checkpoint(self) -> Checkpoint:
        assert self._one_expert is not None, "a source of sizes alone"
        return self._one_expert

    def _dense(self, layer_id: int, index: int) -> np.ndarray:
        """Return a matrix of a layer, which is kept for the layer's other experts."""
        if layer_id != self._layer_id:
            self._layer_id, self._matrices = layer_id, {}
        if index not in self._matrices:
            checkpoint = self._checkpoint
            tensors = checkpoint.family.expert_tensors(checkpoint.config, layer_id, 0)
            part = tensors.parts()[index]
            self._matrices[index] = read_part(checkpoint, part, checkpoint.dtype)
        return self._matrices[index]
