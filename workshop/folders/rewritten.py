"""A model made of a checkpoint, as a source of :mod:`workshop.convert`: it has other experts.

Its tensors are made when they are written, one at a time. Quantised tensors become plain ones, in
the dtype of the others.

Dimension letters: E experts of the checkpoint, N of the new one.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch

from cluster.errors import ConfigError
from cluster.wire.arrays import DTYPES as ARRAY_DTYPES
from cluster.wire.tensors import from_array
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.config import checked_shape, family_of, read_json, usual_config
from experts.checkpoint.expert_weights import part_of, read_part, read_tensor
from experts.checkpoint.shards import DTYPES
from experts.families.base import Config, Part
from experts.families.counts import with_counts
from workshop.convert.source import Entry, MadeTensors, Source

_LAYER_IN_NAME = re.compile(r"\.(\d+)\.")


class NewTensors(ABC):
    """The tensors of a new model, each made of a checkpoint's when it is written."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @abstractmethod
    def gate_rows(self, layer_id: int, rows: np.ndarray) -> np.ndarray:
        """Return the rows [N, ...] of a gate's tensor with rows [E, ...]."""

    @abstractmethod
    def matrix(self, layer_id: int, expert_id: int, index: int) -> np.ndarray:
        """Return a part of a new expert, by its index in ``ExpertTensors.parts()``."""

    def dense(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return a tensor of ``shape`` that is not an expert's: a gate's, or as it is stored."""
        found = read_tensor(self.checkpoint, name, self.checkpoint.dtype)
        return found if found.shape == shape else self.gate_rows(_layer_of(name), found)

    def part(self, layer_id: int, expert_id: int, index: int, dtype: str) -> np.ndarray:
        """Return a part of an expert of the checkpoint; ``dtype`` is that of quantised ones."""
        config = self.checkpoint.config
        tensors = self.checkpoint.family.expert_tensors(config, layer_id, expert_id)
        return read_part(self.checkpoint, tensors.parts()[index], dtype)


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


def rewritten_source(checkpoint: Checkpoint, config: Config, new: NewTensors) -> Source:
    """Return the source of a new model, which has the family of ``checkpoint``.

    Raises ``CheckpointError`` for numbers of experts that the family does not have.
    """
    file, *_ = files = files_of(checkpoint)
    return source_of(config, file, files, lambda name: stored_dtype(checkpoint, name), new)


def files_of(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Return the configuration and the files with weights of a checkpoint."""
    files = {checkpoint.folder / info.file for info in checkpoint.tensors.values()}
    return (checkpoint.folder / "config.json", *sorted(files))


def stored_dtype(checkpoint: Checkpoint, name: str) -> str:
    """Return the dtype of a tensor; one that is quantised or new has the others' dtype."""
    if name in checkpoint.packed or name not in checkpoint.tensors:
        return checkpoint.dtype
    return DTYPES[checkpoint.tensors[name].dtype]


def source_of(
    config: Config,
    file: Path,
    files: tuple[Path, ...],
    dtype_of: Callable[[str], str],
    new: NewTensors | None,
) -> Source:
    """Return the source of a model of ``config``; without ``new`` it has only its tensors' sizes.

    ``file`` and ``files`` are the configuration and all files that it is made of.
    """
    family = family_of(config, file)
    usual = usual_config(family, config, file)
    places: dict[str, list[_Place]] = {}
    shape = checked_shape(family, usual, file)
    for layer_id, expert_id in product(shape.layers, range(shape.num_experts)):
        parts = family.expert_tensors(usual, layer_id, expert_id).parts()
        for index, part in enumerate(parts):
            places.setdefault(part.name, []).append(((layer_id, expert_id, index), part))
    shapes = family.dense_tensors(usual) | {name: of[0][1].shape for name, of in places.items()}
    entries = {name: Entry(found, dtype_of(name)) for name, found in shapes.items()}

    def make(name: str) -> torch.Tensor:
        assert new is not None, "a source of sizes only"
        if name not in places:
            return from_array(new.dense(name, shapes[name]))
        whole = np.empty(shapes[name], ARRAY_DTYPES[entries[name].dtype])
        for place, part in places[name]:
            rows = whole if part.rows is None else whole[slice(*part.rows)]
            from_array(part_of(rows, part)).copy_(from_array(new.matrix(*place)))
        return from_array(whole)

    return Source("made", file.parent, file, config, MadeTensors(entries, make), files)


_Place = tuple[tuple[int, int, int], Part]
"""The layer, the expert and the index of a part, and its place in a tensor."""


def _layer_of(name: str) -> int:
    match = _LAYER_IN_NAME.search(name)
    return -1 if match is None else int(match[1])
