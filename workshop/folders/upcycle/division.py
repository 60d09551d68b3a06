"""The division of a feed-forward layer's neurons into a shared part and equal experts.

As in CMoE (Pei et al. 2025, arXiv 2502.04416): the neurons with the largest outputs are shared, and
the others are grouped by the tokens that they are active for. Groups are found by k-means with
equal sizes.

Dimension letters: T tokens, I neurons, H hidden size, N experts.
"""

from __future__ import annotations

import numpy as np
import torch

ROUNDS = 8
"""Rounds of k-means; later ones move few neurons."""


def divide(outputs: torch.Tensor, num_shared: int, num_experts: int) -> torch.Tensor:
    """Return the part of each neuron: -1 for the shared one, else an expert; int64 [I].

    ``outputs`` [T, I] are the norms of what the neurons add for some tokens. ``num_shared`` neurons
    are shared, those with the largest mean square. The number of the others is a multiple of
    ``num_experts``.
    """
    order = outputs.square().mean(0).argsort(descending=True, stable=True)
    routed = order[num_shared:]
    parts = torch.full((outputs.shape[1],), -1, dtype=torch.int64)
    parts[routed] = _groups(_profiles(outputs[:, routed]), num_experts)
    return parts


def _profiles(outputs: torch.Tensor) -> torch.Tensor:
    """Return a unit vector of each neuron [T, I], whose products are correlations.

    The roots of outputs keep the largest few from deciding all.
    """
    roots = outputs.sqrt()
    return torch.nn.functional.normalize(roots - roots.mean(0), dim=0)


def _groups(profiles: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return the group of each column of ``profiles`` [T, I]; groups have equal sizes."""
    # The first columns are the most active neurons, as CMoE's first centres are.
    centres = profiles[:, :num_groups].clone()
    for _ in range(ROUNDS):
        groups = _assigned((profiles.T @ centres).numpy(), profiles.shape[1] // num_groups)
        means = torch.stack([profiles[:, groups == n].mean(1) for n in range(num_groups)], dim=1)
        centres = torch.nn.functional.normalize(means, dim=0)
    return groups


def _assigned(likeness: np.ndarray, size: int) -> torch.Tensor:
    """Return groups of ``size`` rows of ``likeness`` [I, N], the likest pairs first."""
    num_rows, num_groups = likeness.shape
    groups = np.full(num_rows, -1)
    room = np.full(num_groups, size)
    for pair in np.argsort(-likeness, axis=None, kind="stable").tolist():
        row, group = divmod(pair, num_groups)
        if groups[row] < 0 and room[group]:
            groups[row] = group
            room[group] -= 1
    return torch.from_numpy(groups)
