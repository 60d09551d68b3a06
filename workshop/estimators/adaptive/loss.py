"""The losses of adaptive mixtures of local experts (Jacobs, Jordan, Nowlan and Hinton 1991).

The competitive error of a row is ``E = -log sum_i p_i exp(-1/2 ||d - o_i||^2)`` (equation 1.3).
Each expert is compared with the whole target d, so that its gradient is ``-h_i (d - o_i)`` with the
posterior probability h_i of the expert. The cooperative error ``||d - sum_i p_i o_i||^2``
(equation 1.1) compares the sum, so that each expert learns to cancel the others' error.

All tensors are float64. Dimension letters: N rows, E experts, W outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal_log_likelihoods(outputs: Tensor, targets: Tensor, deviations: Tensor) -> Tensor:
    """Return the log density [N, E] of each row's target under each expert.

    An expert is a normal distribution of independent axes with the means ``outputs`` [N, E, W] and
    ``deviations`` [E, W]. ``targets`` are [N, W].
    """
    scaled = (targets[:, None] - outputs) / deviations
    constant = deviations.log().sum(dim=1) + 0.5 * outputs.shape[2] * math.log(2 * math.pi)
    return -0.5 * scaled.square().sum(dim=2) - constant


def class_log_likelihoods(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the log probability [N, E] of each row's class under each expert.

    An expert's probabilities are the softmax of its ``outputs`` [N, E, W]; ``targets`` [N] are the
    numbers of classes.
    """
    places = targets[:, None, None].expand(-1, outputs.shape[1], 1)
    return outputs.log_softmax(dim=2).gather(2, places)[:, :, 0]


def competitive_losses(log_gates: Tensor, log_likelihoods: Tensor) -> Tensor:
    """Return ``-log sum_i p_i P_i`` [N], the negative log likelihood of each row.

    ``log_gates`` [N, E] are the logarithms of the gate's weights p, -inf where an expert is not
    chosen; ``log_likelihoods`` [N, E] are those of the experts. With normal experts of deviation 1
    this is equation 1.3 and the constant ``W/2 log 2 pi``.
    """
    return -(log_gates + log_likelihoods).logsumexp(dim=1)


def cooperative_values(log_gates: Tensor, outputs: Tensor) -> Tensor:
    """Return the weighted sums ``sum_i p_i o_i`` [N, W] of ``outputs`` [N, E, W]."""
    return torch.einsum("ne,new->nw", log_gates.exp(), outputs)


def cooperative_losses(log_gates: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return ``||d - sum_i p_i o_i||^2`` [N] of the targets d [N, W] (equation 1.1)."""
    return (targets - cooperative_values(log_gates, outputs)).square().sum(dim=1)
