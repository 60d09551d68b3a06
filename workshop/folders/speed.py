"""The speed of a folder's model in this process, by the number of experts of a token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from cluster.processor import processor_name
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.families.counts import with_counts
from workshop.folders.card import Speeds

TOKENS = 128
"""The tokens that are timed, fewer where the model's context is shorter."""


def with_active(checkpoint: Checkpoint, active: int) -> Checkpoint:
    """Return an opened checkpoint with another number of experts of a token."""
    shape = replace(checkpoint.shape, num_experts_per_tok=active)
    config = with_counts(checkpoint.family, checkpoint.config, shape.num_experts, active)
    return replace(checkpoint, config=config, shape=shape)


def speeds_of(
    folder: Path, counts: Iterable[int], on_progress: Callable[[str, int, int], None]
) -> Speeds:
    """Time a served folder's model as it is, and with other numbers of experts of a token."""
    checkpoint = open_checkpoint(folder)
    on_progress("timing", 0, 0)
    return Speeds(
        processor=processor_name(),
        threads=torch.get_num_threads(),
        tokens_per_s=tokens_per_s(checkpoint),
        tokens_per_s_by_active={n: tokens_per_s(with_active(checkpoint, n)) for n in counts},
    )


def tokens_per_s(checkpoint: Checkpoint) -> float:
    """Return the tokens per second of one stream: those of the median token.

    Attention, gates and experts are the served ones; what a network and other processes cost is
    not in it.
    """
    # Brings Ray and its 90 MB, which prune and merge have no use for.
    from workshop.evaluate.local_model import FolderModel

    length = min(1 + TOKENS, checkpoint.max_position_embeddings)
    model = FolderModel(checkpoint, length)
    at_s = [time.perf_counter() for _ in model.greedy((0,), length - 1)]
    return 1 / statistics.median(later - earlier for earlier, later in pairwise(at_s))
