"""One MoE layer of the router: order the choices, dispatch, combine.

Dimension letters: T tokens, K experts per token, H hidden size.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any, Protocol

import numpy as np
import torch
from opentelemetry.trace import Span
from torch import nn

from cluster.errors import ExpertUnavailableError
from cluster.wire.tensors import to_ids
from router.moe.capacity import CapacityLimit
from router.moe.combine import Plan, combine, prepare
from router.moe.dispatch import Dispatcher
from router.moe.gate import ChooseAmong
from router.moe.missing import Choice, StepLoss
from router.moe.permute import slots_of
from router.observability.catalogue import LAYER_BUCKETS_S
from router.observability.histogram import Distribution
from router.observability.tracing import StepTrace, traceparent

TIMINGS_KEPT = 8192


class RemoteExchange:
    """The :class:`router.model.model.ExpertExchange` whose experts are actors.

    ``deadline_s`` (wall clock) bounds every wait, ``loss`` says what to do without an expert and
    ``trace`` where to tell of layers; the engine sets them before each step. ``inexact_rows``
    counts, by contract, the rows that were computed without an expert that they chose; ``lost``
    tells which experts have no live copy, ``overflow`` by (layer, expert) how many tokens they had
    no room for.
    ``timings_s`` keeps how long the latest layers took, dispatch and combine together;
    ``layer_time_s`` counts all of them.
    """

    def __init__(self, dispatcher: Dispatcher, limit: CapacityLimit | None = None) -> None:
        """Exchange through ``dispatcher``; ``limit`` bounds what an expert takes of a step."""
        self._dispatcher = dispatcher
        self._limit = limit
        self.deadline_s = 0.0
        self.loss: StepLoss | None = None
        self.trace: StepTrace | None = None
        self.lost = dispatcher.lost
        self.overflow: Counter[tuple[int, int]] = Counter() if limit is None else limit.overflow
        self.inexact_rows: Counter[str] = Counter()
        self.timings_s: deque[float] = deque(maxlen=TIMINGS_KEPT)
        self.layer_time_s = Distribution(LAYER_BUCKETS_S)

    def __call__(
        self,
        layer_id: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        choose_among: ChooseAmong | None = None,
    ) -> torch.Tensor:
        """Map [T, H] and [T, K] ids and weights to [T, H].

        ``choose_among`` is the layer's gate, asked where an expert has no live copy. Raises
        :class:`ExpertUnavailableError` when the deadline passes first.
        """
        started_s = time.perf_counter()
        gates_own = Choice(to_ids(topk_ids), topk_weights)
        span = None if self.trace is None else self.trace.layer(layer_id)
        try:
            combined = self._exchange(layer_id, hidden_states, gates_own, choose_among, span)
        finally:
            if span is not None:
                span.end()
        took_s = time.perf_counter() - started_s
        self.timings_s.append(took_s)
        self.layer_time_s.add(took_s)
        return combined

    def _exchange(
        self,
        layer_id: int,
        hidden_states: torch.Tensor,
        gates_own: Choice,
        choose_among: ChooseAmong | None,
        span: Span | None,
    ) -> torch.Tensor:
        context = None if span is None else traceparent(span.get_span_context())
        combined = None
        while combined is None:  # once more only when an expert was lost in the middle of it
            choice = gates_own
            if self.loss is not None and choose_among is not None:
                lost = self.lost.of_layer(layer_id)
                choice = self.loss.choose(layer_id, lost, hidden_states, gates_own, choose_among)
                if self._limit is not None:
                    choice = self._limit.apply(
                        layer_id, choice, lost, self.loss, hidden_states, choose_among
                    )
            combined = self._compute(layer_id, hidden_states, choice, context)
            if combined is None and (self.loss is None or choose_among is None):
                raise ExpertUnavailableError("an expert has no live copy", f"layer {layer_id}", 1.0)
        return combined

    def _compute(
        self,
        layer_id: int,
        hidden_states: torch.Tensor,
        choice: Choice,
        context: str | None,
    ) -> torch.Tensor | None:
        """Dispatch and combine; returns ``None`` when an expert has no live copy."""
        ids = np.ascontiguousarray(choice.ids, np.int64)
        plans: list[Plan] = []
        received = self._dispatcher.dispatch(
            layer_id,
            hidden_states,
            ids,
            self.deadline_s,
            choice.pairs,
            context,
            lambda: plans.append(prepare(choice.weights, slots_of(ids), hidden_states)),
        )
        return None if received is None else combine(received, plans[0])


class ExpertExchange(Protocol):
    """Where a layer's tokens go to meet their experts."""

    def __call__(
        self,
        layer_id: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        choose_among: ChooseAmong | None = None,
    ) -> torch.Tensor:
        """Map hidden states [T, H], ids and weights [T, K] to the combined output [T, H].

        ``choose_among`` is the layer's gate, for tokens that must do without an expert.
        """
        ...


class RemoteExperts(nn.Module):
    """Takes the place of a family's experts module; has no parameters."""

    # transformers initialises what is not marked; there is nothing to initialise here.
    _is_hf_initialized = True

    def __init__(self, config: Any) -> None:
        """``config`` is transformers'; layer and exchange are set after the model is built."""
        super().__init__()
        self.layer_id = -1
        self.exchange: ExpertExchange | None = None
        self.choose_among: ChooseAmong | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the combined output of the chosen experts, shaped as ``hidden_states`` are.

        Those are [T, H], or [1, T, H] in families whose block leaves them so.
        """
        if self.exchange is None:
            raise RuntimeError(f"layer {self.layer_id} has no exchange")
        rows = hidden_states.flatten(0, -2)
        combined = self.exchange(self.layer_id, rows, top_k_index, top_k_weights, self.choose_among)
        return combined.view(hidden_states.shape)
