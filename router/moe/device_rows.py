"""A layer's rows from a device, permuted there where that is faster.

On a CPU, and for few rows of a device, the host gathers the rows of each actor (``gather`` in
:mod:`router.moe.permute`). Many rows do not fit the host's caches, and to gather them takes longer
than to bring each token's row K times. So a device orders the rows of a prefill by expert, and
frames are sent from the pinned memory into which the device has copied them.

Dimension letters: T tokens, K experts per token, P = T x K pairs, H hidden size. Pair t * K + r is
token t with the expert that the gate put at rank r.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cluster.staging import Staging
from cluster.wire.frames import Buffers
from cluster.wire.tensors import to_bytes, to_ids

PERMUTED_BYTES = 8 << 20
"""The fewest bytes of P rows that a device permutes. See ``docs/decisions.md``."""


class PermutedRows:
    """The rows of a layer's pairs on the host, in any order; adjacent where frames want them so.

    Each pair has its token's row, so they serve another choice of experts too, in more pieces.
    """

    def __init__(self, rows: torch.Tensor, pairs: np.ndarray, k: int) -> None:
        """``rows`` [P, ...] are those of ``pairs``, int64 [P], which are all pairs of the layer."""
        self._rows = rows
        self._k = k
        self._row_of = np.empty(len(pairs), np.int64)
        self._row_of[pairs] = np.arange(len(pairs))
        self.dtype = rows.dtype
        self.shape = (len(pairs) // k, *rows.shape[1:])
        """[T, ...]."""

    @property
    def like(self) -> torch.Tensor:
        """A tensor of the shape and the dtype of the tokens' rows [T, ...]."""
        return self._rows[: self.shape[0]]

    def of(self, pairs: np.ndarray) -> Buffers:
        """Return the bytes of the pairs' rows, in as few pieces as they lie in; without a copy."""
        rows = self._row_of[pairs]
        cuts = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
        begins, ends = rows[[0, *cuts]].tolist(), rows[[*(cut - 1 for cut in cuts), -1]].tolist()
        memory, row_bytes = to_bytes(self._rows), self._rows[0].nbytes
        return tuple(
            memory[begin * row_bytes : (end + 1) * row_bytes]
            for begin, end in zip(begins, ends, strict=True)
        )

    def are_finite(self) -> np.ndarray:
        """Return whether the row of each token is finite, bool [T]."""
        is_finite: np.ndarray = self._rows.isfinite().flatten(1).all(dim=1).numpy()
        return is_finite[self._row_of[:: self._k]]


LayerRows = torch.Tensor | PermutedRows
"""The rows of a layer's tokens on the host: [T, ...] in their order, or permuted."""


def to_host(
    staging: Staging, ids: torch.Tensor, weights: torch.Tensor, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, LayerRows]:
    """Return a choice, ids and weights [T, K], and hidden states [T, H] on the host, by one copy.

    They last as those of :meth:`Staging.to_host`.
    """
    if hidden_states.nbytes * ids.shape[1] < PERMUTED_BYTES:
        ids, weights, rows = staging.to_host(ids, weights, hidden_states)
        return ids, weights, rows
    ids, weights, *permuted = staging.to_host(ids, weights, *permute(hidden_states, ids))
    rows, pairs = permuted
    return ids, weights, PermutedRows(rows, to_ids(pairs), ids.shape[1])


def permute(hidden_states: torch.Tensor, ids: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the rows of all pairs [P, H] on their device, and the pairs, int64 [P].

    They are ordered by expert, then by rank, then by token, as each frame's are.
    """
    num_tokens, k = ids.shape
    order = ids.t().reshape(-1).argsort(stable=True)  # of pairs by rank, then by token
    tokens, ranks = order % num_tokens, order // num_tokens
    return hidden_states.index_select(0, tokens), tokens * k + ranks
