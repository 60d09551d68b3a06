"""Dispatch: send each token's row to the actors that hold its experts, and collect the results.

Each actor gets one frame a layer. If an actor is dead, hung, overloaded or under another placement,
only its frame is sent again: at once if its experts have other copies
(:mod:`router.moe.copy_choice` chooses), else under the next placement. Calls are pure, so sending a
frame again is safe. A deadline ends the wait for unavailable experts, but rows of actors that
answered are never thrown away. All of this runs on the engine's thread.

Dimension letters: T tokens, K experts per token, H hidden size, P = T*K pairs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cluster.errors import (
    ExpertMeshError,
    ExpertUnavailableError,
    FrameError,
    ModelReplacedError,
)
from cluster.native import native
from cluster.placement.placement import Placement
from cluster.spec import model_id_of
from cluster.transport.base import Call, CallFailure, Outcome, Transport
from cluster.transport.stream.client import StreamTransport
from cluster.wire.frames import (
    Buffer,
    DispatchFrame,
    Frame,
    RowsFrame,
    Shape,
    decode,
    encode,
    joined,
)
from cluster.wire.tensors import dtype_name
from router.control.heard import HeardActors
from router.moe.combine import ExpertRows
from router.moe.copy_choice import CopyChoice
from router.moe.deaths import LayerDeaths
from router.moe.device_rows import LayerRows
from router.moe.exchange import Exchanges, NativeLayerCall
from router.moe.failures import Failures, back_off, check_away
from router.moe.pace import LatencyTracker, note_heard
from router.moe.pending import Attempt, FailedPart, PendingLayer
from router.moe.permute import Part, PlacedModel, as_sent, rows_of_parts, split
from router.moe.shared_load import SharedLoad
from router.moe.zero_rows import ActorProbe

if TYPE_CHECKING:  # the workshop computes layers without Ray, which the view imports
    from router.control.placement_view import PlacementView


class Dispatcher:
    """Dispatches the layers of one model; each router replica has one, used by one thread.

    ``retries`` counts frames sent again, by reason, ``calls`` frames by transport. ``placed`` is
    the model in the newest placement, ``times`` holds the actors' answer times.
    """

    def __init__(
        self,
        model: str,
        view: PlacementView,
        transport: Transport,
        suspect: Callable[[str, int], None],
        call_timeout_s: float,
        answer_shape: Callable[[Shape], Shape] = as_sent,
        shared: SharedLoad | None = None,
        heard: HeardActors | None = None,
    ) -> None:
        """``model`` is the model's key; all its dispatchers share ``shared`` and ``heard``.

        ``answer_shape`` maps the shape of a sent row to that of an answer's row.
        ``suspect`` is called with (actor_id, generation) of an actor that does not answer.
        """
        self._model = model
        self._view = view
        self._transport = transport
        self._suspect = suspect
        self._call_timeout_s = call_timeout_s
        self._answer_shape = answer_shape
        self._request_ids = itertools.count(1)
        self._zero_rows = ActorProbe(model, transport, self._request_ids)
        self.placed = PlacedModel(model, view)
        self._layouts = self.placed.layouts
        self._copies = CopyChoice(self._layouts, transport.is_ready, shared)
        self.times = self._copies.times
        self._pace = LatencyTracker()
        self._heard = heard or HeardActors()
        self._failures = Failures(self._copies, suspect, transport.renew)
        self.retries = self._failures.retries
        self.calls = transport.calls
        self.exchanges: Exchanges | None = None
        """Set if :mod:`router.moe.exchange` may send layers."""
        if native is not None and isinstance(transport, StreamTransport):
            where = model, view, self._layouts, transport
            times = call_timeout_s, self._request_ids, self._pace, self._heard
            self.exchanges = Exchanges(*where, *times)

    def missing(self, layer_id: int) -> np.ndarray | None:
        """Return the missing experts of a layer, bool [E]; ``None`` if none is missing."""
        return self.placed.missing(layer_id)

    def send(
        self,
        layer_id: int,
        hidden_states: LayerRows,
        topk_ids: np.ndarray,
        deadline_s: float,
        pairs: np.ndarray | None = None,
        traceparent: str | None = None,
        deaths: Callable[[], LayerDeaths | None] = lambda: None,
        is_last_try: bool = False,
    ) -> PendingLayer | None:
        """Send hidden states [T, H], or other rows [T, ...] on the host, to the gate's experts.

        Pair t * K + r is token t with expert ``topk_ids[t, r]``, int64 [T, K]. An expert gets its
        rows by rank, then by token, as transformers' eager experts do. In torch's products a row's
        bits depend on its place, so this order gives transformers' results. If ``pairs`` is given,
        only these pairs are sent. ``traceparent`` is sent with the frames of a traced layer.
        ``deaths`` returns the record of actors that die. With ``is_last_try`` rows go only to
        actors that have just computed zeros, and no copy is asked while such an actor may live.

        ``deadline_s`` (monotonic) is the earliest of the step's requests; see :meth:`wait`.

        Returns ``None`` when an expert has no live copy; the caller decides. Raises
        :class:`ExpertUnavailableError` when no placement is known, and
        :class:`ModelReplacedError` when the placement no longer has the model.
        """
        self._settle_exchange()
        layer = _layer(layer_id, hidden_states, topk_ids, deadline_s, time.monotonic())
        layer.traceparent, layer.deaths, layer.is_last_try = traceparent, deaths, is_last_try
        return layer if self._send_pairs(layer, pairs) else None

    def take_over(
        self,
        sent: NativeLayerCall,
        layer_id: int,
        deadline_s: float,
        deaths: Callable[[], LayerDeaths | None],
    ) -> PendingLayer:
        """Return a layer that :attr:`exchanges` sent, ready for :meth:`wait`; see :meth:`send`."""
        if self.exchanges is not None:
            self.exchanges.under_way = None
        times_s = deadline_s, sent.sent_at_s
        layer = _layer(layer_id, sent.rows, sent.choice.ids, *times_s)
        layer.deaths = deaths
        ordered, parts, _ = split(sent.layer.layout, layer.expert_of_pair, layer.k, None)
        layer.attempt = self._send_parts(sent.layer.placement, layer, ordered, parts, sent)
        return layer

    def _send_pairs(self, layer: PendingLayer, pairs: np.ndarray | None) -> bool:
        """Send ``pairs`` of a layer, by default all, once.

        Returns false if an expert has no live copy.
        """
        placement = self._view.placement
        if placement is None or not self._layouts.has_model(placement):
            raise self._not_placed()
        layout = self._layouts.fixed(placement, layer.layer_id)
        if layout is None:  # an expert has several copies
            layout = self._copies.layout(placement, layer, pairs, time.monotonic())
        ordered, parts, missing_pairs = split(layout, layer.expert_of_pair, layer.k, pairs)
        if len(missing_pairs):
            return False
        layer.attempt = self._send_parts(placement, layer, ordered, parts)
        return True

    def _send_parts(
        self,
        placement: Placement,
        layer: PendingLayer,
        ordered: np.ndarray,
        parts: Sequence[Part],
        sent: NativeLayerCall | None = None,
    ) -> Attempt:
        """Send every part to its actor, one frame each; or continue with the calls ``sent``."""
        now_s = time.monotonic() if sent is None else sent.sent_at_s
        most_rows = max([len(part.pairs) for part in parts], default=0)
        attempt = Attempt(placement, most_rows)
        if not parts:
            return attempt
        replaceable = self._replaceable(placement, layer, parts, now_s)  # for the time to wait
        rows_of = rows_of_parts(layer.rows, ordered, parts, layer.k)
        computing = self._zero_rows.computing(layer, parts) if layer.is_last_try else None
        calls: list[Call] = []
        # ``more`` are device rows that lie in other pieces; on a CPU there are none.
        for part, is_replaceable, (rows, *more) in zip(parts, replaceable, rows_of, strict=True):
            actor_id, generation, expert_ids, counts, pairs = part
            if computing is not None and actor_id not in computing:
                attempt.silent.append(part)
                continue
            timeout_s, end_s = self._times_s(layer, part, most_rows, now_s, is_replaceable)
            frame = DispatchFrame(
                request_id=next(self._request_ids) if sent is None else sent.request_id,
                model=self._model,
                layer_id=layer.layer_id,
                expert_ids=expert_ids,
                num_tokens_per_expert=counts,
                num_rows=len(pairs),
                row_shape=layer.row_shape,
                dtype=layer.dtype,
                rows=rows,
                time_left_s=timeout_s,
                traceparent=layer.traceparent,
            )
            attempt.sent.append((part, frame))
            data = encode(frame, tuple(more))
            calls.append(Call(actor_id, generation, data, timeout_s, is_replaceable, end_s))
        if calls:
            attempt.calls = self._transport.send(calls) if sent is None else sent.go_on(calls)
        return attempt

    def wait(self, layer: PendingLayer) -> list[ExpertRows] | None:
        """Return the experts' unweighted rows; sends a part again when its actor does not answer.

        The rows last until the next call of :meth:`wait`. Returns ``None`` when an expert has lost
        its last live copy. Raises :class:`AwayError` when actors without another copy have not
        answered by the deadline: the step continues without their pairs, so that a request past its
        deadline can end. Raises as :meth:`LayerDeaths.note` and :meth:`ActorProbe.check`.
        """
        self._settle_exchange()
        if layer.attempt is None:  # by :meth:`ask_again`: an expert has lost its last copy
            return None
        while failed_parts := self._receive(layer):
            layer.note_deaths(failed_parts)
            self._zero_rows.check(layer, failed_parts)
            if not self._send_again(layer, failed_parts):
                return None
        return layer.received

    def _settle_exchange(self) -> None:
        """Tell Python's transport of a native call in flight, or it would drop its answers."""
        if self.exchanges is not None and self.exchanges.under_way is not None:
            self.exchanges.under_way.settle()

    def _receive(self, layer: PendingLayer) -> list[FailedPart]:
        """Collect an attempt's answers; return the parts without rows."""
        attempt = layer.attempt
        assert attempt is not None
        silent_parts = [FailedPart(part, CallFailure.TIMED_OUT) for part in attempt.silent]
        for part in attempt.silent:
            self._failures.note_no_rows(layer, part, CallFailure.TIMED_OUT)
        if attempt.calls is None:
            return silent_parts
        outcomes = attempt.calls.wait(lambda call, s: self._is_gone(attempt, call, s))
        now_s = time.monotonic()
        failed_parts = silent_parts + [
            FailedPart(part, outcome if isinstance(outcome, CallFailure) else None)
            for (part, frame), outcome in zip(attempt.sent, outcomes, strict=True)
            if not self._take(layer, part, frame, outcome, now_s)
        ]
        if not failed_parts:
            actors = ((part.actor_id, part.generation) for part, _ in attempt.sent)
            self._pace.note(attempt.most_rows, attempt.calls.took_s, actors)
            if layer.owed_before is not None:
                self._copies.note_answers(layer, attempt.sent, now_s)
        return failed_parts

    def _take(
        self,
        layer: PendingLayer,
        part: Part,
        sent: DispatchFrame,
        outcome: Outcome,
        now_s: float,
    ) -> bool:
        """Keep an answer's rows; if it has none, note why and return false."""
        answer: CallFailure | FrameError | Frame
        if isinstance(outcome, CallFailure):
            answer = outcome
        else:
            note_heard(self._heard, part.actor_id, part.generation, now_s)
            answer = _decoded(outcome)
        if isinstance(answer, RowsFrame) and self._belongs(answer, sent):
            layer.received.append(ExpertRows(part.pairs, joined(answer.rows)))
            layer.answered.append(part)
            return True
        self._failures.note_no_rows(layer, part, answer)
        return False

    def _belongs(self, answer: RowsFrame, sent: DispatchFrame) -> bool:
        return (
            answer.request_id == sent.request_id
            and answer.num_rows == sent.num_rows
            and answer.row_shape == self._answer_shape(sent.row_shape)
            and answer.dtype == sent.dtype
        )

    # Copies and times of parts.

    def _replaceable(
        self,
        placement: Placement,
        layer: PendingLayer,
        parts: Sequence[Part],
        now_s: float,
        at_once: bool = False,
    ) -> Sequence[bool]:
        """Return, for each part, whether other copies of all its experts can be asked."""
        if self._layouts.fixed(placement, layer.layer_id) is not None or layer.is_last_try:
            return [False] * len(parts)
        return self._copies.replaceable(placement, layer, parts, now_s, at_once=at_once)

    def _times_s(
        self, layer: PendingLayer, part: Part, most_rows: int, now_s: float, is_replaceable: bool
    ) -> tuple[float, float]:
        """Return how long to wait for an answer (short if a copy can give it), and the end."""
        left_s = layer.deadline_s - now_s
        if left_s < self._call_timeout_s:
            left_s = max(left_s, self._patience_s(part, most_rows))
        wait_s = self._pace.stall_s(most_rows) if is_replaceable else left_s
        return min(self._call_timeout_s, wait_s), now_s + left_s

    def _patience_s(self, part: Part, most_rows: int) -> float:
        """Return how long an actor may take to answer, whatever the deadlines."""
        answer_timeout_s = self._pace.answer_timeout_s(part.actor_id, part.generation, most_rows)
        return min(self._call_timeout_s, answer_timeout_s)

    def _is_gone(self, attempt: Attempt, call: Call, silent_s: float) -> bool:
        """Return whether the newest placement no longer has a call's actor.

        Reports an actor to the controller when it is silent for longer than answers take.
        """
        if silent_s >= self._pace.stall_s(attempt.most_rows):
            self._suspect(call.actor_id, call.generation)
        newest = self._view.placement
        asked_under = attempt.placement.epoch
        return newest is not None and newest.has_lost(call.actor_id, call.generation, asked_under)

    # Failures.

    def _not_placed(self) -> ExpertMeshError:
        if self.placed.is_withdrawn():
            return ModelReplacedError()
        return ExpertUnavailableError("has no known placement yet", model_id_of(self._model), 1.0)

    def _send_again(self, layer: PendingLayer, failed_parts: Sequence[FailedPart]) -> bool:
        """Send failed parts again; return false if an expert has no live copy.

        Sends at once if other actors are connected for all of them, else after a short delay.
        Raises :class:`AwayError` once the wait for a part is over.
        """
        assert layer.attempt is not None
        parts = [failed.part for failed in failed_parts]
        layer.copy_received()
        layer.failed_actors |= {part.actor_id for part in parts}
        placement, now_s = layer.attempt.placement, time.monotonic()
        replaceable = self._replaceable(placement, layer, parts, now_s, at_once=True)
        if not all(replaceable):
            layer.failed_actors = frozenset()  # no other actor can be asked
            alone = itertools.compress(failed_parts, [not other for other in replaceable])
            check_away(layer, list(alone), self._patience_s, self._pace)
            back_off(layer, self._view)
        return self._send_pairs(layer, np.sort(np.concatenate([part.pairs for part in parts])))

    def ask_again(self, layer: PendingLayer) -> bool:
        """Send again a layer's parts whose rows are not finite though its hidden states are.

        Asks another copy, or the same one if it is the only one. Returns false if there is no such
        part or it was already asked again: then the model itself produces such rows.
        """
        damaged = layer.drop_damaged_once()
        if not damaged:
            return False
        self._failures.note_not_finite(damaged)
        layer.damaged = damaged
        layer.failed_actors |= {part.actor_id for part in damaged}
        pairs = np.sort(np.concatenate([part.pairs for part in damaged]))
        if not self._send_pairs(layer, pairs):
            layer.attempt = None  # an expert has lost its last copy: the next wait returns None
        return True

    def note_mended(self, layer: PendingLayer) -> None:
        """Note that the rows of :meth:`ask_again` are finite; see :class:`Failures`."""
        self._failures.note_mended(layer)


def _layer(
    layer_id: int, rows: LayerRows, ids: np.ndarray, deadline_s: float, started_at_s: float
) -> PendingLayer:
    """Return a layer for rows [T, ...] and the gate's choice, int64 [T, K]."""
    shape, dtype = tuple(rows.shape[1:]), dtype_name(rows.dtype)
    pairs = ids.ravel(), ids.shape[1]
    return PendingLayer(layer_id, rows, shape, *pairs, dtype, deadline_s, started_at_s)


def _decoded(data: Buffer) -> Frame | FrameError:
    """Return a frame, or the error if the bytes are not one."""
    try:
        return decode(data)
    except FrameError as error:
        return error
