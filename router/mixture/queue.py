"""The requests of a mixture's router: their works, and which works a lane computes next.

A request is cut into works of at most as many rows as a step computes. Works wait in the order in
which they came; a work that waits for an expert is parked beside them. All methods are called under
the engine's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cluster.errors import ExpertMeshError, OverloadedError
from router.messages.prediction import PredictionReply, PredictionRequest
from router.moe.deaths import Deaths
from router.moe.missing import Awaited

Outcome = PredictionReply | ExpertMeshError
Outputs = dict[str, np.ndarray]


@dataclass(slots=True, eq=False)
class Job:
    """A request under way; ``done`` gets its outcome, once, on any thread."""

    request: PredictionRequest
    done: Callable[[Outcome], None]
    queued_at_s: float
    left: int = 0
    """The number of works without outputs."""
    outputs: dict[int, Outputs] = field(default_factory=dict)
    """The outputs of each finished work, by the place of its first row."""
    is_exact: bool = True
    has_ended: bool = False


@dataclass(slots=True, eq=False)
class Work:
    """Rows ``begin`` to ``end`` of a request, which a step computes together."""

    job: Job
    begin: int
    end: int
    awaited: frozenset[Awaited] = frozenset()
    """The missing experts that a parked work waits for."""
    deaths: Deaths | None = None
    """Those of expert actors at the work's rows."""

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return self.end - self.begin

    @property
    def is_suspect(self) -> bool:
        """Whether the rows may end their actors, so that they are computed alone."""
        return self.deaths is not None and self.deaths.is_suspect


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """The most requests and rows of a step, and of all that wait or are computed."""

    step_requests: int
    step_rows: int
    requests: int
    rows: int


class WorkQueue:
    """The jobs of one router, and their works that wait."""

    def __init__(self, limits: QueueLimits, rows_input: str) -> None:
        """``rows_input`` is the input whose rows go to the experts."""
        self._limits = limits
        self._rows_input = rows_input
        self.ready: deque[Work] = deque()
        self.parked: list[Work] = []
        self.jobs: dict[str, Job] = {}
        self.num_rows = 0

    def add(self, job: Job) -> None:
        """Queue a request; raises :class:`OverloadedError` where the router is full."""
        limits, num_rows = self._limits, job.request.num_rows
        if len(self.jobs) >= limits.requests:
            raise OverloadedError(f"the router holds {limits.requests} requests", "queue", 1.0)
        if self.jobs and self.num_rows + num_rows > limits.rows:
            raise OverloadedError(f"the router holds {self.num_rows} rows", "queue", 1.0)
        step = limits.step_rows
        begins = range(0, max(1, num_rows), step)  # a request without rows is one empty work
        works = [Work(job, begin, min(begin + step, num_rows)) for begin in begins]
        job.left = len(works)
        self.jobs[job.request.request_id] = job
        self.num_rows += num_rows
        self.ready.extend(works)

    def end(self, job: Job, outcome: Outcome) -> None:
        """End a request; its other works are dropped. A second end does nothing."""
        if job.has_ended:
            return
        job.has_ended = True
        del self.jobs[job.request.request_id]
        self.num_rows -= job.request.num_rows
        if job.left:  # a job that is finished has no work here
            self.ready = deque(work for work in self.ready if work.job is not job)
            self.parked = [work for work in self.parked if work.job is not job]
        job.done(outcome)

    def take(self) -> list[Work]:
        """Return the works of the next step, whose rows have one shape; they wait no longer.

        A suspect is alone in its step.
        """
        works: list[Work] = []
        left = self._limits.step_rows
        while self.ready and len(works) < self._limits.step_requests:
            work = self.ready[0]
            if works and (work.num_rows > left or self._shape(work) != self._shape(works[0])):
                break
            if works and (work.is_suspect or works[0].is_suspect):
                break
            works.append(self.ready.popleft())
            left -= work.num_rows
        return works

    def _shape(self, work: Work) -> tuple[int, ...]:
        return work.job.request.inputs[self._rows_input].shape[1:]

    def park(self, work: Work, awaited: frozenset[Awaited]) -> None:
        """Let a work wait for experts."""
        if not work.job.has_ended:
            work.awaited = awaited
            self.parked.append(work)

    def unpark(self, have_all: Callable[[frozenset[Awaited]], bool]) -> None:
        """Let the works go on whose experts are back, before all others."""
        back = [work for work in self.parked if have_all(work.awaited)]
        if back:
            self.parked = [work for work in self.parked if work not in back]
            self.ready.extendleft(reversed(back))

    def finish(self, work: Work, outputs: Outputs, is_exact: bool, identity: str) -> None:
        """Keep a work's outputs; the last work ends its request.

        A work that is finished already, or whose request has ended, is ignored: a step that failed
        late computes its works again.
        """
        job = work.job
        if job.has_ended or work.begin in job.outputs:
            return
        job.outputs[work.begin] = outputs
        job.is_exact = job.is_exact and is_exact
        job.left -= 1
        if not job.left:
            pieces = [job.outputs[begin] for begin in sorted(job.outputs)]
            whole = {name: _joined([p[name] for p in pieces]) for name in job.request.outputs}
            self.end(job, PredictionReply(whole, job.is_exact, identity))


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
