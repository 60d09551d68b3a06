"""Processor seconds of the processes that serve, read from outside of them.

A process counts with its ended children (``times(2)``), so that the time of a child that ends
meanwhile is in its parent's and nothing is lost. Ray's own processes (GCS, raylet, agents) and its
idle workers serve no request and do not count.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WORKER = re.compile(r"ray::(?:ServeReplica:[^:]+:)?(?P<name>[\w-]+)")
"""The title of a Ray worker: its class, or the deployment of a Serve replica."""
_RAYS_OWN = ("IDLE", "DashboardAgent", "RuntimeEnvAgent")
"""How the names begin of processes that have such a title and are Ray's own."""
_OF_ONE_DEPLOYMENT = re.compile(r"(?<=\bGateway)-[0-9a-f]{6}$")
"""The part of a gateway's name that differs between two deployments."""


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that is no other's with the same pid before or after it."""

    pid: int
    created_s: float


@dataclass(frozen=True, slots=True)
class ProcessTime:
    """A serving process, its parent's pid, and its processor seconds up to now."""

    name: str
    parent_pid: int
    cpu_s: float


Times = Mapping[ProcessId, ProcessTime]


class ServingProcessEndedError(Exception):
    """A serving process has ended while it was measured, and its time is lost."""


def worker_name(command_line: str) -> str | None:
    """Return the class or deployment of a Ray worker; ``None`` for any other process."""
    found = _WORKER.match(command_line)
    if found is None or found["name"].startswith(_RAYS_OWN):
        return None
    return found["name"]


def group_of(name: str) -> str:
    """Return the name under which a process is counted: all gateways have one."""
    return _OF_ONE_DEPLOYMENT.sub("", name)


def serving_times(root_pid: int, root_name: str | None) -> dict[ProcessId, ProcessTime]:
    """Return the processor seconds of the Ray workers below a process, and of all below those.

    The root itself counts as ``root_name``, and does not where that is ``None``. Raises
    ``psutil.NoSuchProcess`` where the root has ended.
    """
    import psutil

    root = psutil.Process(root_pid)
    descendants = root.children(recursive=True)
    parents: dict[int, int] = {}
    names: dict[int, str] = {root_pid: root_name} if root_name is not None else {}
    known: dict[int, Any] = {root_pid: root}
    for process in descendants:
        try:
            parents[process.pid] = process.ppid()
            name = worker_name(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:  # it has just ended, and its parent has its time
            continue
        known[process.pid] = process
        if name is not None:
            names[process.pid] = name
    workers = set(names) - {root_pid}
    times: dict[ProcessId, ProcessTime] = {}
    for pid, process in known.items():
        try:
            if pid not in names:
                if not _is_below(pid, workers, parents):
                    continue
                names[pid] = process.name()
            spent = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        cpu_s = spent.user + spent.system + spent.children_user + spent.children_system
        identity = ProcessId(pid, process.create_time())
        times[identity] = ProcessTime(names[pid], parents.get(pid, 0), cpu_s)
    return times


def _is_below(pid: int, ancestors: set[int], parents: Mapping[int, int]) -> bool:
    """Return whether one of ``ancestors`` is above a process."""
    while pid in parents:
        pid = parents[pid]
        if pid in ancestors:
            return True
    return False


def spent_between(before: Times, after: Times) -> dict[str, float]:
    """Return the processor seconds between two moments, by the processes' names.

    Raises :class:`ServingProcessEndedError` when a process has ended whose parent does not serve:
    nobody has its time then.
    """
    spent: defaultdict[str, float] = defaultdict(float)
    for identity, process in after.items():
        sooner = before.get(identity)
        spent[process.name] += process.cpu_s - (sooner.cpu_s if sooner is not None else 0.0)
    parents = {identity.pid for identity in before.keys() & after.keys()}
    for identity in before.keys() - after.keys():
        process = before[identity]
        if process.parent_pid not in parents:
            raise ServingProcessEndedError(
                f"{process.name} (pid {identity.pid}) ended while it was measured"
            )
        spent[process.name] -= process.cpu_s  # its parent has all of it now
    return dict(spent)


@contextmanager
def per_token(tokens: int, root_name: str) -> Iterator[dict[str, float]]:
    """Measure the block; the dictionary then has microseconds a token, by process, most first.

    The process itself counts as ``root_name``, and the processes of Ray below it count by name.
    """
    spent_us: dict[str, float] = {}
    before = serving_times(os.getpid(), root_name)
    yield spent_us
    spent_s = spent_between(before, serving_times(os.getpid(), root_name))
    for name, cpu_s in sorted(spent_s.items(), key=lambda item: -item[1]):
        spent_us[name] = 1e6 * cpu_s / tokens


def libraries_loaded(times: Times, file_names: set[str]) -> set[Path]:
    """Return which files of these names the processes have loaded.

    Tells which checkout's code a process runs, whatever its search path says.
    """
    import psutil

    loaded = set()
    for identity in times:
        for mapped in psutil.Process(identity.pid).memory_maps():
            if Path(mapped.path).name in file_names:
                loaded.add(Path(mapped.path))
    return loaded
