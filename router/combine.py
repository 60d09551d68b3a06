"""Combine: the weighted sum of the experts' rows, in an order that nothing else can change.

Dimension letters: T tokens, K experts per token, H hidden size.
"""

from __future__ import annotations

from functools import reduce

import torch

CHUNK_VALUES = 1 << 19
"""So many values are weighted at once on a CPU. Weights in float32 make float32 of all of them, and
two megabytes are in the cache when they are rounded; those of a whole prefill would be fresh pages
in every layer, which costs ten times as much."""


def combine(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum rows [T, K, H], weighted by [T, K], over K in the given (ascending expert) order.

    Each weighted row is rounded to the rows' dtype and accumulated in it, one expert after the
    other: bit for bit what transformers' eager experts do, whatever the placement, the number of
    actors or a retry. Returns [T, H].
    """
    num_tokens, k, hidden_size = rows.shape
    step = max(1, CHUNK_VALUES // (k * hidden_size))
    if num_tokens <= step or not rows.is_cpu:
        return _weighted_sum(rows, weights)
    pieces = zip(rows.split(step), weights.split(step), strict=True)
    return torch.cat([_weighted_sum(*piece) for piece in pieces])


def _weighted_sum(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    weighted = (rows * weights.unsqueeze(-1)).to(rows.dtype)  # [T, K, H]
    return reduce(torch.add, weighted.unbind(1))
