"""A layer's rows: who gets which, and where they belong when they come back.

Each of these is some small operations on arrays, and in a step of few tokens their number is what
a layer costs: so native code does each at once (:mod:`cluster.native`), or numpy without it.

Dimension letters: T tokens, K experts per token, P = T x K pairs, E experts, H hidden size. Pair
t * K + r is token t with the expert that the gate put at rank r.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from cluster.native import native
from cluster.wire.tensors import to_bytes, to_raw


def slots_of(ids: np.ndarray) -> np.ndarray:
    """Return where each pair's row stands, int64 [P]: a token's rows by ascending expert.

    ``ids`` [T, K] are the gate's choices, int64 and contiguous. In that order their sum is the same
    whoever computes the shares.
    """
    k = ids.shape[1]
    slots = np.empty(ids.size, np.int64)
    if native is not None:
        native.slots(ids, k, slots)
        return slots
    order = ids.argsort(axis=1, kind="stable")
    slots[(order + np.arange(0, ids.size, k)[:, None]).ravel()] = np.arange(ids.size)
    return slots


Share = tuple[tuple[int, ...], tuple[int, ...], int, int]
"""Some experts' ids and numbers of pairs, and where in the order their pairs begin and end."""


def route(
    expert_ids: np.ndarray,
    k: int,
    expert_of: np.ndarray,
    ends: np.ndarray,
    pairs: np.ndarray | None,
) -> tuple[np.ndarray, list[Share]]:
    """Order pairs by their expert's place, then by rank, then by token.

    ``expert_ids`` int64 [P] has the expert of every pair of the layer, ``expert_of`` int64 [E] the
    expert at every place; ``pairs`` ascend, ``None`` is all of them. Shares of the places go up to
    ``ends``, int64. Returns the pairs in order, and for each share those of its experts that have
    pairs.
    """
    if native is not None:
        ordered = np.empty(len(expert_ids if pairs is None else pairs), np.int64)
        shares: list[Share] = native.route(expert_ids, k, expert_of, ends, pairs, ordered)
        return ordered, shares
    pairs = np.arange(len(expert_ids)) if pairs is None else pairs
    place_of = np.empty_like(expert_of)
    place_of[expert_of] = np.arange(len(expert_of))
    places = place_of[expert_ids[pairs]]
    keys = (places * k + pairs % k) * len(expert_ids) + pairs
    counts = np.bincount(places, minlength=len(place_of))
    bounds = [0, *np.cumsum(counts).tolist()]
    shares = []
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        asked = start + np.flatnonzero(counts[start:end])
        ids, numbers = tuple(expert_of[asked].tolist()), tuple(counts[asked].tolist())
        shares.append((ids, numbers, bounds[start], bounds[end]))
    return pairs[keys.argsort()], shares


def gather(rows: torch.Tensor, ordered: np.ndarray, k: int) -> memoryview:
    """Return the bytes of the token's row of each pair, of rows [T, H]."""
    if native is not None:
        row_bytes = rows.shape[1] * rows.itemsize
        return memoryview(native.gather(to_bytes(rows), ordered, k, row_bytes))
    return to_raw(rows).take(ordered // k, axis=0).data.cast("B")
