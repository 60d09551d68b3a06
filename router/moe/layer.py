"""One MoE layer of the router, after its gate: send and prepare, then wait and combine.

These are two calls, so that the caller computes something else while the experts compute: another
piece of the step, or a shared expert.

Dimension letters: S tokens of the step, T tokens of the layer's piece, K experts per token, H
hidden size, W works of the step.
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
from cluster.wire.tensors import PieceRoom
from router.moe.capacity import CapacityLimit
from router.moe.combine import ExpertRows, WeightedSums
from router.moe.deaths import Deaths, LayerDeaths, StepDeaths
from router.moe.device_rows import LayerRows
from router.moe.dispatch import Dispatcher
from router.moe.exchange import Exchange, Exchanges
from router.moe.gate import Choice, ChooseAmong
from router.moe.missing import ALL_TOKENS, StepMissing, Tokens
from router.moe.pending import AwayError, PendingLayer
from router.moe.routed import StepRouted
from router.observability.tracing import StepTrace, traceparent

Result = TypeVar("Result")


class Combination(Protocol[Result]):
    """Makes a layer's result of the rows of its experts, such as :class:`WeightedSums`."""

    def prepare(self, choice: Choice, rows: torch.Tensor) -> Any:
        """Prepare :meth:`combine` while the experts compute; ``rows`` [T, ...] are as were sent.

        They have the shape and the dtype of the rows; their order may be another.
        """
        ...

    def combine(self, received: list[ExpertRows], plan: Any) -> tuple[Result, bool]:
        """Return the result, and whether all of it is finite; a row not received counts as 0."""
        ...

    def finite_rows(self, result: Result) -> np.ndarray:
        """Return whether the result of each token is finite, bool [T]."""
        ...


@dataclass(slots=True)
class StepContext:
    """One engine step, as its MoE layers see it.

    ``deadline_s`` (monotonic) is the earliest of the works' requests. It ends the wait for experts
    that are away, and only the works that need these are left out of the step. ``sizes`` [W] are
    the works' numbers of tokens, in the order of the step's tokens. ``contracts`` [W] are their
    requests' ``on_expert_loss``.
    ``trace`` is set where the step is traced. ``needs_an_expert`` is set where a token without any
    expert has no result. ``known_deaths`` [W] are the deaths of expert actors with rows of the
    works in earlier steps; without it none are counted. ``is_of_suspect`` is set where a work is
    computed alone for them. ``routed`` is set where requests ask for the experts of tokens, or
    force them. ``meanwhile`` is called each time before the experts of a layer are waited for.

    The layers set four results. ``missing`` is set once an expert was missing or had no room.
    ``deaths`` is set once an actor died.
    ``not_finite`` are the indices of works with a sum that is NaN or infinite.
    ``layer_times_s`` has the duration of every layer and piece, from the gate's choice to the sums.
    """

    deadline_s: float
    sizes: Sequence[int]
    contracts: Sequence[str]
    trace: StepTrace | None = None
    needs_an_expert: bool = False
    known_deaths: Sequence[Deaths | None] | None = None
    is_of_suspect: bool = False
    routed: StepRouted | None = None
    meanwhile: Callable[[], None] | None = None
    deaths: StepDeaths | None = None
    missing: StepMissing | None = None
    not_finite: set[int] = field(default_factory=set)
    layer_times_s: list[float] = field(default_factory=list)
    _rooms: dict[int | None, PieceRoom] = field(default_factory=dict)

    def room(self, tokens: Tokens) -> PieceRoom:
        """Return the memory of a piece of the step, or of some of its tokens."""
        # The first token is of no other piece.
        first = tokens.start if isinstance(tokens, slice) else int(tokens[0])
        room = self._rooms.get(first)
        if room is None:
            room = self._rooms[first] = PieceRoom()
        return room

    def missing_record(self, tokens: Tokens = ALL_TOKENS) -> StepMissing:
        """Return the record of missing experts of some of the step's tokens.

        The first call begins it. The records of all tokens share their results.
        """
        if self.missing is None:
            self.missing = StepMissing(self.sizes, self.contracts, self.needs_an_expert)
        return self.missing if tokens is ALL_TOKENS else self.missing.of(tokens)

    def layer_deaths(self, layer_id: int, tokens: Tokens, k: int) -> LayerDeaths | None:
        """Return the record of deaths of some of the step's tokens in a layer.

        The first call begins that of the step.
        """
        if self.known_deaths is None:
            return None
        if self.deaths is None:
            self.deaths = StepDeaths(self.sizes, self.known_deaths)
        return LayerDeaths(self.deaths, layer_id, np.arange(sum(self.sizes))[tokens], k)

    def note_not_finite(self, is_finite: np.ndarray, tokens: Tokens = ALL_TOKENS) -> None:
        """Record the works with a token that is not finite, bool [T]; the model's own doing."""
        owners = np.repeat(np.arange(len(self.sizes)), self.sizes)[tokens]
        self.not_finite.update(owners[~is_finite].tolist())


