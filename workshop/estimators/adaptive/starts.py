"""The first weights of an adaptive mixture: each expert begins with a cluster of rows of its own.

The result does not depend on the order of rows, nor on whether a row is there twice or has twice
the weight. Dimension letters: N rows, E experts, F values that the gate sees, H hidden values, W
outputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from workshop.estimators.adaptive.network import AdaptiveNetwork, RowsTensor
from workshop.estimators.parts import Array

RIDGE = 1e-3
"""The penalty of the first regressions, as a share of the weight of their rows."""
MIN_FIRST_DEVIATION = 0.1
CLASS_SCORE = 3.0
"""The score at which a softmax expert's first regression aims for a row's class; 0 for others."""
_LLOYD_STEPS = 10


def place_experts(
    network: AdaptiveNetwork,
    x: RowsTensor,
    targets: Tensor,
    sample_weight: Tensor,
    random: np.random.RandomState,
) -> None:
    """Give each expert a cluster of the rows that the gate sees, and fit it there.

    ``targets`` are [N, W], or the numbers [N] of classes. Clusters are those of k-means, the gate's
    scores are those of normal distributions around the centres, and the experts' last layers are
    ridge regressions on their clusters, after hidden layers that stay as they were drawn.
    """
    with torch.no_grad():
        seen = network.pooled(x)
        weights = sample_weight.numpy()
        centers, nearest = clusters(seen.numpy(), weights, network.architecture.num_experts, random)
        _set_gate(
            network, seen, torch.from_numpy(centers), torch.from_numpy(nearest), sample_weight
        )
        wanted = targets
        if not targets.is_floating_point():
            one_hot = torch.nn.functional.one_hot(targets, network.architecture.width)
            wanted = CLASS_SCORE * one_hot.to(torch.float64)
        _set_experts(network, x, wanted, torch.from_numpy(nearest), sample_weight)


def clusters(
    rows: Array, weights: Array, num_clusters: int, random: np.random.RandomState
) -> tuple[Array, np.ndarray]:
    """Return centres [E, F] and the number [N] of each row's nearest one.

    The first centres are those of k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's
    algorithm takes a few steps. Where there are fewer different rows than clusters, some are empty.
    """
    order = np.lexsort(rows.T[::-1])  # the draw below is then that of any order of the rows
    rows_in_order, weights_in_order = rows[order], weights[order]
    distances = np.ones(len(rows))
    chosen: list[Array] = []
    for _ in range(num_clusters):
        mass = np.cumsum(weights_in_order * distances)
        place = int(np.searchsorted(mass, random.uniform() * mass[-1], side="right"))
        center = rows_in_order[min(place, len(rows) - 1)]
        squared = ((rows_in_order - center) ** 2).sum(axis=1)
        distances = np.minimum(distances, squared) if chosen else squared
        chosen.append(center)
    centers = np.array(chosen)
    for _ in range(_LLOYD_STEPS):
        nearest = _nearest(rows, centers)
        totals = np.bincount(nearest, weights, num_clusters)
        for number in totals.nonzero()[0]:
            member = nearest == number
            centers[number] = weights[member] @ rows[member] / totals[number]
    return centers, _nearest(rows, centers)


def _nearest(rows: Array, centers: Array) -> np.ndarray:
    squared = (centers**2).sum(axis=1) - 2 * rows @ centers.T  # without the rows' own squares
    nearest: np.ndarray = squared.argmin(axis=1)
    return nearest


def _set_gate(
    network: AdaptiveNetwork,
    seen: Tensor,
    centers: Tensor,
    nearest: Tensor,
    sample_weight: Tensor,
) -> None:
    """Set scores ``(x c - |c|^2 / 2) / s``, where s is the mean squared distance to a centre."""
    squared = (seen - centers[nearest]).square().sum(dim=1)
    spread = (sample_weight @ squared / sample_weight.sum()).clamp(min=1e-2)
    weight, bias = centers / spread, -0.5 * centers.square().sum(dim=1) / spread
    if network.architecture.gate_hidden_sizes:
        features = network.gate.features(seen)[0]
        weight, bias = _ridge(features, seen @ weight.T + bias, sample_weight)
    num_experts = len(centers)
    network.gate.weights[-1].data[0, :num_experts] = weight
    network.gate.biases[-1].data[0, :num_experts] = bias


def _set_experts(
    network: AdaptiveNetwork, x: RowsTensor, wanted: Tensor, nearest: Tensor, sample_weight: Tensor
) -> None:
    """Fit each expert's last layer on its cluster; deviations are those of what is left."""
    features = network.features(x)  # [E, N, H]
    head = network.last_layers
    squared = wanted.new_zeros(network.architecture.num_experts)
    mass = torch.zeros_like(squared)
    for number in range(network.architecture.num_experts):
        member = nearest == number
        rows, rows_weight = (
            (member, sample_weight[member]) if member.any() else (..., sample_weight)
        )
        of_expert = features[number][rows]
        weight, bias = _ridge(of_expert, wanted[rows], rows_weight)
        head.weights[-1].data[number], head.biases[-1].data[number] = weight, bias
        left = wanted[rows] - of_expert @ weight.T - bias
        squared[number] = rows_weight @ left.square().mean(dim=1)
        mass[number] = rows_weight.sum()
    deviation = network.architecture.deviation
    if deviation != "none":
        if deviation == "shared":
            squared, mass = squared.sum(0, keepdim=True), mass.sum(0, keepdim=True)
        first = (squared / mass).sqrt().clamp(min=MIN_FIRST_DEVIATION)
        network.log_deviations.data[:, 0] = first.log()


def _ridge(features: Tensor, wanted: Tensor, sample_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight [W, H] and bias [W] of a weighted ridge regression of ``wanted`` [N, W]."""
    shares = sample_weight / sample_weight.sum()
    mean, mean_wanted = shares @ features, shares @ wanted
    centered = features - mean
    scaled = centered * shares[:, None]
    gram = scaled.T @ centered + RIDGE * torch.eye(features.shape[1], dtype=features.dtype)
    weight = torch.linalg.solve(gram, scaled.T @ (wanted - mean_wanted)).T
    return weight, mean_wanted - weight @ mean
