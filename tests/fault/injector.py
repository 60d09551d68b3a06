"""Carries a schedule of faults out on a running cluster, and proves that each of them hit.

Used by the chaos test and by ``benchmarks.soak``, so nothing here knows of pytest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.errors import ExpertMeshError
from cluster.status import ClusterStatus
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
) -> list[Hit]:
    """Carry out all faults in order, each at its time or as soon after as it can be; blocks.

    A fault waits until the controller answers and names a living victim; one on an expert actor
    also until every expert has a copy, since faults that came faster than copies come back would
    starve every request. ``told`` hears of every hit. Raises ``AssertionError`` when a victim is
    not seen killed or stopped, or when there is none for ``ASK_S``.
    """
    pause, started_s = threading.Event(), time.monotonic()
    hits = []
    for fault in faults:
        pause.wait(max(0.0, started_s + fault.at_s - time.monotonic()))
        known, pid = _victim(fault, status, pause)
        hits.append(Hit(fault, pid, time.monotonic() - started_s))
        told(hits[-1])
        if fault.kind is not Kind.PAUSE_ACTOR:
            kill(known, pid)
            continue
        with stopped(known, pid):
            pause.wait(fault.pause_s)
            if is_stopped(pid):  # else the controller has replaced it
                let_go(known, pid)
    return hits


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
        pids = sorted(pid for pid in victims(known, fault.kind) if is_running(pid))
        if pids:
            return known, pids[fault.choice % len(pids)]
        pause.wait(_POLL_S)
    raise AssertionError(f"no victim to {fault.kind.value} within {ASK_S} s")


def victims(known: ClusterStatus, kind: Kind) -> Sequence[int]:
    """Return the pids that a fault of this kind may hit now."""
    if kind is Kind.KILL_CONTROLLER:
        return (known.controller_pid,)
    if kind is Kind.KILL_ROUTER:
        return tuple(router.pid for router in known.routers)
    return tuple(actor.pid for actor in known.actors) if not known.missing_experts else ()
