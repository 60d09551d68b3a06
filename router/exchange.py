"""One MoE layer of the router: order the choices, dispatch, combine.

Dimension letters: T tokens, K experts per token, H hidden size.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import torch

from router.combine import combine
from router.dispatch import Dispatcher

TIMINGS_KEPT = 8192


class RemoteExchange:
    """The :class:`router.model.ExpertExchange` whose experts are actors.

    ``deadline_s`` (wall clock) bounds every wait; the engine sets it before each step.
    ``timings_s`` keeps how long the latest layers took, dispatch and combine together.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        """Exchange through ``dispatcher``."""
        self._dispatcher = dispatcher
        self.deadline_s = 0.0
        self.timings_s: deque[float] = deque(maxlen=TIMINGS_KEPT)

    def __call__(
        self,
        layer_id: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Map [T, H] and [T, K] ids and weights to [T, H].

        Raises :class:`ExpertUnavailableError` when the deadline passes first.
        """
        started_s = time.perf_counter()
        ids = topk_ids.cpu().numpy()
        num_tokens, k = ids.shape
        # Ascending expert order, so that the sum below is the same whoever computes the shares.
        pairs = (ids.argsort(axis=1) + np.arange(0, ids.size, k)[:, None]).ravel()
        slots = np.empty_like(pairs)
        slots[pairs] = np.arange(ids.size)
        rows = self._dispatcher.dispatch(layer_id, hidden_states, ids, slots, self.deadline_s)
        weights = topk_weights.reshape(-1).index_select(
            0, torch.from_numpy(pairs).to(topk_weights.device)
        )
        combined = combine(rows.view(num_tokens, k, -1), weights.view(num_tokens, k))
        self.timings_s.append(time.perf_counter() - started_s)
        return combined
