"""Combine: the weighted sum of the experts' rows, in an order that nothing else can change.

Dimension letters: T tokens, K experts per token, H hidden size.
"""

from __future__ import annotations

import torch


def combine(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum rows [T, K, H], weighted by [T, K], over K in the given (ascending expert) order.

    Each weighted row is rounded to the rows' dtype and accumulated in it, one expert after the
    other: bit for bit what transformers' eager experts do, whatever the placement, the number of
    actors or a retry. Returns [T, H].
    """
    weighted = (rows * weights.unsqueeze(-1)).to(rows.dtype)  # [T, K, H]
    combined = weighted[:, 0]
    for rank in range(1, rows.shape[1]):
        combined += weighted[:, rank]
    return combined
