"""Experts of the host by torch's tensors, in which tests compute what is right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from cluster.wire.tensors import from_array, to_array
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.expert_weights import GatedFfnWeights, HostWeights, load_expert


def on_host(weights: GatedFfnWeights[torch.Tensor]) -> HostWeights:
    """Return weights as an actor on a CPU has them."""
    return weights.map(to_array)


def loaded(
    checkpoint: Checkpoint, layer_id: int, expert_id: int, dtype: str
) -> GatedFfnWeights[torch.Tensor]:
    """Load an expert's weights as an actor does; returns tensors."""
    return load_expert(checkpoint, layer_id, expert_id, dtype).map(from_array)


def results(expert: Callable[[np.ndarray], np.ndarray], rows: torch.Tensor) -> torch.Tensor:
    """Return an expert's results for rows, as tensors."""
    return from_array(expert(to_array(rows)))
