"""Pruning: fewer experts in each layer, the most important ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cluster.errors import CheckpointError, ConfigError
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.expert_weights import read_part
from experts.convert.plan import STORED, Plan, make_plan
from experts.convert.source import Source
from experts.convert.staging import check_dest
from router.workshop.folders.card import Record
from router.workshop.folders.importance import (
    By,
    UseObserver,
    importance,
    most_important,
    random_importance,
)
from router.workshop.folders.making import (
    NewModel,
    OnProgress,
    Recipe,
    make_folder,
    origin_of,
    score_served,
    seen_on,
)
from router.workshop.folders.rewritten import check_count, gate_groups, new_config, rewritten_source
from router.workshop.folders.text import Text, read_text

Kept = Mapping[int, Sequence[int]]
"""The ids of the kept experts of each layer, ascending."""


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """What decides a pruned model; ``seed`` counts for ``random`` alone."""

    experts: int
    by: By = "output"
    seed: int = 0
    sequences: int = 64
    sequence_length: int = 256
    max_shard_size: int = 5_000_000_000


class KeptExperts:
    """The kept experts of a checkpoint; see :class:`rewritten.NewExperts`."""

    def __init__(self, checkpoint: Checkpoint, kept: Kept) -> None:
        self._checkpoint = checkpoint
        self._kept = kept

    def gate_rows(self, layer_id: int, rows: np.ndarray) -> np.ndarray:
        """Return the rows of the kept experts."""
        kept: np.ndarray = rows[list(self._kept[layer_id])]
        return kept

    def matrix(self, layer_id: int, expert_id: int, index: int) -> np.ndarray:
        """Return a part of a kept expert, as it is stored."""
        checkpoint = self._checkpoint
        tensors = checkpoint.family.expert_tensors(
            checkpoint.config, layer_id, self._kept[layer_id][expert_id]
        )
        return read_part(checkpoint, tensors.parts()[index], checkpoint.dtype)


def pruned_source(checkpoint: Checkpoint, kept: Kept) -> Source:
    """Return the source of a checkpoint with the kept experts alone; as many in each layer.

    Raises ``CheckpointError`` for a number of experts that the family does not have.
    """
    [count] = {len(ids) for ids in kept.values()}
    return rewritten_source(
        checkpoint, new_config(checkpoint, count), KeptExperts(checkpoint, kept)
    )


def prepare_prune(
    checkpoint: Checkpoint, dest: Path, options: PruneOptions, texts: Sequence[Path]
) -> tuple[Plan, Text | None]:
    """Check everything before the first step; returns a plan and the text.

    The plan has the sizes of every pruning with these options. Raises ``ConfigError`` for a wrong
    ``dest``, for a number of experts that cannot be, and for a missing text, and as
    :func:`router.workshop.folders.text.read_text` does.
    """
    check_dest(dest)
    shape = checkpoint.shape
    check_count(checkpoint, options.experts)
    if options.by != "random" and not texts:
        raise ConfigError(f"--by {options.by} needs a calibration text", "--text")
    num_groups = gate_groups(checkpoint, options.experts)
    any_ids = most_important(np.zeros(shape.num_experts), options.experts, num_groups)
    try:
        source = pruned_source(checkpoint, dict.fromkeys(shape.layers, any_ids))
    except CheckpointError as error:  # of DeepSeek's groups
        raise ConfigError(f"cannot be {options.experts}: {error.message}", "--experts") from None
    plan = make_plan(source, STORED, options.max_shard_size)
    rows = options.sequences, options.sequence_length
    return plan, read_text(checkpoint, texts, *rows) if texts else None


def prune(
    checkpoint: Checkpoint,
    dest: Path,
    options: PruneOptions,
    texts: Sequence[Path],
    on_progress: OnProgress = lambda phase, done, total: None,
) -> Record:
    """Write the checkpoint with fewer experts to the folder ``dest``; returns its record.

    Raises as :func:`prepare_prune` and :func:`router.workshop.folders.making.make_folder` do.
    """
    plan, text = prepare_prune(checkpoint, dest, options, texts)

    def decide(work: Path) -> NewModel:
        kept = _kept(checkpoint, options, text, work, on_progress)
        made = make_plan(pruned_source(checkpoint, kept), STORED, options.max_shard_size)
        line = f"Each layer has the {options.experts} most important of its experts."
        facts = {"kept_experts": {str(layer_id): list(ids) for layer_id, ids in kept.items()}}
        return NewModel(checkpoint, made, score_served, open_checkpoint, (line,), facts)

    origin, recipe = origin_of(checkpoint), Recipe("prune", asdict(options))
    return make_folder(origin, plan.source, dest, recipe, text, decide, on_progress)


def _kept(
    checkpoint: Checkpoint,
    options: PruneOptions,
    text: Text | None,
    work: Path,
    on_progress: OnProgress,
) -> Kept:
    shape = checkpoint.shape
    num_groups = gate_groups(checkpoint, options.experts)
    if options.by == "random" or text is None:
        scores = {
            layer_id: random_importance(options.seed, layer_id, shape.num_experts)
            for layer_id in shape.layers
        }
    else:
        seen = seen_on(
            checkpoint,
            text.calibration,
            work,
            lambda _: UseObserver(shape.num_experts),
            on_progress,
        )
        scores = {layer_id: importance(options.by, found) for layer_id, found in seen.items()}
    return {
        layer_id: most_important(found, options.experts, num_groups)
        for layer_id, found in scores.items()
    }