@dataclass(slots=True)
class BegunLayer:
    """A layer between :meth:`MoELayers.begin` and :meth:`MoELayers.finish`.

    ``rows`` [T, ...] are those of ``tokens`` of the step. ``choice`` is the gate's ``gate_choice``
    [T, K] without missing experts. ``exchange`` is set while native code has the layer. Else
    ``pending`` is; it is ``None`` where an expert of the choice has no live copy.
    """

    context: StepContext
    layer_id: int
    rows: LayerRows
    gate_choice: Choice
    among: ChooseAmong | None
    tokens: Tokens
    started_at_s: float
    span: Span | None
    choice: Choice
    exchange: Exchange | None = None
    pending: PendingLayer | None = None
    plan: Any = None

    def end_span(self) -> None:
        """End the span of a layer that is traced."""
        if self.span is not None:
            self.span.end()


class MoELayers(Generic[Result]):
    """The MoE layers of one model; their experts are actors.

    Several layers, or pieces of one layer, may be under way at once; one thread begins and finishes
    them. ``placed`` is the model in the newest placement. With ``has_limit``, each step comes in
    one piece, since the capacity of an expert is counted by step.
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
        self.has_limit = limit is not None
        is_native = isinstance(combination, WeightedSums) and limit is None
        self._exchanges = dispatcher.exchanges if is_native else None

    def may_change(self, context: StepContext, layer_id: int) -> bool:
        """Return whether a gate's choice may be changed, as far as is known.

        It may where experts have a capacity, or are missing.
        """
        is_known = self._limit is not None or context.missing is not None
        return is_known or self._dispatcher.missing(layer_id) is not None

    def begin(
        self,
        context: StepContext,
        layer_id: int,
        rows: LayerRows,
        gate_choice: Choice,
        among: ChooseAmong | None = None,
        tokens: Tokens = ALL_TOKENS,
    ) -> BegunLayer:
        """Send hidden states [T, H], or other rows, to the experts of the gate's choice [T, K].

        ``tokens`` are their indices in the step of ``context``. ``among`` is the layer's gate,
        asked again where an expert has no live copy. The caller finishes the layer, or abandons it.
        ``rows`` and ``gate_choice`` stay unchanged until then.

        Raises :class:`ExpertUnavailableError` while no placement is known.
        """
        started_at_s = time.perf_counter()
        span = None if context.trace is None else context.trace.layer(layer_id)
        begun = BegunLayer(
            context=context,
            layer_id=layer_id,
            rows=rows,
            gate_choice=gate_choice,
            among=among,
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

    def finish(self, begun: BegunLayer) -> Result:
        """Return the combined rows of a layer's experts; waits for them.

        They may be in the piece's room (:meth:`StepContext.room`): they last until its next layer.
        The layer is sent again, with another choice or fewer pairs, when an expert is lost or away
        meanwhile. Raises as :meth:`begin`, :class:`ExpertFailedError` for rows that an expert
        cannot compute, and :class:`router.moe.deaths.ActorsDiedError`.
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

    def abandon(self, begun: BegunLayer) -> None:
        """Drop the answers of a layer that is not finished, since its step fails."""
        if begun.exchange is not None:
            begun.exchange.settle()
        if begun.pending is not None:
            begun.pending.abandon()
        begun.end_span()

    def _exchange(self, begun: BegunLayer) -> Exchange | None:
        """Send a layer by native code, where that can: a step's only piece."""
        context, rows = begun.context, begun.rows
        if (
            self._exchanges is None
            or not isinstance(rows, torch.Tensor)
            or context.trace is not None
            or context.missing is not None
            or context.is_of_suspect
            or rows.shape[0] != sum(context.sizes)
        ):
            return None
        room = context.room(begun.tokens)
        sent = self._exchanges.send(begun.layer_id, rows, begun.choice, context.deadline_s, room)
        if sent is not None:
            sent.settle = partial(self._take_over, begun, sent)
        return sent

    def _end_exchange(self, begun: BegunLayer, exchanges: Exchanges, sent: Exchange) -> Any:
        """Return the sums of a layer that native code has sent; ``None`` where it cannot go on."""
        if begun.context.meanwhile is not None:
            begun.context.meanwhile()
        sums = exchanges.receive(sent)
        if sums is None:
            sent.settle()
        begun.exchange = None
        return sums

    def _take_over(self, begun: BegunLayer, sent: Exchange) -> None:
        """Go on with a layer that native code has sent."""
        context, layer_id = begun.context, begun.layer_id
        begun.exchange = None
        deaths = partial(context.layer_deaths, layer_id, begun.tokens, sent.choice.ids.shape[1])
        times = context.deadline_s, deaths
        begun.pending = self._dispatcher.take_over(sent, layer_id, *times)
        begun.plan = self._combination.prepare(sent.choice, sent.rows)

    def _send_and_prepare(self, begun: BegunLayer) -> None:
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
            context.is_of_suspect,
        )
        if begun.pending is not None:
            rows = begun.rows
            like = rows if isinstance(rows, torch.Tensor) else rows.like
            begun.plan = self._combination.prepare(choice, like)

    def _without_missing(self, begun: BegunLayer) -> Choice:
        """Return the gate's choice, changed where experts are missing or have no room."""
        context, layer_id, among = begun.context, begun.layer_id, begun.among
        missing = self._dispatcher.missing(layer_id)
        if missing is None and context.missing is None and self._limit is None:
            return begun.gate_choice
        if among is None:
            raise ExpertUnavailableError("an expert has no live copy", f"layer {layer_id}", 1.0)
        record = context.missing_record(begun.tokens)
        choice = record.choose(layer_id, missing, begun.gate_choice, among)
        if self._limit is None:
            return choice
        return self._limit.apply(layer_id, choice, missing, record, among)

    def _receive_and_combine(self, begun: BegunLayer) -> Result | None:
        """Return the result of a layer's choice; ``None`` when an expert lost its last live copy.

        Also ``None`` when experts are away at the step's deadline; the works that need them wait.
        """
        pending = begun.pending
        if pending is None:
            return None
        try:
            if begun.context.meanwhile is not None:
                begun.context.meanwhile()
            received = self._dispatcher.wait(pending)
            if received is None:
                return None
            result, is_finite = self._combination.combine(received, begun.plan)
            if is_finite:
                return result
            # Perhaps rows came damaged: they are asked for once more.
            return self._combine_again(begun, pending, result)
        except AwayError as away:
            record = begun.context.missing_record(begun.tokens)
            record.leave_out(begun.layer_id, begun.choice.ids, away.pairs)
            return None

    def _combine_again(
        self, begun: BegunLayer, pending: PendingLayer, result: Result
    ) -> Result | None:
        """Return the result of a layer whose ``result`` is not finite.

        Rows that came damaged are asked for once more. A result that is not finite even then is
        the model's own doing, and fails its works.
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
