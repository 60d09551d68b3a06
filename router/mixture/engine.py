"""The engine of a mixture's router: lanes that turn queued rows into predictions.

Each lane is a thread with a dispatcher and connections of its own. It takes the works that wait, of
any requests, and computes them in one step: gate, experts, combination. A step waits for its
experts alone, so that requests for the experts of other devices go on in other lanes. One more
thread ends requests whose time is over, and lets parked works go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from cluster.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    ExpertMeshError,
    ExpertUnavailableError,
    InternalError,
    ModelReplacedError,
)
from cluster.wire.tensors import TORCH_DTYPES
from experts.mixture.spec import MixtureSpec
from router.messages.prediction import PredictionRequest
from router.mixture.combine import combined
from router.mixture.gate import MixtureGate
from router.mixture.gather import GatheredRows
from router.mixture.queue import Job, Outcome, Outputs, Work, WorkQueue
from router.mixture.stats import MixtureTally
from router.moe.layer import MoELayers, StepContext
from router.moe.permute import PlacedModel
from router.moe.shared_load import SharedLoad

LAYER = 0
"""The only layer of a mixture."""
CHECK_S = 0.02
"""How late the engine may notice that a request's time is over, or a new placement."""
CLOSE_S = 1.0

logger = logging.getLogger("expertmesh.mixture")


