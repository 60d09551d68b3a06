"""How much each expert of a layer matters on a calibration text.

Dimension letters: T tokens, K experts of a token, R rows of an expert, E experts, G groups.
"""

from __future__ import annotations

import numpy as np
import torch

from cluster.errors import ConfigError
from workshop.folders.layerwise import LayerExperts
from workshop.folders.options import Importance


class UseObserver:
    """Counts how an expert is used: tokens, their weights, and the norms of weighted outputs."""

    def __init__(self, num_experts: int) -> None:
        self._hits = np.zeros(num_experts, np.int64)
        self._weights = np.zeros(num_experts)
        self._norms = np.zeros(num_experts)
        self._num_tokens = 0

    def chosen(self, normed: torch.Tensor, ids: np.ndarray, weights: torch.Tensor) -> None:
        """See :class:`workshop.folders.layerwise.Observer`."""
        self._num_tokens += len(ids)

    def computed(self, expert_id: int, weights: torch.Tensor, outputs: torch.Tensor) -> None:
        """See :class:`workshop.folders.layerwise.Observer`."""
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
