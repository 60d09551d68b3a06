"""Pruning: fewer experts in each layer, the most important ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.errors import CheckpointError, ConfigError
from experts.checkpoint.checkpoint import Checkpoint
from router.observability.progress import OnProgress
from workshop.convert.plan import STORED, Plan, make_plan
from workshop.folders.making import Command, NewModel, seen_on
from workshop.folders.options import PruneOptions
from workshop.folders.prune.importance import (
    UseObserver,
    importance,
    most_important,
    random_importance,
)
from workshop.folders.rewritten import (
    NewTensors,
    check_count,
    gate_groups,
    new_config,
    rewritten_source,
)
from workshop.folders.text import Text

Kept = Mapping[int, Sequence[int]]
"""The ids of the kept experts of each layer, ascending."""


class KeptExperts(NewTensors):
    """The kept experts of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, kept: Kept) -> None:
        super().__init__(checkpoint)
        self._kept = kept

    def gate_rows(self, layer_id: int, rows: np.ndarray) -> np.ndarray:
        """Return the rows of the kept experts."""
        kept: np.ndarray = rows[list(self._kept[layer_id])]
        return kept

    def matrix(self, layer_id: int, expert_id: int, index: int) -> np.ndarray:
        """Return a part of a kept expert, as it is stored."""
        return self.part(layer_id, self._kept[layer_id][expert_id], index, self.checkpoint.dtype)


@dataclass(frozen=True)
class Prune(Command):
    """The command that writes a checkpoint with fewer of its experts."""

    name = "prune"
    model: Checkpoint
    options: PruneOptions

    def plan(self, has_text: bool) -> Plan:
        """See :class:`Command`: for a number of experts that cannot be, and a missing text."""
        count, shape = self.options.experts, self.model.shape
        check_count(self.model, count)
        if self.options.by != "random" and not has_text:
            raise ConfigError(f"--by {self.options.by} needs a calibration text", "--text")
        any_ids = self._best(np.zeros(shape.num_experts))
        try:
            return self._plan_of(dict.fromkeys(shape.layers, any_ids))
        except CheckpointError as error:  # of DeepSeek's groups
            raise ConfigError(f"cannot be {count}: {error.message}", "--experts") from None

    def decide(self, text: Text | None, work: Path, on_progress: OnProgress) -> NewModel:
        """See :class:`Command`."""
        by, shape = self.options.by, self.model.shape
        if by == "random" or text is None:
            scores = {
                layer_id: random_importance(self.options.seed, layer_id, shape.num_experts)
                for layer_id in shape.layers
            }
        else:
            seen = seen_on(
                self.model,
                text.calibration,
                work,
                lambda _: UseObserver(shape.num_experts),
                on_progress,
            )
            scores = {layer_id: importance(by, found) for layer_id, found in seen.items()}
        kept = {layer_id: self._best(found) for layer_id, found in scores.items()}
        line = f"Each layer has the {self.options.experts} most important of its experts."
        facts = {"kept_experts": {str(layer_id): ids for layer_id, ids in kept.items()}}
        return NewModel(self.model, self._plan_of(kept), line, facts)

    def _best(self, scores: np.ndarray) -> list[int]:
        count = self.options.experts
        return most_important(scores, count, gate_groups(self.model, count))

    def _plan_of(self, kept: Kept) -> Plan:
        config, new = new_config(self.model, self.options.experts), KeptExperts(self.model, kept)
        source = rewritten_source(self.model, config, new)
        return make_plan(source, STORED, self.options.max_shard_size)