class MixtureEngine:
    """Predicts for one mixture; all public methods may be called from any thread."""

    def __init__(
        self,
        spec: MixtureSpec,
        gate: MixtureGate,
        placed: PlacedModel,
        lanes: Sequence[MoELayers[GatheredRows]],
        queue: WorkQueue,
        load: SharedLoad,
        identity: str,
        is_exact: bool = True,
    ) -> None:
        """``placed`` is for the engine's own thread; each lane has its own.

        ``load`` is that of the lanes' dispatchers.

        Without ``is_exact``, experts are emulated, and every reply is flagged as not exact.
        """
        self._spec = spec
        self._gate = gate
        self._placed = placed
        self._queue = queue
        self._load = load
        self._identity = identity
        self._is_exact = is_exact
        self._changed = threading.Condition()
        self._may_run = False
        self._closing = False
        self.tally = MixtureTally()
        self._threads = [threading.Thread(target=self._keep, name="mixture", daemon=True)] + [
            threading.Thread(target=self._run_lane, args=(layers,), name=f"lane {i}", daemon=True)
            for i, layers in enumerate(lanes)
        ]

    def start(self) -> None:
        """Run on daemon threads."""
        for thread in self._threads:
            thread.start()

    def is_alive(self) -> bool:
        """Return whether all threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """End the threads after their current steps; waits for them, at most ``CLOSE_S``."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        until_s = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    def submit(self, request: PredictionRequest, done: Callable[[Outcome], None]) -> None:
        """Queue a request; ``done`` gets its outcome, on any thread.

        Raises :class:`OverloadedError` where the router is full.
        """
        with self._changed:
            self._queue.add(Job(request, done, time.monotonic()))
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """End a request with a cancellation; one that has ended is ignored."""
        with self._changed:
            job = self._queue.jobs.get(request_id)
            if job is not None:
                self._queue.end(job, CancelledRequestError("the request was cancelled"))

    def _keep(self) -> None:
        """End requests whose time is over and let works go on, until :meth:`close`."""
        while not self._closing:
            is_placed, is_withdrawn = self._placed.is_placed(), self._placed.is_withdrawn()
            with self._changed:
                self._may_run = is_placed
                self._expire(is_withdrawn)
                self._queue.unpark(self._placed.have_all)
                if is_placed and self._queue.ready:
                    self._changed.notify_all()
            time.sleep(CHECK_S)

    def _expire(self, is_withdrawn: bool) -> None:
        now_s = time.monotonic()
        waiting = {work.job: work for work in self._queue.parked}
        for job in list(self._queue.jobs.values()):
            if is_withdrawn:
                self._queue.end(job, ModelReplacedError())
            elif job.request.deadline_s <= now_s:
                self._queue.end(job, self._late(waiting.get(job)))

    def _late(self, parked: Work | None) -> ExpertMeshError:
        """Return the error of a request whose time is over, and that may have a parked work."""
        if not self._may_run:
            return ExpertUnavailableError("no placement of the experts is known yet", "", 1.0)
        if parked is None:
            return DeadlineExceededError("the request's deadline passed")
        names = [self._spec.expert_names[expert_id] for _, expert_id in sorted(parked.awaited)]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        message = f"expert {names[0]!r}{more} had no live copy until the deadline"
        return ExpertUnavailableError(message, parked.job.request.model, 1.0)

    def _run_lane(self, layers: MoELayers[GatheredRows]) -> None:
        torch.set_grad_enabled(False)
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing or (self._may_run and bool(self._queue.ready))
                )
                if self._closing:
                    return
                works = self._queue.take()
                self.tally.taken(works, time.monotonic())
            self._guarded_step(layers, works)
            self._load.received()

    def _guarded_step(self, layers: MoELayers[GatheredRows], works: Sequence[Work]) -> None:
        """Compute works; when a step fails, each of its works is computed alone.

        So the rows that make an expert or the gate fail end their own request alone.
        """
        try:
            self._step(layers, works)
        except Exception as error:
            if len(works) > 1:
                for work in works:
                    if not work.job.has_ended:
                        self._guarded_step(layers, [work])
                return
            if not isinstance(error, ExpertMeshError):
                logger.exception("a step failed; its request is answered by an error")
                error = InternalError("the router failed to compute a step")
            self._end(works[0].job, error)

    def _step(self, layers: MoELayers[GatheredRows], works: Sequence[Work]) -> None:
        inputs = _inputs_of(works)
        first_row = works[0].begin  # an error names the row; of several works none is shown
        choice = self._gate.choose(inputs, first_row)
        given = torch.from_numpy(inputs[self._spec.rows_input.name])
        rows = given.to(TORCH_DTYPES[self._spec.dtype])
        context = StepContext(
            deadline_s=min(work.job.request.deadline_s for work in works),
            sizes=[work.num_rows for work in works],
            contracts=[work.job.request.on_expert_loss for work in works],
            needs_an_expert=True,
        )
        among = self._gate.among(inputs, first_row)
        gathered = layers.finish(layers.begin(context, LAYER, rows, choice, among))
        with self._changed:
            self.tally.stepped(context.layer_times_s, len(rows))
            if context.missing is not None:
                self.tally.inexact_rows += context.missing.rows_by_contract()
        begin = 0
        for index, work in enumerate(works):
            end = begin + work.num_rows
            self._finish(work, context, index, gathered, slice(begin, end))
            begin = end

    def _finish(
        self,
        work: Work,
        context: StepContext,
        index: int,
        gathered: GatheredRows,
        rows: slice,
    ) -> None:
        """Combine a work's rows, or park the work where it waits for experts."""
        missing = context.missing
        if missing is not None and index in missing.awaited:
            with self._changed:
                self._queue.park(work, missing.awaited[index])
            return
        is_exact = self._is_exact and (missing is None or index not in missing.inexact)
        try:
            outputs = self._combined(work, gathered, rows)
        except ExpertMeshError as error:
            self._end(work.job, error)
            return
        with self._changed:
            self._queue.finish(work, outputs, is_exact, self._identity)

    def _combined(self, work: Work, gathered: GatheredRows, rows: slice) -> Outputs:
        request, choice = work.job.request, gathered.choice
        inputs = {name: array[work.begin : work.end] for name, array in request.inputs.items()}
        return combined(
            self._spec,
            gathered.rows[rows],
            choice.weights[rows],
            choice.ids[rows],
            gathered.is_present[rows],
            inputs,
            request.outputs,
            work.begin,
        )

    def _end(self, job: Job, error: ExpertMeshError) -> None:
        with self._changed:
            self._queue.end(job, error)


def _inputs_of(works: Sequence[Work]) -> dict[str, np.ndarray]:
    """Return the inputs of all works' rows, one after the other; those that every work has."""
    parts = [
        {name: array[work.begin : work.end] for name, array in work.job.request.inputs.items()}
        for work in works
    ]
    if len(parts) == 1:
        return parts[0]
    names = set.intersection(*(set(part) for part in parts))
    return {name: np.concatenate([part[name] for part in parts]) for name in names}
