"""The experts of a step's tokens, which requests ask for or force.

Dimension letters: S tokens of the step, T tokens of a layer's piece, L MoE layers, K experts per
token.
"""

from __future__ import annotations

import numpy as np
import torch

from router.messages.routed import LITTLE_ENDIAN
from router.moe.gate import Choice


class StepRouted:
    """The record of one step: the experts of all its tokens, in all MoE layers.

    ``used`` [S, L, K] are the ids that were used, in the order in which the gate gave them. An id
    whose share was left out is the largest number of the dtype.
    """

    def __init__(
        self,
        num_tokens: int,
        num_layers: int,
        top_k: int,
        dtype: str,
        forced: np.ndarray | None = None,
    ) -> None:
        """``dtype`` is that of ids (:mod:`router.messages.routed`).

        ``forced`` int64 [L, S, K] are the ids that requests name, -1 for tokens that choose freely.
        """
        self.forced = None if forced is None else torch.from_numpy(forced)
        """``forced``, on the model's device once its step has begun."""
        self.used = np.empty((num_tokens, num_layers, top_k), LITTLE_ENDIAN[dtype])
        self._left_out = np.iinfo(self.used.dtype).max

    def forced_of(self, layer: int, tokens: slice) -> torch.Tensor | None:
        """Return the forced ids [T, K] of some tokens in a layer, where any token is forced.

        ``layer`` counts only MoE layers, from 0.
        """
        return None if self.forced is None else self.forced[layer, tokens]

    def note(self, layer: int, tokens: slice, choice: Choice) -> None:
        """Record the experts of some tokens in a layer, as they were computed."""
        ids = choice.ids
        if choice.pairs is not None:
            ids = np.where(choice.served(), ids, self._left_out)
        self.used[tokens, layer] = ids

    def packed(self, begin: int, end: int) -> bytes:
        """Return the rows of some of the step's tokens."""
        return self.used[begin:end].tobytes()
