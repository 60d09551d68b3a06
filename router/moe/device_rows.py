"""A layer's rows and the gate's choice from a device.

On a CPU, and for few rows of a device, the host gathers the rows of each actor (``gather`` in
:mod:`router.moe.permute`). Many rows do not fit the host's caches, and to gather them takes longer
than to bring each token's row K times. So a device orders the rows of a prefill by expert, and
frames are sent from the pinned memory into which the device has copied them.

Where experts are missing or full, the host chooses others by the gate's logits, which come in the
same copy; the device is not asked again.

Dimension letters: T tokens, K experts per token, P = T x K pairs, H hidden size, E experts. Pair
t * K + r is token t with the expert that the gate put at rank r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from cluster.staging import ALIGNMENT, Staging
from cluster.wire.frames import Buffers
from cluster.wire.tensors import to_bytes, to_ids
from router.moe.gate import Choice

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


def copy_bytes(num_tokens: int, row_bytes: int, num_experts: int, top_k: int) -> int:
    """Return the most bytes of a layer's copy for T tokens of rows of H values.

    These are the rows, permuted where there are many, ids, weights, the pairs of permuted rows, and
    the logits of a choice that may be changed.
    """
    rows_bytes = num_tokens * row_bytes
    if rows_bytes * top_k >= PERMUTED_BYTES:
        rows_bytes *= top_k
    return rows_bytes + num_tokens * (3 * top_k * 8 + num_experts * 4) + 5 * ALIGNMENT


class LogitsGate(Protocol):
    """A gate that can choose by logits; see :class:`router.moe.gate.Gate`."""

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits [T, E] of hidden states [T, H]."""
        ...

    def choose_by(
        self, logits: torch.Tensor, dtype: torch.dtype, allowed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and weights [T, K] for logits; ``dtype`` is that of the hidden states."""
        ...


class HostChoices:
    """Chooses anew on the host for tokens of a device; see :data:`router.moe.gate.ChooseAmong`."""

    def __init__(
        self,
        gate: LogitsGate,
        dtype: torch.dtype,
        logits: torch.Tensor,
        on_host: torch.Tensor | None,
    ) -> None:
        """``logits`` [T, E] are on the device; ``on_host`` are the same where they were copied.

        ``dtype`` is that of the hidden states.
        """
        self._gate = gate
        self._dtype = dtype
        self._logits = logits
        self._on_host = on_host

    def __call__(self, rows: np.ndarray, allowed: np.ndarray) -> Choice:
        """Choose for ``rows`` among the ``allowed`` experts."""
        if self._on_host is None:  # an expert was lost after its rows had been copied
            self._on_host = self._logits.cpu()
        some = self._on_host.index_select(0, torch.from_numpy(rows))
        ids, weights = self._gate.choose_by(some, self._dtype, torch.from_numpy(allowed))
        return Choice(to_ids(ids), weights)


def chosen_rows(
    staging: Staging, gate: LogitsGate, hidden_states: torch.Tensor, may_change: bool
) -> tuple[Choice, LayerRows, HostChoices]:
    """Return the gate's choice for hidden states [T, H] of a device, and the rows, by one copy.

    With ``may_change`` the logits come too: the choice may be changed. They all last as tensors of
    :meth:`Staging.to_host`.
    """
    logits = gate.logits(hidden_states)
    ids, weights = gate.choose_by(logits, hidden_states.dtype)
    top_k = ids.shape[1]
    is_permuted = hidden_states.nbytes * top_k >= PERMUTED_BYTES
    copied = [ids, weights, *(permute(hidden_states, ids) if is_permuted else [hidden_states])]
    ids, weights, rows, *others = staging.to_host(*copied, *([logits] if may_change else []))
    found: LayerRows = rows
    if is_permuted:
        pairs, *others = others
        found = PermutedRows(rows, to_ids(pairs), top_k)
    reselect = HostChoices(gate, hidden_states.dtype, logits, others[0] if may_change else None)
    return Choice(to_ids(ids), weights), found, reselect


def permute(hidden_states: torch.Tensor, ids: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the rows of all pairs [P, H] on their device, and the pairs, int64 [P].

    They are ordered by expert, then by rank, then by token, as each frame's are.
    """
    num_tokens, k = ids.shape
    order = ids.t().reshape(-1).argsort(stable=True)  # of pairs by rank, then by token
    tokens, ranks = order % num_tokens, order // num_tokens
    return hidden_states.index_select(0, tokens), tokens * k + ranks
