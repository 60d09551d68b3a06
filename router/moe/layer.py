"""One MoE layer of the router, after its gate: send, prepare, wait, combine.

:class:`RemoteExperts` stands in transformers' model where the experts were. It hands the layer to
:class:`MoELayers`, one for all layers of the model.

Dimension letters: T tokens, K experts per token, H hidden size, W works of the step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from cluster.errors import ExpertUnavailableError
from cluster.staging import Staging
from cluster.wire.tensors import to_ids
from router.moe.capacity import CapacityLimit
from router.moe.combine import ExpertRows
from router.moe.dispatch import Dispatcher
from router.moe.gate import Choice, ChooseAmong, Gate, choose_among
from router.moe.missing import StepMissing
from router.moe.pending import AwayError, PendingLayer
from router.observability.tracing import StepTrace, traceparent

Result = TypeVar("Result")


class Combination(Protocol[Result]):
    """Makes a layer's result of the rows of its experts, such as :class:`WeightedSums`."""

    def prepare(self, choice: Choice, rows: torch.Tensor) -> Any:
        """Prepare :meth:`combine` while the experts compute; ``rows`` [T, ...] were sent."""
        ...

    def combine(self, received: list[ExpertRows], plan: Any) -> tuple[Result, bool]:
        """Return the result, and whether all of it is finite; a row not received counts as 0."""
        ...

    def finite_rows(self, result: Result) -> np.ndarray:
        """Return whether the result of each token is finite, bool [T]."""
        ...


class RemoteExperts(nn.Module):
    """The module that takes the place of a family's experts; has no parameters."""

    # Without this mark transformers would initialise the module.
    _is_hf_initialized = True

    def __init__(self, config: Any) -> None:
        """``config`` is transformers' and unused; attributes are set after the model is built."""
        super().__init__()
        self.layer_id = -1
        self.layers: MoELayers[torch.Tensor] | None = None
        self.gate: Gate | None = None
        self.staging: Staging | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the combined output of the chosen experts, shaped as ``hidden_states``.

        The shape is [T, H], or [1, T, H] in families whose block leaves it so.
        """
        if self.layers is None:
            raise RuntimeError(f"layer {self.layer_id} has no dispatcher")
        rows = hidden_states.flatten(0, -2)
        among = None if self.gate is None else choose_among(self.gate, rows)
        if self.staging is None:  # the model is on the host
            choice = Choice(to_ids(top_k_index), top_k_weights)
            return self.layers(self.layer_id, rows, choice, among).view(hidden_states.shape)
        ids, weights, rows = self.staging.to_host(top_k_index, top_k_weights, rows)
        combined = self.layers(self.layer_id, rows, Choice(to_ids(ids), weights), among)
        return self.staging.to_device(combined)[0].view(hidden_states.shape)


@dataclass(slots=True)
class StepContext:
    """One engine step, as its MoE layers see it.

    ``deadline_s`` (monotonic) is the earliest of the works' requests. It ends the wait for experts
    that are away, and only the works that need these are left out of the step. ``sizes`` [W] are
    the works' numbers of tokens, in the order of the step's tokens. ``contracts`` [W] are their
    requests' ``on_expert_loss``.
    ``trace`` is set where the step is traced. ``needs_an_expert`` is set where a token without any
    expert has no result.

    The layers set three results. ``missing`` is set once an expert was missing or had no room.
    ``not_finite`` are the indices of works with a sum that is NaN or infinite.
    ``layer_times_s`` has the duration of every layer, from the gate's choice to the sums.
    """

    deadline_s: float
    sizes: Sequence[int]
    contracts: Sequence[str]
    trace: StepTrace | None = None
    needs_an_expert: bool = False
    missing: StepMissing | None = None
    not_finite: set[int] = field(default_factory=set)
    layer_times_s: list[float] = field(default_factory=list)

    def missing_record(self) -> StepMissing:
        """Return the record of the step's missing experts; the first call begins it."""
        if self.missing is None:
            self.missing = StepMissing(self.sizes, self.contracts, self.needs_an_expert)
        return self.missing

    def note_not_finite(self, is_finite: np.ndarray) -> None:
        """Record the works with a token that is not finite, bool [T]; the model's own doing."""
        owners = np.repeat(np.arange(len(self.sizes)), self.sizes)
        self.not_finite.update(owners[~is_finite].tolist())


