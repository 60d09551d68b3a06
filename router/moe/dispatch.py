"""Dispatch: send each token's row to the actors that hold its experts, and bring the rows back.

One frame per actor per layer. Where an actor is dead, hung, overloaded or under another placement,
its frame alone is built again and sent again: at once where its experts have other copies
(:mod:`router.moe.copy_choice` chooses), else under the then-current placement, until the deadline.
Calls are pure, so that is safe. Runs on the engine's thread.

Dimension letters: T tokens, K experts per token, H hidden size, P = T*K pairs.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from cluster.errors import (
    Code,
    DeadlineExceededError,
    ExpertMeshError,
    ExpertUnavailableError,
    FrameError,
    InternalError,
)
from cluster.placement.placement import Placement
from cluster.transport.base import Call, CallFailure, Flight, Outcome, Transport
from cluster.wire.frames import (
    ROWS_HEADER,
    DispatchFrame,
    ErrorFrame,
    RowsFrame,
    decode,
    encode,
    joined,
)
from cluster.wire.tensors import dtype_name
from router.control.placement_view import PlacementView
from router.moe.combine import Received
from router.moe.copy_choice import Copies, Pace, has_other_copies
from router.moe.layout import Layout, Part, lay_out, split
from router.moe.missing import LostExperts
from router.moe.permute import gather
from router.retry import RetryPolicy

BACKOFF = RetryPolicy(first_delay_s=0.02, max_delay_s=0.2)
"""Between attempts where every expert has a copy."""
MAX_REFUSALS = 3
"""So often the same experts' rows are refused as malformed before that counts as our own fault."""
LATE_S = 0.5
"""An answer that the deadline cuts off sooner is not late: the request's time was simply over."""

logger = logging.getLogger("expertmesh.dispatch")


_Sent = tuple[Part, DispatchFrame, Call]


@dataclass(slots=True)
class _Attempt:
    """Parts under way: under which placement's epoch, since when, and the most rows of one."""

    epoch: int
    sent_s: float
    most_rows: int
    flights: list[tuple[list[_Sent], Flight]] = field(default_factory=list)


@dataclass(slots=True)
class _Layer:
    """One layer's work. Pair t * K + r is token t with the expert that the gate put at rank r.

    ``rows`` are [T, H].
    """

    layer_id: int
    rows: torch.Tensor
    expert_ids: np.ndarray
    k: int
    dtype: str
    deadline_s: float
    traceparent: str | None
    received: list[Received] = field(default_factory=list)
    failed: frozenset[str] = frozenset()
    """Actors that failed in this layer; they are asked again only where there is no other."""
    refusals: tuple[int, ...] = ()
    """The experts whose rows were refused as malformed, as often as they were."""

    def keep(self) -> None:
        """Copy what was received: the transport's next wait may use its memory again."""
        self.received = [Received(one.pairs, bytes(one.rows)) for one in self.received]


def _nothing() -> None:
    """Do nothing meanwhile."""


