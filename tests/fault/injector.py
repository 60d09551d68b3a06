"""Carries a schedule of faults out on a running cluster, and proves that each of them hit.

Used by the chaos test and by ``benchmarks.soak``, so nothing here knows of pytest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

from cluster.errors import ExpertMeshError
from cluster.reports import ClusterStatus
from tests.fault.schedule import Fault, Kind
from tests.fault.signals import is_running, is_stopped, kill, let_go, stopped

ASK_S = 60.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Hit:
    """A fault that was carried out: on which pid, and how long after the start."""

    fault: Fault
    pid: int
    at_s: float


def inject(
    faults: Iterable[Fault],
    status: Callable[[], ClusterStatus],
    told: Callable[[Hit], None] = lambda hit: None,
    redeploy: Callable[[], None] | None = None,
) -> list[Hit]:
    """Carry out all faults in order, each when it is due or as soon after as it can be; blocks.

    A fault waits until the controller answers and names a living victim; one on an expert actor
    also until every expert has a copy, since faults that came faster than copies come back would
    starve every request. ``redeploy`` returns when other weights serve and the old ones are gone;
    no process is stopped meanwhile. ``told`` hears of every hit. Raises ``AssertionError`` when a
    victim is not seen killed or stopped, or when there is none for ``ASK_S``.
    """
    pause, started_s = threading.Event(), time.monotonic()
    hits: list[Hit] = []
    with ExitStack() as hung, ThreadPoolExecutor() as waiting:
        going_on = []
        for fault in faults:
            pause.wait(max(0.0, started_s + due_s(fault, hits) - time.monotonic()))
            if fault.kind is Kind.REDEPLOY:
                assert redeploy is not None
                for one in going_on:
                    one.result()
                _victim(
                    replace(fault, kind=Kind.KILL_ACTOR), status, pause
                )  # all experts are there
                redeploy()
                hits.append(Hit(fault, 0, time.monotonic() - started_s))
                told(hits[-1])
                continue
            known, pid = _victim(fault, status, pause)
            hits.append(Hit(fault, pid, time.monotonic() - started_s))
            told(hits[-1])
            if fault.kind is Kind.PAUSE_ACTOR:
                hung.enter_context(stopped(known, pid))
                going_on.append(waiting.submit(_go_on, known, pid, fault.pause_s))
            else:
                kill(known, pid)
        for one in going_on:
            one.result()
    return hits


def due_s(fault: Fault, hits: Sequence[Hit]) -> float:
    """Return when a fault is due: at its time, or as much later as the one before it was late.

    So faults never come in bursts, however long one has to wait for a victim.
    """
    return fault.at_s + (hits[-1].at_s - hits[-1].fault.at_s if hits else 0.0)


def _go_on(known: ClusterStatus, pid: int, pause_s: float) -> None:
    """Let a stopped process go on after a while, unless the controller has replaced it."""
    threading.Event().wait(pause_s)
    if is_stopped(pid):
        let_go(known, pid)


def _victim(
    fault: Fault, status: Callable[[], ClusterStatus], pause: threading.Event
) -> tuple[ClusterStatus, int]:
    deadline_s = time.monotonic() + ASK_S
    while time.monotonic() < deadline_s:
        try:
            known = status()
        except ExpertMeshError:  # the controller is away, by the fault before
            pause.wait(_POLL_S)
            continue
        pids = sorted(filter(_goes_on, victims(known, fault.kind)))
        if pids:
            return known, pids[fault.choice % len(pids)]
        pause.wait(_POLL_S)
    raise AssertionError(f"no victim to {fault.kind.value} within {ASK_S} s")


def _goes_on(pid: int) -> bool:
    return is_running(pid) and not is_stopped(pid)


def victims(known: ClusterStatus, kind: Kind) -> Sequence[int]:
    """Return the pids that a fault of this kind may hit now."""
    if kind is Kind.KILL_CONTROLLER:
        return (known.controller_pid,)
    if kind is Kind.KILL_ROUTER:
        return tuple(router.pid for router in known.routers)
    return tuple(actor.pid for actor in known.actors) if not known.missing_experts else ()
