"""Combine: the weighted sum of the experts' rows, in an order that nothing else can change.

Dimension letters: T tokens, K experts per token, P = T x K pairs, H hidden size.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch

from cluster.tensors import dtype_name, from_raw, to_raw
from router import rows as native_rows

CHUNK_VALUES = 1 << 19
"""So many values are weighted at once on a CPU by torch. Weights in float32 make float32 of all of
them, and two megabytes are in the cache when they are rounded; those of a whole prefill would be
fresh pages in every layer, which costs ten times as much."""
_NATIVE = {(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)}
_NATIVE |= {(torch.float32, torch.float32)}
"""Dtypes of rows and of weights."""


def combine(
    rows: np.ndarray, weights: torch.Tensor, slots: np.ndarray, dtype: torch.dtype
) -> torch.Tensor:
    """Sum each token's rows, weighted by [T, K] as the gate gave them, in the rows' order.

    ``rows`` [P, H] have the bits of ``dtype`` (:func:`cluster.tensors.to_raw`) and stand as
    :func:`router.rows.slots_of` says, which ``slots`` are. Each weighted row is rounded to that
    dtype and accumulated in it, one expert after the other: bit for bit what transformers' eager
    experts do, whatever the placement, the number of actors or a retry. Returns [T, H], where the
    weights are.
    """
    num_tokens, k = weights.shape
    hidden_size = rows.shape[1]
    is_known = (dtype, weights.dtype) in _NATIVE and weights.is_cpu and weights.is_contiguous()
    if native_rows.native is not None and is_known and rows.size:
        sums = np.empty((num_tokens, hidden_size), rows.dtype)
        native_rows.native.combine(rows, to_raw(weights), slots, k, sums, rows.itemsize)
        return from_raw(sums, dtype_name(dtype))
    ranks = np.empty(slots.size, np.int64)
    ranks[slots] = np.arange(slots.size) % k
    order = torch.from_numpy(ranks.reshape(num_tokens, k)).to(weights.device)
    values = from_raw(rows, dtype_name(dtype)).to(weights.device)
    return _in_pieces(values.view(num_tokens, k, hidden_size), weights.gather(1, order))


def _in_pieces(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum rows [T, K, H], weighted by [T, K], over K; returns [T, H]."""
    num_tokens, k, hidden_size = rows.shape
    step = max(1, CHUNK_VALUES // (k * hidden_size))
    if num_tokens <= step or not rows.is_cpu:
        return _weighted_sum(rows, weights)
    pieces = zip(rows.split(step), weights.split(step), strict=True)
    return torch.cat([_weighted_sum(*piece) for piece in pieces])


def _weighted_sum(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    weighted = (rows * weights.unsqueeze(-1)).to(rows.dtype)  # [T, K, H]
    return reduce(torch.add, weighted.unbind(1))
