"""The requests of a mixture's router: their works, and which works a lane computes next.

A request is cut into works of at most as many rows as a step computes. Works wait by the turns of
their tenants (:mod:`router.config.tenants`), those of one tenant in the order in which they came; a
work that waits for an expert is parked beside them. All methods are called under the engine's lock.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.errors import ExpertMeshError, OverloadedError
from router.config.tenants import TenantTurns
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


class _Ready:
    """The works that a step may take, and which of them is next.

    First come those that go on after they were parked: their tenants have paid for them. The others
    come by the turns of their tenants. A work costs its rows, and at least what there is in a step
    for each of the most requests that it takes. So a round is no more than a step.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self._turns = TenantTurns(limits.step_rows)
        self._least_cost = -(-limits.step_rows // limits.step_requests)
        self._going_on: deque[Work] = deque()
        self._of_tenant: dict[str, deque[Work]] = {}

    def __bool__(self) -> bool:
        return bool(self._going_on or self._of_tenant)

    def works(self) -> list[Work]:
        """Return all of them, by tenant; may be called on any thread."""
        queues = [self._going_on, *list(self._of_tenant.values())]
        return [work for queue in queues for work in list(queue)]

    def add(self, tenant: str, works: Sequence[Work]) -> None:
        """Let new works of a tenant wait."""
        self._of_tenant.setdefault(tenant, deque()).extend(works)

    def go_on(self, works: Sequence[Work]) -> None:
        """Let works that were parked come before all others."""
        self._going_on.extendleft(reversed(works))

    def first(self) -> Work:
        """Return the work that is next; there is one."""
        return self._going_on[0] if self._going_on else self._of_tenant[self._next_tenant()][0]

    def pop(self) -> Work:
        """Return the work that is next, which waits no longer."""
        if self._going_on:
            return self._going_on.popleft()
        tenant = self._next_tenant()
        work = self._of_tenant[tenant].popleft()
        self._turns.spend(tenant, self._cost(work))
        self._forget_empty(tenant)
        return work

    def drop(self, job: Job) -> None:
        """Let no work of a job wait any longer."""
        tenant = job.request.tenant
        self._going_on = deque(work for work in self._going_on if work.job is not job)
        if tenant in self._of_tenant:
            left = deque(work for work in self._of_tenant[tenant] if work.job is not job)
            self._of_tenant[tenant] = left
            self._forget_empty(tenant)

    def _next_tenant(self) -> str:
        if len(self._of_tenant) == 1:
            self._turns.keep(self._of_tenant)
            return next(iter(self._of_tenant))
        turns = self._turns.turns({t: [self._cost(q[0])] for t, q in self._of_tenant.items()})
        return min(turns, key=lambda tenant: turns[tenant][0])

    def _cost(self, work: Work) -> int:
        return max(work.num_rows, self._least_cost)

    def _forget_empty(self, tenant: str) -> None:
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]
        if not self._of_tenant:
            self._turns.keep(())


class WorkQueue:
    """The jobs of one router, and their works that wait."""

    def __init__(self, limits: QueueLimits, rows_input: str) -> None:
        """``rows_input`` is the input whose rows go to the experts."""
        self._limits = limits
        self._rows_input = rows_input
        self._ready = _Ready(limits)
        self._num_of_tenant: Counter[str] = Counter()
        self.parked: list[Work] = []
        self.jobs: dict[str, Job] = {}
        self.num_rows = 0

    @property
    def has_ready(self) -> bool:
        """Whether a step has something to compute."""
        return bool(self._ready)

    def ready(self) -> list[Work]:
        """Return the works that wait for a step alone; may be called on any thread."""
        return self._ready.works()

    def add(self, job: Job) -> None:
        """Queue a request.

        Raises :class:`OverloadedError` where the router is full. The only request of a tenant may
        exceed the limits, so that no other tenant fills the queue for it.
        """
        num_rows, tenant = job.request.num_rows, job.request.tenant
        self._check_room(tenant, num_rows)
        step = self._limits.step_rows
        begins = range(0, max(1, num_rows), step)  # a request without rows is one empty work
        works = [Work(job, begin, min(begin + step, num_rows)) for begin in begins]
        job.left = len(works)
        self.jobs[job.request.request_id] = job
        self.num_rows += num_rows
        self._num_of_tenant[tenant] += 1
        self._ready.add(tenant, works)

    def _check_room(self, tenant: str, num_rows: int) -> None:
        limits = self._limits
        if tenant not in self._num_of_tenant:
            return
        if len(self.jobs) >= limits.requests:
            raise OverloadedError(f"is full: {len(self.jobs)} requests in flight", "queue", 1.0)
        if self.num_rows + num_rows > limits.rows:
            raise OverloadedError(f"is full: {self.num_rows} rows in flight", "queue", 1.0)

    def end(self, job: Job, outcome: Outcome) -> None:
        """End a request; its other works are dropped. A second end does nothing."""
        if job.has_ended:
            return
        job.has_ended = True
        del self.jobs[job.request.request_id]
        self.num_rows -= job.request.num_rows
        self._num_of_tenant[job.request.tenant] -= 1
        if not self._num_of_tenant[job.request.tenant]:
            del self._num_of_tenant[job.request.tenant]
        if job.left:  # a job that is finished has no work here
            self._ready.drop(job)
            self.parked = [work for work in self.parked if work.job is not job]
        job.done(outcome)

    def take(self) -> list[Work]:
        """Return the works of the next step, whose rows have one shape; they wait no longer.

        A suspect is alone in its step.
        """
        works: list[Work] = []
        left = self._limits.step_rows
        while self._ready and len(works) < self._limits.step_requests:
            work = self._ready.first()
            if works and (work.num_rows > left or self._shape(work) != self._shape(works[0])):
                break
            if works and (work.is_suspect or works[0].is_suspect):
                break
            works.append(self._ready.pop())
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
            self._ready.go_on(back)

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