class MoELayers(Generic[Result]):
    """The MoE layers of one model; their experts are actors.

    ``placed`` is the model in the newest placement. ``context`` is that of the current step, set
    before each: transformers' blocks hand their experts nothing but hidden states and choices.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        combination: Combination[Result],
        limit: CapacityLimit | None = None,
    ) -> None:
        """Send rows through ``dispatcher``; ``limit`` bounds the tokens of an expert in a step."""
        self._dispatcher = dispatcher
        self.placed = dispatcher.placed
        self._combination = combination
        self._limit = limit
        self.context: StepContext | None = None

    def __call__(
        self,
        layer_id: int,
        hidden_states: torch.Tensor,
        gate_choice: Choice,
        among: ChooseAmong | None = None,
    ) -> Result:
        """Combine the experts of the gate's choice [T, K] over hidden states [T, H] or other rows.

        ``among`` is the layer's gate, asked again where an expert has no live copy. Raises
        :class:`ExpertUnavailableError` while no placement is known.
        """
        context = self.context
        if context is None:
            raise RuntimeError(f"layer {layer_id} is computed outside of a step")
        started_at_s = time.perf_counter()
        span = None if context.trace is None else context.trace.layer(layer_id)
        parent = None if span is None else traceparent(span.get_span_context())
        try:
            combined: Result | None = None
            # Repeats, with another choice or fewer pairs, when an expert is lost or away meanwhile.
            while combined is None:
                choice = self._without_missing(context, layer_id, gate_choice, among)
                combined = self._send_and_combine(context, layer_id, hidden_states, choice, parent)
        finally:
            if span is not None:
                span.end()
        context.layer_times_s.append(time.perf_counter() - started_at_s)
        return combined

    def _without_missing(
        self,
        context: StepContext,
        layer_id: int,
        gate_choice: Choice,
        among: ChooseAmong | None,
    ) -> Choice:
        """Return the gate's choice, changed where experts are missing or have no room."""
        missing = self._dispatcher.missing(layer_id)
        if missing is None and context.missing is None and self._limit is None:
            return gate_choice
        if among is None:
            raise ExpertUnavailableError("an expert has no live copy", f"layer {layer_id}", 1.0)
        record = context.missing_record()
        choice = record.choose(layer_id, missing, gate_choice, among)
        if self._limit is None:
            return choice
        return self._limit.apply(layer_id, choice, missing, record, among)

    def _send_and_combine(
        self,
        context: StepContext,
        layer_id: int,
        hidden_states: torch.Tensor,
        choice: Choice,
        parent: str | None,
    ) -> Result | None:
        """Return the result of a choice; ``None`` when an expert has lost its last live copy.

        Also ``None`` when experts are away at the step's deadline; the works that need them wait.
        ``parent`` is the layer's trace context, where it is traced.
        """
        ids = np.ascontiguousarray(choice.ids, np.int64)
        pending = self._dispatcher.send(
            layer_id, hidden_states, ids, context.deadline_s, choice.pairs, parent
        )
        if pending is None:
            return None
        plan = self._combination.prepare(Choice(ids, choice.weights, choice.pairs), hidden_states)
        try:
            received = self._dispatcher.wait(pending)
            if received is None:
                return None
            result, is_finite = self._combination.combine(received, plan)
            return result if is_finite else self._combine_again(context, pending, plan, result)
        except AwayError as away:
            context.missing_record().leave_out(layer_id, ids, away.pairs)
            return None

    def _combine_again(
        self, context: StepContext, pending: PendingLayer, plan: Any, result: Result
    ) -> Result | None:
        """Return the result of a layer whose ``result`` is not finite.

        Rows that came damaged are asked for once more. A result that is not finite even then is
        the model's own doing, and fails its works.
        """
        if self._dispatcher.ask_again(pending):
            received = self._dispatcher.wait(pending)
            if received is None:
                return None
            result, is_finite = self._combination.combine(received, plan)
            if is_finite:
                return result
        context.note_not_finite(self._combination.finite_rows(result))
        return result