class Dispatcher:
    """Dispatches the layers of one model; one per router replica, used by one thread."""

    def __init__(
        self,
        model: str,
        view: PlacementView,
        transport: Transport,
        suspect: Callable[[str, int], None],
        call_timeout_s: float,
    ) -> None:
        """``suspect`` is told (actor_id, generation) of an actor that has not answered."""
        self._model = model
        self._view = view
        self._transport = transport
        self._suspect = suspect
        self._call_timeout_s = call_timeout_s
        self._request_ids = itertools.count(1)
        self._laid_out: Placement | None = None
        self._layouts: dict[int, Layout] = {}
        self._holders: dict[int, list[tuple[str, ...]]] = {}
        self._copies = Copies()
        self._pace = Pace()
        self.retries: Counter[str] = Counter()
        self.calls = transport.calls
        self.lost = LostExperts(model, view)

    def dispatch(
        self,
        layer_id: int,
        hidden_states: torch.Tensor,
        topk_ids: np.ndarray,
        deadline_s: float,
        pairs: np.ndarray | None = None,
        traceparent: str | None = None,
        meanwhile: Callable[[], None] = _nothing,
    ) -> list[Received] | None:
        """Return the experts' unweighted rows for hidden states [T, H].

        Pair t * K + r is token t with expert ``topk_ids[t, r]``, the gate's choices as they are
        [T, K]. An expert gets its rows by rank, then by token, as transformers' eager experts do,
        since a row's bits depend on its place in the product. Only ``pairs`` are computed where
        they are given. What is returned lasts until the next call. ``traceparent`` goes along with
        the frames of a layer that is traced. ``meanwhile`` is called once before
        rows are returned, while the experts compute.
        Returns ``None`` when an expert has no live copy: what is then to be done is the caller's
        business. Raises :class:`ExpertUnavailableError` when not every share could be had before
        ``deadline_s`` (wall clock), and :class:`DeadlineExceededError` where that was no expert's
        fault.
        """
        rows = hidden_states if hidden_states.is_cpu else hidden_states.cpu()
        layer = _Layer(
            layer_id=layer_id,
            rows=rows,
            expert_ids=topk_ids.ravel(),
            k=topk_ids.shape[1],
            dtype=dtype_name(hidden_states.dtype),
            deadline_s=deadline_s,
            traceparent=traceparent,
        )
        pending = pairs
        failures, started_s = 0, time.time()
        while True:
            if time.time() >= deadline_s:
                raise self._late(failures, started_s)
            placement = self._placement(deadline_s)
            layout = self._layout(placement, layer, pending)
            ordered, parts, homeless = split(layout, layer.expert_ids, layer.k, pending)
            if len(homeless):
                return None
            attempt = self._begin(placement, layer, ordered, parts)
            meanwhile()
            meanwhile = _nothing
            failed = self._finish(layer, attempt)
            if not failed:
                return layer.received
            layer.keep()
            layer.failed |= {part.actor_id for part in failed}
            if not all(self._others(placement, layer, failed)):
                layer.failed = frozenset()
                if time.time() < deadline_s:
                    self._wait(placement, deadline_s, failures)
                    failures += 1
            pending = np.sort(np.concatenate([part.pairs for part in failed]))

    def _placement(self, deadline_s: float) -> Placement:
        placement = self._view.current()
        if placement is None and self._view.wait_newer(None, max(0.0, deadline_s - time.time())):
            placement = self._view.current()
        if placement is None:
            raise ExpertUnavailableError("no placement is known yet", self._model, 1.0)
        return placement

    def _layout(self, placement: Placement, layer: _Layer, pending: np.ndarray | None) -> Layout:
        """Return the layer's layout: a kept one where no expert has more than one copy."""
        holders = self._holders_of(placement, layer.layer_id)
        layout = self._layouts.get(layer.layer_id)
        if layout is not None:
            return layout
        if all(len(actors) < 2 for actors in holders):
            only = {e: actors[0] if actors else None for e, actors in enumerate(holders)}
            layout = self._layouts[layer.layer_id] = lay_out(only, placement.generations)
            return layout
        asked = layer.expert_ids if pending is None else layer.expert_ids[pending]
        counts = np.bincount(asked, minlength=len(holders)).tolist()
        shunned = self._shunned(placement, layer)
        chosen = self._copies.choose(holders, counts, shunned | self._unready(placement, shunned))
        return lay_out(dict(enumerate(chosen)), placement.generations)

    def _holders_of(self, placement: Placement, layer_id: int) -> list[tuple[str, ...]]:
        """Return the actors of each expert of a layer; kept for as long as the placement lasts."""
        if self._laid_out is not placement:
            self._laid_out, self._layouts, self._holders = placement, {}, {}
        holders = self._holders.get(layer_id)
        if holders is None:
            actors_of = {
                key.expert_id: actors
                for key, actors in placement.holders.items()
                if (key.model, key.layer_id) == (self._model, layer_id)
            }
            holders = self._holders[layer_id] = [actors_of[e] for e in range(len(actors_of))]
        return holders

    def _shunned(self, placement: Placement, layer: _Layer) -> frozenset[str]:
        """Return the actors to be asked only where there is no other."""
        return self._copies.avoided(placement.generations, time.monotonic()) | layer.failed

    def _unready(self, placement: Placement, shunned: Set[str]) -> frozenset[str]:
        """Return the actors, of those that are not shunned, that no call should wait for yet."""
        return frozenset(
            actor_id
            for actor_id, generation in placement.generations.items()
            if actor_id not in shunned and not self._transport.is_ready(actor_id, generation)
        )

    def _others(self, placement: Placement, layer: _Layer, parts: Sequence[Part]) -> Sequence[bool]:
        """Tell of each part whether others can do its work."""
        if layer.layer_id in self._layouts:  # no expert has a second copy
            return [False] * len(parts)
        return [self._has_other(placement, layer, part) for part in parts]

    def _has_other(self, placement: Placement, layer: _Layer, part: Part) -> bool:
        """Tell whether other actors hold all experts of a part and have not failed lately."""
        holders = self._holders_of(placement, layer.layer_id)
        shunned = self._shunned(placement, layer)
        return has_other_copies(holders, part.expert_ids, part.actor_id, shunned)

    def _is_gone(self, epoch: int, call: Call) -> bool:
        """Tell whether the newest placement has given up the actor that a call went to.

        ``epoch`` is that of the placement that the call was made under: a new controller may not
        know the actor yet, and then nothing is said against it.
        """
        placement = self._view.current()
        if placement is None:
            return False
        generation = placement.generations.get(call.actor_id)
        return placement.epoch == epoch if generation is None else generation != call.generation

    def _is_given_up(self, epoch: int, most_rows: int, sent_s: float, call: Call) -> bool:
        """Tell whether to wait no longer for a call, as :meth:`_is_gone` does.

        Has the controller look at an actor that takes longer than answers do; meanwhile the wait
        goes on.
        """
        if time.time() - sent_s >= self._pace.stall_s(most_rows):
            self._suspect(call.actor_id, call.generation)
        return self._is_gone(epoch, call)

    def _begin(
        self, placement: Placement, layer: _Layer, ordered: np.ndarray, parts: Sequence[Part]
    ) -> _Attempt:
        """Send every part once."""
        now_s = time.time()
        attempt = _Attempt(
            placement.epoch, now_s, max([len(one.pairs) for one in parts], default=0)
        )
        if not parts:
            return attempt
        timeout_s = max(0.0, min(self._call_timeout_s, layer.deadline_s - now_s))
        # Where others can do its work, an actor that does not answer is given up early.
        others = self._others(placement, layer, parts)
        hurried_s = timeout_s
        if any(others):
            hurried_s = min(timeout_s, self._pace.stall_s(attempt.most_rows))
        # All parts' rows at once; each part's are a piece of them.
        rows = gather(layer.rows, ordered, layer.k)
        row_bytes = len(rows) // len(ordered)
        same = placement.epoch, placement.version, self._model, layer.layer_id
        hidden_size = layer.rows.shape[1]
        hurried: list[_Sent] = []
        patient: list[_Sent] = []
        begin = 0
        for part, has_other in zip(parts, others, strict=True):
            actor_id, generation, expert_ids, counts, pairs = part
            end = begin + len(pairs) * row_bytes
            frame = DispatchFrame(
                next(self._request_ids),
                *same,
                expert_ids,
                counts,
                layer.dtype,
                hidden_size,
                now_s + (hurried_s if has_other else timeout_s),
                rows[begin:end],
                layer.traceparent,
            )
            call = Call(actor_id, generation, encode(frame), has_other)
            (hurried if has_other else patient).append((part, frame, call))
            begin = end
        for sent, limit_s in ((hurried, hurried_s), (patient, timeout_s)):
            if sent:
                flight = self._transport.begin([call for _, _, call in sent], limit_s)
                attempt.flights.append((sent, flight))
        return attempt

    def _finish(self, layer: _Layer, attempt: _Attempt) -> list[Part]:
        """Take the answers; return the parts that got none."""
        is_given_up = partial(self._is_given_up, attempt.epoch, attempt.most_rows, attempt.sent_s)
        failed: list[Part] = []
        for sent, flight in attempt.flights:
            layer.keep()
            outcomes = flight.wait(is_given_up)
            failed += [
                part
                for (part, frame, _), outcome in zip(sent, outcomes, strict=True)
                if not self._take(layer, part, frame, outcome)
            ]
        if attempt.flights and not failed:
            self._pace.note(attempt.most_rows, time.time() - attempt.sent_s)
        return failed

    def _take(self, layer: _Layer, part: Part, sent: DispatchFrame, outcome: Outcome) -> bool:
        if isinstance(outcome, CallFailure):
            self.retries[outcome.value] += 1
            self._copies.avoid(part.actor_id, part.generation, time.monotonic())
            self._suspect(part.actor_id, part.generation)
            return False
        try:
            answer = decode(outcome)
        except FrameError as error:
            return self._damaged(part, error)
        if isinstance(answer, ErrorFrame):
            return self._refused(layer, part, answer)
        expected = (sent.request_id, sent.dtype, len(part.pairs), sent.hidden_size)
        if not isinstance(answer, RowsFrame) or answer[:ROWS_HEADER] != expected:
            return self._damaged(part, "the answer is not the call's")
        layer.received.append(Received(part.pairs, joined(answer.rows)))
        return True

    def _refused(self, layer: _Layer, part: Part, answer: ErrorFrame) -> bool:
        """Count a refusal; raises for a frame that is malformed whichever way it goes.

        One that was damaged on its way is sent again.
        """
        if answer.error.code is not Code.INVALID_ARGUMENT:
            self.retries[answer.kind] += 1
            return False
        layer.refusals += part.expert_ids
        if max(map(layer.refusals.count, part.expert_ids)) >= MAX_REFUSALS:
            logger.error("%s refused a frame: %s", part.actor_id, answer.error)
            raise InternalError("expert actors refuse a frame as malformed")
        return self._damaged(part, answer.error)

    def _damaged(self, part: Part, what: object) -> bool:
        """Count a frame that was damaged on its way to or from an actor."""
        logger.warning("%s g%d, a damaged frame: %s", part.actor_id, part.generation, what)
        self.retries["malformed"] += 1
        self._transport.renew(part.actor_id)
        return False

    def _late(self, failures: int, started_s: float) -> ExpertMeshError:
        """Return what to say when the deadline passes: whether it is an expert's fault."""
        if failures or time.time() - started_s >= LATE_S:
            return ExpertUnavailableError(
                "an expert has no live copy that answers in time", self._model, 1.0
            )
        return DeadlineExceededError("the request's deadline passed")

    def _wait(self, placement: Placement, deadline_s: float, failures: int) -> None:
        """Wait a moment for another placement."""
        remaining_s = max(0.0, deadline_s - time.time())
        wait_s = BACKOFF.delay_s(failures, random.random()) or 0.0
        self._view.wait_newer(placement, min(wait_s, remaining_s))
