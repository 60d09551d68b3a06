"""The queue of an expert actor: the frames that wait, and their computation in batches.

The streams' thread brings the frames of all routers; a Ray call brings one frame on a thread of its
own (:mod:`experts.remote`). Each puts its frames into a bounded queue, and one thread at a time
computes: it takes all waiting frames, or where they are more than a batch the models' in turn
(:mod:`experts.fair_order`), merges them (:mod:`experts.bank`) and answers them. So a lone call
never changes threads, and many calls share an expert's product. While nothing waits the streams'
thread may compute in native code (:mod:`experts.lone`), until another one wants to. The actor has
threads because a Ray call to an asyncio actor takes 0.3 ms longer. Calls are pure: a frame that is
computed twice gets the same answer, so a router may always repeat a call.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    FrameError,
    InternalError,
    OverloadedError,
)
from cluster.transport.stream.server import ReceivedAlone
from cluster.wire.frames import (
    Buffer,
    Buffers,
    DispatchFrame,
    ErrorFrame,
    RowsFrame,
    decode,
    encode,
)
from experts.bank import ExpertBank
from experts.fair_order import FairOrder
from experts.lone import BUSY_S, FRAMES, IS_BUILT, STEPS, WAITING_ROWS, Interruption, answer_lone
from experts.self_test import SelfTest
from experts.tracing import BatchSpans

MAX_BATCH_ROWS = 1024
"""The most rows of several frames in one batch; a product of more gains nothing by sharing."""

logger = logging.getLogger("expertmesh.actor")


@dataclass(slots=True)
class _Waiting:
    """A frame in the queue."""

    frame: DispatchFrame
    since_s: float
    answer: Buffers = ()
    """Empty until the frame is computed."""


@dataclass(frozen=True, slots=True)
class _Refused:
    """A frame that is answered without the queue, by an error."""

    answer: Buffers


class FrameQueue:
    """The frames that wait for an actor's experts, and the counters of its reports.

    ``max_rows`` bounds the waiting rows; it may change at any time.
    """

    def __init__(
        self,
        bank: ExpertBank,
        actor_id: str,
        max_rows: int,
        spans: BatchSpans | None,
        is_sound: Callable[[DispatchFrame], bool],
    ) -> None:
        """Start empty; ``spans`` exports a span for each traced frame.

        ``is_sound`` is that of :class:`experts.self_test.SelfTest`.
        """
        self._bank = bank
        self._actor_id = actor_id
        self.max_rows = max_rows
        self._spans = spans
        self._order: FairOrder[_Waiting] = FairOrder()
        self._queued_rows = 0
        self._computing = False
        self._is_alone = False  # whether the streams' thread computes in native code
        self._interruption = Interruption()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._blocked = 0  # threads that wait for ``_changed``
        self.self_test = SelfTest(actor_id, self._compute_alone, is_sound, lambda: bank.experts)
        # Only the computing thread writes these counters, so they need no lock.
        self._counters = array("d", [0.0] * 4)
        self.waited_s = 0.0

    @property
    def queued_rows(self) -> int:
        """The rows that wait, and those that are computed."""
        return self._queued_rows + int(self._counters[WAITING_ROWS])

    @property
    def steps(self) -> int:
        """The number of computed batches."""
        return int(self._counters[STEPS])

    @property
    def frames(self) -> int:
        """The number of computed frames."""
        return int(self._counters[FRAMES])

    @property
    def busy_s(self) -> float:
        """The time of all batches."""
        return self._counters[BUSY_S]

    def fileno(self) -> int:
        """See :class:`cluster.transport.stream.server.AnswersAlone`."""
        return self._interruption.fileno()

    def begin_again(self) -> None:
        """See :class:`cluster.transport.stream.server.AnswersAlone`."""
        self._interruption.clear()

    def answer_alone(self, epoll_fd: int, buffers: dict[int, memoryview]) -> ReceivedAlone | None:
        """See :class:`cluster.transport.stream.server.AnswersAlone`."""
        with self._lock:
            # Another thread that waits comes first, also where it has not woken yet.
            if not IS_BUILT or self._computing or self._blocked or self._order:
                return None
            self._computing = self._is_alone = True
        try:
            return answer_lone(epoll_fd, buffers, self._bank.lone, self._counters)
        finally:
            with self._lock:
                self._computing = self._is_alone = False
                if self._blocked:
                    self._changed.notify_all()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Let no batch be computed within, after the end of the current one."""
        with self._lock:
            while self._computing:
                self._wait()
            yield

    def _compute_alone(self, frame: DispatchFrame) -> RowsFrame | ErrorFrame:
        """Compute a frame of the actor's own beside no other; raises what its experts raise.

        Where it hangs, other frames wait in the queue, by which the controller notices the hang.
        """
        with self._lock:
            while self._computing:
                self._wait()
            self._computing = True
        try:
            [answer] = self._bank.compute([frame])
        finally:
            with self._lock:
                self._computing = False
                if self._blocked:
                    self._changed.notify_all()
        return answer

    def compute_all(self, data: Sequence[Buffer]) -> Iterator[Buffers]:
        """Answer each dispatch frame, in order, by a rows frame or an error frame; never raises.

        An answer comes as soon as its batch is computed, while others still wait. The answer to a
        frame that would put more than ``max_rows`` rows into the queue is RESOURCE_EXHAUSTED;
        the router tries again.
        """
        read = [_read(buffer) for buffer in data]
        now_s = time.monotonic()
        with self._lock:
            items = [
                self._enqueue(frame, now_s) if isinstance(frame, DispatchFrame) else frame
                for frame in read
            ]
        for item in items:
            while not item.answer:
                self._compute_next(item)
            yield item.answer

    def _compute_next(self, item: _Waiting | _Refused) -> None:
        """Compute the queue's next batch, or wait for the thread that computes one.

        The batch may be without ``item``, which an earlier caller's frames precede.
        """
        with self._lock:
            # This wait is bounded: the computing thread answers every frame of its batch, also
            # after the frame's deadline.
            while self._computing and not item.answer:
                self._wait()
            if item.answer:
                return
            self._computing = True
            batch = self._order.next_batch(MAX_BATCH_ROWS)
        self._compute_and_answer(batch)

    def _wait(self) -> None:
        """Wait until the computing thread has finished its batch; under the lock."""
        self._blocked += 1
        if self._is_alone:
            self._interruption.call()
        try:
            self._changed.wait()
        finally:
            self._blocked -= 1

    def _enqueue(self, frame: DispatchFrame, now_s: float) -> _Waiting | _Refused:
        """Put a frame into the queue, or refuse it where the queue is full; under the lock."""
        waiting_rows = self._queued_rows
        if waiting_rows > 0 and waiting_rows + frame.num_rows > self.max_rows:
            error = OverloadedError(f"{waiting_rows} rows are already waiting", "queue", 0.01)
            return _Refused(_error(frame.request_id, error))
        waiting = _Waiting(frame, now_s)
        self._queued_rows += frame.num_rows
        self._order.append(waiting)
        return waiting

    def _compute_and_answer(self, batch: list[_Waiting]) -> None:
        """Compute a batch; every frame gets an answer, also after a failure."""
        answers: list[Buffers] = []
        begun_at_s = time.monotonic()
        self._counters[FRAMES] += len(batch)
        for waiting in batch:
            self.waited_s += begun_at_s - waiting.since_s
        try:
            answers = self._compute_batch(batch, begun_at_s)
        finally:
            if not answers:
                failure = InternalError("the expert actor failed to compute the batch")
                answers = [_error(w.frame.request_id, failure) for w in batch]
            self._counters[BUSY_S] += time.monotonic() - begun_at_s
            self._counters[STEPS] += 1
            with self._lock:
                for done, answer in zip(batch, answers, strict=True):
                    done.answer = answer
                    self._queued_rows -= done.frame.num_rows
                self._computing = False
                if self._blocked:
                    self._changed.notify_all()
        if self._spans is not None:
            self._spans.computed([(w.frame, w.since_s) for w in batch], begun_at_s)

    def _compute_batch(self, batch: Sequence[_Waiting], now_s: float) -> list[Buffers]:
        """Return an answer to each waiting frame, or an empty list when the batch failed."""
        is_late = [now_s - w.since_s >= w.frame.time_left_s for w in batch]
        live = [w.frame for w, late in zip(batch, is_late, strict=True) if not late]
        try:
            computed: list[RowsFrame | ErrorFrame] = self._bank.compute(live)
            self.self_test.note_computed(live, computed)
            if len(live) < len(batch):
                results = iter(computed)
                computed = [
                    _late(w.frame) if late else next(results)
                    for w, late in zip(batch, is_late, strict=True)
                ]
            return [encode(answer) for answer in computed]
        except Exception:
            # Every router of the batch gets an error, and the actor lives on.
            logger.exception("expert actor %s: a batch failed", self._actor_id)
            self.self_test.note_failed(live)
            return []


def _read(data: Buffer) -> DispatchFrame | _Refused:
    """Return a dispatch frame, or the refusal of any other bytes."""
    try:
        frame = decode(data)
        if not isinstance(frame, DispatchFrame):
            raise FrameError("only dispatch frames are computed", "frame.kind")
    except FrameError as error:
        return _Refused(_error(0, error))
    return frame


def _late(frame: DispatchFrame) -> ErrorFrame:
    error = DeadlineExceededError("the frame's deadline passed before it was computed")
    return ErrorFrame(frame.request_id, type(error).__name__, error)


def _error(request_id: int, error: ExpertMeshError) -> Buffers:
    return encode(ErrorFrame(request_id, type(error).__name__, error))
