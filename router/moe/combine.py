"""Combine: the weighted sum of the experts' rows, in an order that nothing else can change.

Dimension letters: T tokens, K experts per token, P = T x K pairs, H hidden size.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import numpy as np
import torch

from cluster.native import native
from cluster.wire.frames import Buffer
from cluster.wire.tensors import to_bytes, to_raw

CHUNK_VALUES = 1 << 19
"""So many values are weighted at once on a CPU by torch. Weights in float32 make float32 of all of
them, and two megabytes are in the cache when they are rounded; those of a whole prefill would be
fresh pages in every layer, which costs ten times as much."""
_NATIVE = {(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)}
_NATIVE |= {(torch.float32, torch.float32)}
"""Dtypes of rows and of weights."""


class Received(NamedTuple):
    """What an actor's experts made of some pairs: a row for each, one after the other."""

    pairs: np.ndarray
    """int64, contiguous."""
    rows: Buffer


class Plan(NamedTuple):
    """All that a layer's sums take but the experts' rows; :func:`prepare` makes one."""

    weights: torch.Tensor
    slots: np.ndarray
    like: torch.Tensor
    sums: torch.Tensor | None = None
    """Room for them, where native code sums; then there are these two."""
    weights_bytes: Buffer = b""
    sums_bytes: Buffer = b""


def prepare(weights: torch.Tensor, slots: np.ndarray, like: torch.Tensor) -> Plan:
    """Make ready for :func:`combine` what can be while the experts compute.

    ``weights`` [T, K] are as the gate gave them. A pair's row has its place among its token's by
    ``slots`` (:func:`router.moe.permute.slots_of`). Rows have the width and the dtype of ``like``
    [T, H].
    """
    is_known = (like.dtype, weights.dtype) in _NATIVE and weights.is_cpu and like.is_cpu
    if native is None or not is_known or not like.numel():
        return Plan(weights, slots, like)
    sums = torch.empty_like(like, memory_format=torch.contiguous_format)
    return Plan(weights, slots, like, sums, to_bytes(weights), to_bytes(sums))


def combine(received: list[Received], plan: Plan) -> torch.Tensor:
    """Sum each token's rows, weighted, in the order of their slots.

    One that was not received is zeros. Each weighted row is rounded to the rows' dtype and
    accumulated in it, one expert after the other: bit for bit what transformers' eager experts do,
    whatever the placement, the number of actors or a retry. Returns [T, H], where the weights are;
    the plan is used up.
    """
    weights, slots, like, sums, weights_bytes, sums_bytes = plan
    num_tokens, k = weights.shape
    if sums is not None:
        assert native is not None
        native.combine(received, weights_bytes, slots, k, sums_bytes, like.itemsize)
        return sums
    ranks = np.empty(slots.size, np.int64)
    ranks[slots] = np.arange(slots.size) % k
    order = torch.from_numpy(ranks.reshape(num_tokens, k)).to(weights.device)
    rows = torch.zeros(slots.size, like.shape[1], dtype=like.dtype)
    for piece in received:
        raw = to_raw(rows)
        raw[slots[piece.pairs]] = np.frombuffer(piece.rows, raw.dtype).reshape(-1, like.shape[1])
    values = rows.to(weights.device).view(num_tokens, k, like.shape[1])
    return _in_pieces(values, weights.gather(1, order))


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
