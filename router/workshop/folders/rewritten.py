"""A checkpoint with other experts, as a source of :mod:`experts.convert`.

Its tensors are made when they are written, one at a time. Quantised tensors become plain ones, in
the dtype of the others.

Dimension letters: E experts of the checkpoint, N of the new one.
"""

from __future__ import annotations

import re
from typing import Protocol

import numpy as np
import torch

from cluster.errors import ConfigError
from cluster.wire.arrays import DTYPES as ARRAY_DTYPES
from cluster.wire.tensors import from_array
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.config import checked_shape, read_json, usual_config
from experts.checkpoint.expert_weights import part_of, read_tensor
from experts.checkpoint.shards import DTYPES
from experts.convert.source import Entry, Source, Take
from experts.families.base import Config, ExpertShape, Part
from experts.families.counts import with_counts

_LAYER_IN_NAME = re.compile(r"\.(\d+)\.")


class NewExperts(Protocol):
    """The experts of the new checkpoint."""

    def gate_rows(self, layer_id: int, rows: np.ndarray) -> np.ndarray:
        """Return the rows [N, ...] of a gate's tensor with rows [E, ...], in its dtype."""
        ...

    def matrix(self, layer_id: int, expert_id: int, index: int) -> np.ndarray:
        """Return a part of a new expert, by its index in ``ExpertTensors.parts()``."""
        ...


def check_count(checkpoint: Checkpoint, count: int) -> None:
    """Raise ``ConfigError`` unless a layer can have ``count`` of its experts.

    They are fewer, and enough for a token. With one expert a layer, a token has one too.
    """
    shape = checkpoint.shape
    if count >= shape.num_experts or (count != 1 and count < shape.num_experts_per_tok):
        raise ConfigError(
            f"must be 1, or at least {shape.num_experts_per_tok}, the experts of a token, and "
            f"fewer than the {shape.num_experts} of a layer (given: {count})",
            "--experts",
        )


def gate_groups(checkpoint: Checkpoint, count: int) -> int:
    """Return the groups of the gate among which ``count`` experts are divided evenly."""
    return 1 if count == 1 else checkpoint.family.gate(checkpoint.config).num_groups


def new_config(checkpoint: Checkpoint, num_experts: int) -> Config:
    """Return the ``config.json`` of the checkpoint with another number of experts a layer."""
    top_k = 1 if num_experts == 1 else checkpoint.shape.num_experts_per_tok
    config = read_json(checkpoint.folder / "config.json")
    config.pop("quantization_config", None)
    return with_counts(checkpoint.family, config, num_experts, top_k)


def gate_tensors(checkpoint: Checkpoint, layer_id: int) -> list[str]:
    """Return the names of the tensors of a layer that have a row for each of its experts."""
    family, shape = checkpoint.family, checkpoint.shape
    more = with_counts(family, checkpoint.config, 2 * shape.num_experts, shape.num_experts_per_tok)
    before = family.dense_tensors(checkpoint.config)
    after = family.dense_tensors(family.usual(more))
    return [
        name
        for name, found in before.items()
        if after[name] != found and _layer_of(name) == layer_id
    ]


def rewritten_source(checkpoint: Checkpoint, config: Config, experts: NewExperts) -> Source:
    """Return the source of the new checkpoint; ``config`` is a result of :func:`new_config`.

    Raises ``CheckpointError`` for numbers of experts that the family does not have.
    """
    file = checkpoint.folder / "config.json"
    files = {checkpoint.folder / info.file for info in checkpoint.tensors.values()}
    tensors = _NewTensors(checkpoint, config, experts)
    return Source(
        "huggingface",
        checkpoint.folder,
        file,
        config,
        tensors,
        lambda name: [Take(name)],
        (file, *sorted(files)),
    )


class _NewTensors:
    """See :class:`experts.convert.source.Tensors`."""

    def __init__(self, checkpoint: Checkpoint, config: Config, experts: NewExperts) -> None:
        self._checkpoint = checkpoint
        self._experts = experts
        family, file = checkpoint.family, checkpoint.folder / "config.json"
        usual = usual_config(family, config, file)
        shape = checked_shape(family, usual, file)
        self._old_dense = family.dense_tensors(checkpoint.config)
        self._places = _places(checkpoint, usual, shape)
        dense = {
            name: Entry(shape, self._dtype_of(name))
            for name, shape in family.dense_tensors(usual).items()
        }
        self.entries = dense | {
            name: Entry(places[0][2].shape, self._dtype_of(self._old_part(*places[0]).name))
            for name, places in self._places.items()
        }

    def read(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows of a tensor."""
        places = self._places.get(name)
        whole = self._dense(name) if places is None else self._of_experts(name, places)
        return from_array(whole[begin:end])

    def _dense(self, name: str) -> np.ndarray:
        found = read_tensor(self._checkpoint, name, self._checkpoint.dtype)
        if self._old_dense[name] == self.entries[name].shape:
            return found
        return self._experts.gate_rows(_layer_of(name), found)

    def _of_experts(self, name: str, places: list[_Place]) -> np.ndarray:
        entry = self.entries[name]
        whole = np.empty(entry.shape, ARRAY_DTYPES[entry.dtype])
        for (layer_id, expert_id), index, part in places:
            rows = whole if part.rows is None else whole[slice(*part.rows)]
            found = from_array(self._experts.matrix(layer_id, expert_id, index))
            from_array(part_of(rows, part)).copy_(found)
        return whole

    def _old_part(self, key: tuple[int, int], index: int, part: Part) -> Part:
        family = self._checkpoint.family
        return family.expert_tensors(self._checkpoint.config, key[0], 0).parts()[index]

    def _dtype_of(self, name: str) -> str:
        if name in self._checkpoint.packed:
            return self._checkpoint.dtype
        return DTYPES[self._checkpoint.tensors[name].dtype]


def _layer_of(name: str) -> int:
    match = _LAYER_IN_NAME.search(name)
    return -1 if match is None else int(match[1])


_Place = tuple[tuple[int, int], int, Part]
"""The part of an expert in a tensor: (layer, expert), the index of the part, and its place."""


def _places(checkpoint: Checkpoint, config: Config, shape: ExpertShape) -> dict[str, list[_Place]]:
    """Return the parts of the new experts in each of their tensors."""
    places: dict[str, list[_Place]] = {}
    for layer_id in shape.layers:
        for expert_id in range(shape.num_experts):
            tensors = checkpoint.family.expert_tensors(config, layer_id, expert_id)
            for index, part in enumerate(tensors.parts()):
                places.setdefault(part.name, []).append(((layer_id, expert_id), index, part))
    return places
