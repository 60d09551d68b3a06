"""Signals to processes of a cluster, and to no others; each is seen to have hit.

A signal goes to nothing but a pid that the cluster's own status names. Used by the fault tests and
by ``benchmarks.soak``, so nothing here knows of pytest.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil

from cluster.reports import ClusterStatus

HIT_S = 5.0
_POLL_S = 0.02


def named_pids(told: ClusterStatus) -> set[int]:
    """Return every pid that a status names."""
    replicas = {one.pid for one in (*told.routers, *told.gateways)}
    return {told.controller_pid, *replicas, *(actor.pid for actor in told.actors)}


def kill(told: ClusterStatus, *pids: int) -> None:
    """Send SIGKILL to processes that ``told`` names; returns when all of them are gone."""
    _signal(told, pids, signal.SIGKILL)
    _see(lambda: not any(map(is_running, pids)), f"{pids} are killed")


@contextmanager
def stopped(told: ClusterStatus, *pids: int) -> Iterator[None]:
    """Have processes that ``told`` names hang in the body; kills those that hang after it."""
    try:
        stop(told, *pids)
        yield
    finally:
        for pid in filter(is_stopped, pids):
            os.kill(pid, signal.SIGKILL)


def stop(told: ClusterStatus, *pids: int) -> None:
    """Send SIGSTOP to processes that ``told`` names; returns when all of them hang."""
    _signal(told, pids, signal.SIGSTOP)
    _see(lambda: all(map(is_stopped, pids)), f"{pids} are stopped")


def let_go(told: ClusterStatus, pid: int) -> None:
    """Send SIGCONT to a stopped process that ``told`` names; returns when it runs again."""
    assert is_stopped(pid)
    _signal(told, [pid], signal.SIGCONT)
    _see(lambda: is_running(pid) and not is_stopped(pid), f"{pid} goes on")


def is_stopped(pid: int) -> bool:
    """Tell whether a process exists and hangs by SIGSTOP."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def is_running(pid: int) -> bool:
    """Tell whether a process exists; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(told: ClusterStatus, pids: Sequence[int], number: signal.Signals) -> None:
    foreign = set(pids) - named_pids(told)
    assert not foreign, f"not processes of the cluster: {foreign}"
    for pid in pids:
        os.kill(pid, number)


def _see(hit: Callable[[], bool], what: str) -> None:
    pause, deadline_s = threading.Event(), time.monotonic() + HIT_S
    while not hit():
        assert time.monotonic() < deadline_s, f"{what}: not within {HIT_S} s"
        pause.wait(_POLL_S)
