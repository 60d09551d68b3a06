"""Pruning: fewer experts in each layer, the ones that matter most on a calibration text.

Dimension letters: T tokens, K experts of a token, R rows of an expert, E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cluster.errors import CheckpointError, ConfigError
from experts.checkpoint.checkpoint import Checkpoint
from router.observability.progress import OnProgress
from workshop.convert.plan import STORED, Plan, make_plan
from workshop.folders.layerwise import LayerExperts, Observer
from workshop.folders.making import Command, NewModel, Text, seen_on
from workshop.folders.options import Importance, PruneOptions
from workshop.folders.rewritten import (
    NewTensors,
    check_count,
    gate_groups,
    new_config,
    rewritten_source,
)

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


class UseObserver(Observer):
    """Counts how an expert is used: tokens, their weights, and the norms of weighted outputs."""

    def __init__(self, num_experts: int) -> None:
        self._hits = np.zeros(num_experts, np.int64)
        self._weights = np.zeros(num_experts)
        self._norms = np.zeros(num_experts)
        self._num_tokens = 0

    def chosen(self, normed: torch.Tensor, ids: np.ndarray, weights: torch.Tensor) -> None:
        """Count the tokens."""
        self._num_tokens += len(ids)

    def computed(self, expert_id: int, weights: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add up an expert's use."""
        self._hits[expert_id] += len(outputs)
        self._weights[expert_id] += weights.double().sum().item()
        norms = torch.linalg.vector_norm(outputs, dim=1)
        self._norms[expert_id] += (weights * norms).double().sum().item()

    def result(self, experts: LayerExperts) -> dict[str, np.ndarray]:
        """Return ``hits``, ``weights`` and ``norms`` [E], and ``tokens``."""
        return {
            "hits": self._hits,
            "weights": self._weights,
            "norms": self._norms,
            "tokens": np.array(self._num_tokens),
        }


def importance(by: Importance, seen: dict[str, np.ndarray]) -> np.ndarray:
    """Return the importance [E] of a layer's experts, from what :class:`UseObserver` saw.

    ``weight`` is the mean weight of the gate times the hit rate (Chen et al. 2022, arXiv
    2206.00277). ``output`` is the mean norm of the weighted output over the tokens that chose the
    expert (REAP, Lasby et al. 2025, arXiv 2510.13999). An expert that no token chose has 0.
    """
    sums, divisor = seen["norms"], np.maximum(seen["hits"], 1)
    if by == "weight":
        sums, divisor = seen["weights"], np.maximum(seen["tokens"], 1)
    scores: np.ndarray = sums / divisor
    return scores


def random_importance(seed: int, layer_id: int, num_experts: int) -> np.ndarray:
    """Return random numbers [E], the control: a function of seed and layer."""
    return np.random.default_rng([seed, layer_id]).random(num_experts)


def most_important(scores: np.ndarray, count: int, num_groups: int) -> list[int]:
    """Return the ids of the ``count`` experts with the largest scores, ascending.

    With groups, equally many are of each group of E / G experts. The lower id wins a tie. Raises
    ``ConfigError`` where ``count`` is no multiple of the groups.
    """
    if count % num_groups:
        raise ConfigError(
            f"must be a multiple of the gate's {num_groups} groups of experts (given: {count})",
            "--experts",
        )
    grouped = scores.reshape(num_groups, -1)
    best = np.argsort(-grouped, axis=1, kind="stable")[:, : count // num_groups]
    first_ids = np.arange(num_groups)[:, None] * grouped.shape[1]
    ids: list[int] = np.sort((best + first_ids).reshape(-1)).tolist()
    return ids
