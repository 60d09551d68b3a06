"""One MoE layer of the router, after its gate: send and prepare, then wait and combine.

These are two calls, so that the caller can compute something else while the experts compute:
another microbatch of the step, or a shared expert.

Dimension letters: S tokens of the step, T tokens of the layer's microbatch, K experts per token, H
hidden size, W chunks of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from opentelemetry.trace import Span

from cluster.errors import ExpertUnavailableError
from cluster.wire.tensors import MicrobatchBuffers
from router.moe.capacity import CapacityLimit
from router.moe.combine import ExpertRows, WeightedSums
from router.moe.deaths import Deaths, LayerDeaths, StepDeaths
from router.moe.device_rows import LayerRows
from router.moe.dispatch import Dispatcher
from router.moe.exchange import Exchanges, NativeLayerCall
from router.moe.gate import Choice, ChooseAmong
from router.moe.missing import ALL_TOKENS, StepMissing, Tokens
from router.moe.pending import AwayError, PendingLayer
from router.moe.routed import StepRouted
from router.observability.tracing import StepTrace, traceparent

Result = TypeVar("Result")


class Combination(Protocol[Result]):
    """Makes a layer's result from its experts' rows, such as :class:`WeightedSums`."""

    def prepare(self, choice: Choice, rows: torch.Tensor) -> Any:
        """Prepare :meth:`combine` while the experts compute; ``rows`` [T, ...] are as sent.

        They have the shape and dtype of the sent rows, but possibly a different order.
        """
        ...

    def combine(self, received: list[ExpertRows], plan: Any) -> tuple[Result, bool]:
        """Return the result and whether all of it is finite; a missing row counts as 0."""
        ...

    def finite_rows(self, result: Result) -> np.ndarray:
        """Return whether the result of each token is finite, bool [T]."""
        ...


@dataclass(slots=True)
class StepContext:
    """One engine step, as its MoE layers see it.

    ``deadline_s`` (monotonic) is the earliest among the chunks' requests. It ends the wait for
    unavailable experts; only the chunks that need these are left out of the step. ``sizes`` [W] are
    the chunks' numbers of tokens, in the order of the step's tokens. ``contracts`` [W] are their
    requests' ``on_expert_loss``.
    ``trace`` is set if the step is traced. ``needs_an_expert`` is set if a token without any expert
    has no result. ``known_deaths`` [W] are the deaths of expert actors that had rows of the chunks
    in earlier steps; without it deaths are not counted. ``is_isolated`` is set if they are why a
    chunk is computed alone. ``routed`` is set if requests ask for the experts of tokens or force
    them. ``on_wait`` is called each time before the layers wait for experts.

    The layers set four results. ``missing`` is set once an expert was missing or had no room.
    ``deaths`` is set once an actor died.
    ``not_finite`` are the indices of chunks with a sum that is NaN or infinite.
    ``layer_times_s`` has each layer's duration by microbatch, from the gate's choice to the sums.
    """

    deadline_s: float
    sizes: Sequence[int]
    contracts: Sequence[str]
    trace: StepTrace | None = None
    needs_an_expert: bool = False
    known_deaths: Sequence[Deaths | None] | None = None
    is_isolated: bool = False
    routed: StepRouted | None = None
    on_wait: Callable[[], None] | None = None
    deaths: StepDeaths | None = None
    missing: StepMissing | None = None
    not_finite: set[int] = field(default_factory=set)
    layer_times_s: list[float] = field(default_factory=list)
    _rooms: dict[int | None, MicrobatchBuffers] = field(default_factory=dict)

    def room(self, tokens: Tokens) -> MicrobatchBuffers:
        """Return the buffers of a microbatch of the step, or of some of its tokens."""
        # No other microbatch has the first token.
        first = tokens.start if isinstance(tokens, slice) else int(tokens[0])
        room = self._rooms.get(first)
        if room is None:
            room = self._rooms[first] = MicrobatchBuffers()
        return room

    def missing_record(self, tokens: Tokens = ALL_TOKENS) -> StepMissing:
        """Return the record of missing experts for some of the step's tokens.

        The first call creates it. The records of all tokens share their results.
        """
        if self.missing is None:
            self.missing = StepMissing(self.sizes, self.contracts, self.needs_an_expert)
        return self.missing if tokens is ALL_TOKENS else self.missing.of(tokens)

    def layer_deaths(self, layer_id: int, tokens: Tokens, k: int) -> LayerDeaths | None:
        """Return the record of deaths for some of the step's tokens in a layer.

        The first call creates the step's record.
        """
        if self.known_deaths is None:
            return None
        if self.deaths is None:
            self.deaths = StepDeaths(self.sizes, self.known_deaths)
        return LayerDeaths(self.deaths, layer_id, np.arange(sum(self.sizes))[tokens], k)

    def note_not_finite(self, is_finite: np.ndarray, tokens: Tokens = ALL_TOKENS) -> None:
        """Record the chunks with a token that is not finite, bool [T]; the model produced it."""
        owners = np.repeat(np.arange(len(self.sizes)), self.sizes)[tokens]
        self.not_finite.update(owners[~is_finite].tolist())


@dataclass(slots=True)
class InFlightLayer:
    """A layer between :meth:`MoELayers.begin` and :meth:`MoELayers.finish`.

    ``rows`` [T, ...] belong to ``tokens`` of the step. ``choice`` is the gate's ``gate_choice``
    [T, K] without missing experts. ``exchange`` is set while native code has the layer. Otherwise
    ``pending`` is set, or ``None`` if an expert of the choice has no live copy.
    """

    context: StepContext
    layer_id: int
    rows: LayerRows
    gate_choice: Choice
    reselect: ChooseAmong | None
    tokens: Tokens
    started_at_s: float
    span: Span | None
    choice: Choice
    exchange: NativeLayerCall | None = None
    pending: PendingLayer | None = None
    plan: Any = None

    def end_span(self) -> None:
        """End the span of a traced layer."""
        if self.span is not None:
            self.span.end()


class MoELayers(Generic[Result]):
    """The MoE layers of one model; their experts are actors.

    Several layers, or microbatches of one layer, may be in flight at once; one thread begins and
    finishes them. ``placed`` is the model in the newest placement. With ``has_limit``, each step is
    a single microbatch, since an expert's capacity is counted per step.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        combination: Combination[Result],
        limit: CapacityLimit | None = None,
    ) -> None:
        """Send rows through ``dispatcher``; ``limit`` bounds an expert's tokens in a step."""
        self._dispatcher = dispatcher
        self.placed = dispatcher.placed
        self._combination = combination
        self._limit = limit
        self.has_limit = limit is not None
        is_native = isinstance(combination, WeightedSums) and limit is None
        self._exchanges = dispatcher.exchanges if is_native else None

    def may_change(self, context: StepContext, layer_id: int) -> bool:
        """Return whether a gate's choice may change, as far as is known.

        It may if experts have a capacity or are missing.
        """
        is_known = self._limit is not None or context.missing is not None
        return is_known or self._dispatcher.missing(layer_id) is not None

    def begin(
        self,
        context: StepContext,
        layer_id: int,
        rows: LayerRows,
        gate_choice: Choice,
        reselect: ChooseAmong | None = None,
        tokens: Tokens = ALL_TOKENS,
    ) -> InFlightLayer:
        """Send hidden states [T, H], or other rows, to the experts of the gate's choice [T, K].

        ``tokens`` are their indices in the step of ``context``. ``reselect`` is the layer's gate,
        asked again if an expert has no live copy. The caller must finish or abandon the layer, and
        leave ``rows`` and ``gate_choice`` unchanged until then.

        Raises :class:`ExpertUnavailableError` while no placement is known.
        """
        started_at_s = time.perf_counter()
        span = None if context.trace is None else context.trace.layer(layer_id)
        begun = InFlightLayer(
            context=context,
            layer_id=layer_id,
            rows=rows,
            gate_choice=gate_choice,
            reselect=reselect,
            tokens=tokens,
            started_at_s=started_at_s,
            span=span,
            choice=gate_choice,
        )
        try:
            begun.exchange = self._exchange(begun)
            if begun.exchange is None:
                self._send_and_prepare(begun)
            elif begun.exchange.left is not None:
                begun.exchange.settle()
        except BaseException:
            self.abandon(begun)
            raise
        return begun

    def finish(self, begun: InFlightLayer) -> Result:
        """Wait for a layer's experts, and return their combined rows.

        These may lie in the microbatch's buffers (:meth:`StepContext.room`), and so last until its
        next layer. If an expert is lost or unavailable meanwhile, the layer is sent again with
        another choice or fewer pairs. Raises as :meth:`begin`, :class:`ExpertFailedError` for rows
        that an expert cannot compute, and :class:`router.moe.deaths.ActorsDiedError`.
        """
        try:
            combined = None
            if self._exchanges is not None and begun.exchange is not None:
                combined = self._end_exchange(begun, self._exchanges, begun.exchange)
            while combined is None and (combined := self._receive_and_combine(begun)) is None:
                self._send_and_prepare(begun)
        except BaseException:
            self.abandon(begun)
            raise
        begun.end_span()
        begun.context.layer_times_s.append(time.perf_counter() - begun.started_at_s)
        return combined

    def abandon(self, begun: InFlightLayer) -> None:
        """Drop the answers of an unfinished layer, since its step fails."""
        if begun.exchange is not None:
            begun.exchange.settle()
        if begun.pending is not None:
            begun.pending.abandon()
        begun.end_span()

    def _exchange(self, begun: InFlightLayer) -> NativeLayerCall | None:
        """Send a layer by native code if it can: only for a step of a single microbatch."""
        context, rows = begun.context, begun.rows
        if (
            self._exchanges is None
            or not isinstance(rows, torch.Tensor)
            or context.trace is not None
            or context.missing is not None
            or context.is_isolated
            or rows.shape[0] != sum(context.sizes)
        ):
            return None
        room = context.room(begun.tokens)
        sent = self._exchanges.send(begun.layer_id, rows, begun.choice, context.deadline_s, room)
        if sent is not None:
            sent.settle = partial(self._take_over, begun, sent)
        return sent

    def _end_exchange(
        self, begun: InFlightLayer, exchanges: Exchanges, sent: NativeLayerCall
    ) -> Any:
        """Return the sums of a layer that native code sent; ``None`` if it cannot finish it."""
        if begun.context.on_wait is not None:
            begun.context.on_wait()
        sums = exchanges.receive(sent)
        if sums is None:
            sent.settle()
        begun.exchange = None
        return sums

    def _take_over(self, begun: InFlightLayer, sent: NativeLayerCall) -> None:
        """Continue in Python with a layer that native code has sent."""
        context, layer_id = begun.context, begun.layer_id
        begun.exchange = None
        deaths = partial(context.layer_deaths, layer_id, begun.tokens, sent.choice.ids.shape[1])
        times = context.deadline_s, deaths
        begun.pending = self._dispatcher.take_over(sent, layer_id, *times)
        begun.plan = self._combination.prepare(sent.choice, sent.rows)

    def _send_and_prepare(self, begun: InFlightLayer) -> None:
        """Send a layer's rows without missing experts, and prepare their combination."""
        begun.choice = choice = self._without_missing(begun)
        span = begun.span
        parent = None if span is None else traceparent(span.get_span_context())
        context, layer_id = begun.context, begun.layer_id
        begun.pending = self._dispatcher.send(
            layer_id,
            begun.rows,
            choice.ids,
            context.deadline_s,
            choice.pairs,
            parent,
            partial(context.layer_deaths, layer_id, begun.tokens, choice.ids.shape[1]),
            context.is_isolated,
        )
        if begun.pending is not None:
            rows = begun.rows
            like = rows if isinstance(rows, torch.Tensor) else rows.like
            begun.plan = self._combination.prepare(choice, like)

    def _without_missing(self, begun: InFlightLayer) -> Choice:
        """Return the gate's choice, changed if experts are missing or have no room."""
        context, layer_id, reselect = begun.context, begun.layer_id, begun.reselect
        missing = self._dispatcher.missing(layer_id)
        if missing is None and context.missing is None and self._limit is None:
            return begun.gate_choice
        if reselect is None:
            raise ExpertUnavailableError("an expert has no live copy", f"layer {layer_id}", 1.0)
        record = context.missing_record(begun.tokens)
        choice = record.choose(layer_id, missing, begun.gate_choice, reselect)
        if self._limit is None:
            return choice
        return self._limit.apply(layer_id, choice, missing, record, reselect)

    def _receive_and_combine(self, begun: InFlightLayer) -> Result | None:
        """Return the result of a layer's choice; ``None`` when an expert lost its last live copy.

        Also ``None`` if experts are unavailable at the step's deadline; chunks that need them wait.
        """
        pending = begun.pending
        if pending is None:
            return None
        try:
            if begun.context.on_wait is not None:
                begun.context.on_wait()
            received = self._dispatcher.wait(pending)
            if received is None:
                return None
            result, is_finite = self._combination.combine(received, begun.plan)
            if is_finite:
                return result
            # Rows may have arrived corrupt: request them once more.
            return self._combine_again(begun, pending, result)
        except AwayError as away:
            record = begun.context.missing_record(begun.tokens)
            record.leave_out(begun.layer_id, begun.choice.ids, away.pairs)
            return None

    def _combine_again(
        self, begun: InFlightLayer, pending: PendingLayer, result: Result
    ) -> Result | None:
        """Return the result of a layer whose ``result`` is not finite.

        Corrupt rows are requested once more. If the result is still not finite, the model itself
        produces it, and its chunks fail.
        """
        if self._dispatcher.ask_again(pending):
            received = self._dispatcher.wait(pending)
            if received is None:
                return None
            result, is_finite = self._combination.combine(received, begun.plan)
            if is_finite:
                self._dispatcher.note_mended(pending)
                return result
        begun.context.note_not_finite(self._combination.finite_rows(result), begun.tokens)
        return result
