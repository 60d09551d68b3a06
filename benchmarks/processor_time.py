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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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


def ray_name(command_line: str) -> str | None:
    """Return the class or deployment that Ray's title of a process names, if it has one."""
    found = _WORKER.match(command_line)
    return None if found is None else found["name"]


def worker_name(command_line: str) -> str | None:
    """Return the class or deployment of a Ray worker; ``None`` for any other process."""
    name = ray_name(command_line)
    return None if name is None or name.startswith(_RAYS_OWN) else name


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
    names = {} if root_name is None else {root: root_name}
    workers = []
    for process in root.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended, and its parent has its time
            name = worker_name(" ".join(process.cmdline()))
            if name is not None:
                names[process] = name
                workers.append(process)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            for process in worker.children(recursive=True):
                names.setdefault(process, process.name())
    times: dict[ProcessId, ProcessTime] = {}
    for process, name in names.items():
        with suppress(psutil.NoSuchProcess):
            spent = process.cpu_times()
            cpu_s = spent.user + spent.system + spent.children_user + spent.children_system
            identity = ProcessId(process.pid, process.create_time())
            times[identity] = ProcessTime(name, process.ppid(), cpu_s)
    return times


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
