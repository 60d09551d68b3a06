"""Combine: the weighted sum of each token's expert rows, in a fixed order.

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
from router.moe.gate import Choice
from router.moe.permute import summands_of

CHUNK_VALUES = 1 << 19
"""The most values that torch weights at once on a CPU. Weights in float32 widen all values to
float32. Two megabytes of them stay in the processor's cache until they are rounded. Those of a
whole prefill would be fresh pages in every layer, which costs ten times as much."""
NATIVE = {(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)}
NATIVE |= {(torch.float32, torch.float32)}
"""The dtypes of rows and of weights that the native code sums."""


class WeightedSums:
    """The combination of a language model's layer: each token's weighted sum."""

    def prepare(self, choice: Choice, rows: torch.Tensor) -> Plan:
        """Prepare :meth:`combine` while the experts compute."""
        return prepare(choice.weights, summands_of(choice.ids), rows)

    def combine(self, received: list[ExpertRows], plan: Plan) -> tuple[torch.Tensor, bool]:
        """Return the sums [T, H] and whether they are finite; see :func:`combine`."""
        return combine(received, plan)

    def finite_rows(self, result: torch.Tensor) -> np.ndarray:
        """Return whether each sum is finite, bool [T]."""
        is_finite: np.ndarray = result.isfinite().all(dim=1).numpy()
        return is_finite


class ExpertRows(NamedTuple):
    """The unweighted output of an actor's experts: one row for each pair, in the pairs' order."""

    pairs: np.ndarray
    """int64, contiguous."""
    rows: Buffer


class Plan(NamedTuple):
    """The operands of a layer's sums, except the experts' rows; made by :func:`prepare`."""

    weights: torch.Tensor
    summand_of: np.ndarray
    """For each pair, the place of its row in the sums."""
    like: torch.Tensor
    sums: torch.Tensor | None = None
    """Memory for the sums where native code sums; the two buffers below are set then as well."""
    weights_bytes: Buffer = b""
    sums_bytes: Buffer = b""


def prepare(weights: torch.Tensor, summand_of: np.ndarray, like: torch.Tensor) -> Plan:
    """Prepare :func:`combine` while the experts compute.

    ``weights`` [T, K] are the gate's. ``summand_of`` [P] is the order of the sums
    (:func:`router.moe.permute.summands_of`). Rows have the width and the dtype of ``like`` [T, H].
    """
    is_known = (like.dtype, weights.dtype) in NATIVE
    if native is None or not is_known or not like.numel():
        return Plan(weights, summand_of, like)
    sums = torch.empty_like(like, memory_format=torch.contiguous_format)
    return Plan(weights, summand_of, like, sums, to_bytes(weights), to_bytes(sums))


def combine(received: list[ExpertRows], plan: Plan) -> tuple[torch.Tensor, bool]:
    """Sum each token's weighted rows by ascending expert; a row not received counts as 0.

    Each weighted row is rounded to the rows' dtype and accumulated in it, one expert after the
    other, as transformers' eager experts do. Sums of equal rows are equal, whatever the placement,
    the number of actors or a retry. Returns [T, H], and whether all of it is finite. The sums last
    until the plan is used again.
    """
    weights, summand_of, like, sums, weights_bytes, sums_bytes = plan
    if sums is None:
        return _combine_in_torch(received, plan)
    assert native is not None
    k = weights.shape[1]
    is_finite = native.combine(received, weights_bytes, summand_of, k, sums_bytes, like.itemsize)
    return sums, is_finite


def _combine_in_torch(received: list[ExpertRows], plan: Plan) -> tuple[torch.Tensor, bool]:
    """Do what :func:`combine` does, for dtypes that native code does not support."""
    weights, summand_of, like = plan[:3]
    num_tokens, k = weights.shape
    # Weights and rows, each in the order of the summands.
    ranks = np.empty(summand_of.size, np.int64)
    ranks[summand_of] = np.arange(summand_of.size) % k
    order = torch.from_numpy(ranks.reshape(num_tokens, k))
    rows = torch.zeros(summand_of.size, like.shape[1], dtype=like.dtype)
    for piece in received:
        raw = to_raw(rows)
        outputs = np.frombuffer(piece.rows, raw.dtype).reshape(-1, like.shape[1])
        raw[summand_of[piece.pairs]] = outputs
    values = rows.view(num_tokens, k, like.shape[1])
    sums = _in_pieces(values, weights.gather(1, order))
    return sums, bool(sums.isfinite().all())


def _in_pieces(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum rows [T, K, H], weighted by [T, K], over K; returns [T, H]."""
    num_tokens, k, hidden_size = rows.shape
    step = max(1, CHUNK_VALUES // (k * hidden_size))
    if num_tokens <= step:
        return _weighted_sum(rows, weights)
    pieces = zip(rows.split(step), weights.split(step), strict=True)
    return torch.cat([_weighted_sum(*piece) for piece in pieces])


def _weighted_sum(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    weighted = (rows * weights.unsqueeze(-1)).to(rows.dtype)  # [T, K, H]
    return reduce(torch.add, weighted.unbind(1))
