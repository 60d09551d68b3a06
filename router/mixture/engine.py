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

from cluster.device import end_process
from cluster.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    ExpertMeshError,
    ExpertUnavailableError,
    ModelReplacedError,
    PoisonedRequestError,
)
from cluster.wire.tensors import TORCH_DTYPES
from experts.mixture.spec import MixtureSpec
from router.messages.prediction import PredictionRequest
from router.mixture.combine import combined
from router.mixture.gate import MixtureGate
from router.mixture.gather import GatheredRows
from router.mixture.queue import Job, Outcome, Outputs, Work, WorkQueue
from router.mixture.stats import MixtureTally
from router.moe.deaths import ActorsDiedError, died_at
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
        self._known_row: dict[str, np.ndarray] | None = None
        """The inputs of a row that the gate has taken."""
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
                if is_placed and self._queue.has_ready:
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
                    lambda: self._closing or (self._may_run and self._queue.has_ready)
                )
                if self._closing:
                    return
                works = self._queue.take()
                self.tally.taken(works, time.monotonic())
            self._guarded_step(layers, works)
            self._load.received()

    def _guarded_step(self, layers: MoELayers[GatheredRows], works: Sequence[Work]) -> None:
        """Compute works; when a step fails, halves of its works are computed.

        So the rows that make an expert or the gate fail end their own request alone. When actors
        have died twice, each work is computed alone.
        """
        try:
            self._step(layers, works)
            return
        except Exception as caught:
            error = caught
        deaths = works[0].deaths
        if isinstance(error, ActorsDiedError):
            if len(works) > 1 or deaths is None or not deaths.is_guilty:
                self._compute_parts(layers, [[work] for work in works])
                return
            error = died_at(deaths)
        elif len(works) > 1:
            half = len(works) // 2
            self._compute_parts(layers, [works[:half], works[half:]])
            return
        if not isinstance(error, ExpertMeshError):
            logger.error("a step failed; its request is answered by an error", exc_info=error)
            self._check_gate()
            message = f"the router cannot compute this request ({type(error).__name__})"
            error = PoisonedRequestError(message)
        self._end(works[0].job, error)

    def _check_gate(self) -> None:
        """End the router where its gate no longer takes a row that it has taken before."""
        if self._known_row is None:
            return
        try:
            self._gate.choose(self._known_row, 0)
        except Exception as error:
            # Gateways send its requests to other routers.
            logger.critical("the router exits: it cannot compute any step (%r)", error)
            end_process()

    def _compute_parts(
        self, layers: MoELayers[GatheredRows], parts: Sequence[Sequence[Work]]
    ) -> None:
        """Compute the works of each part whose requests have not ended, one part after another."""
        for part in parts:
            works = [work for work in part if not work.job.has_ended]
            if works:
                self._guarded_step(layers, works)

    def _step(self, layers: MoELayers[GatheredRows], works: Sequence[Work]) -> None:
        inputs = _inputs_of(works)
        first_row = works[0].begin  # an error names the row; of several works none is shown
        choice = self._gate.choose(inputs, first_row)
        if self._known_row is None and works[0].num_rows:
            self._known_row = {name: array[:1].copy() for name, array in inputs.items()}
        given = torch.from_numpy(inputs[self._spec.rows_input.name])
        rows = given.to(TORCH_DTYPES[self._spec.dtype])
        context = StepContext(
            deadline_s=min(work.job.request.deadline_s for work in works),
            sizes=[work.num_rows for work in works],
            contracts=[work.job.request.on_expert_loss for work in works],
            needs_an_expert=True,
            known_deaths=[work.deaths for work in works],
            is_isolated=any(work.is_suspect for work in works),
        )
        reselect = self._gate.reselect(inputs, first_row)
        try:
            gathered = layers.finish(layers.begin(context, LAYER, rows, choice, reselect))
        finally:
            if context.deaths is not None:
                for work, deaths in zip(works, context.deaths.of_chunks, strict=True):
                    work.deaths = deaths
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
