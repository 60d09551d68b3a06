"""What a deployment on this machine holds for requests: cache, places, Ray's tasks and objects.

All of it is zero, or as it was, when nobody asks for anything.
"""

from __future__ import annotations

import os
import re
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.serve_clients import Ports

METRICS = {
    "requests in pending": "expertmesh_requests_in_flight",
    "running": "expertmesh_num_requests_running",
    "waiting": "expertmesh_num_requests_waiting",
    "cache in use, %": "expertmesh_kv_cache_usage_perc",
    "queued rows": "expertmesh_actor_queued_rows",
}
RAY = {
    "Ray tasks": ("num_pending_tasks", "num_running_tasks"),
    "Ray objects": ("num_object_refs_in_scope",),
}
"""What each of Ray's processes tells of itself, summed."""
STORE = "object store, MB"
RAYS = (*RAY, STORE)
LOOK_S, LOOKS = 0.25, 12
_OF_ONE_DEPLOYMENT = re.compile(r"(?<=\bGateway)-[0-9a-f]{6}$")
"""What tells the gateways of one deployment from those of another."""


def metrics(ports: Ports) -> dict[str, float]:
    """Return the sums of :data:`METRICS`, as a gateway tells them; routers' are a second old."""
    lines = scrape(ports)
    sums = {name: total(lines, metric) for name, metric in METRICS.items()}
    sums["cache in use, %"] *= 100
    return sums


def scrape(ports: Ports) -> list[str]:
    """Return the lines that a gateway tells Prometheus."""
    with urllib.request.urlopen(f"http://127.0.0.1:{ports.http}/metrics", timeout=10) as told:
        return list(told.read().decode().splitlines())


def total(lines: Sequence[str], metric: str) -> float:
    """Return the sum of a metric's samples in Prometheus' text format."""
    starts = (metric + "{", metric + " ")
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(starts))


def rays() -> dict[str, float]:
    """Return the sums of :data:`RAY` over all processes but this one, and the bytes of objects."""
    import ray
    from ray._private.internal_api import node_stats

    [node] = ray.nodes()
    told = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"])
    others = [one for one in told.core_workers_stats if one.pid != os.getpid()]
    sums = {
        name: float(sum(getattr(one, field) for one in others for field in fields))
        for name, fields in RAY.items()
    }
    sums[STORE] = told.store_stats.object_store_bytes_used / 1e6
    return sums


def descriptors() -> dict[str, float]:
    """Return the open descriptors of every process below this one, summed by name."""
    return _by_name(lambda process: float(process.num_fds()))


def memory_mb() -> dict[str, float]:
    """Return the resident memory of every process below this one, summed by name."""
    return _by_name(lambda process: process.memory_info().rss / 1e6)


def group_of(name: str) -> str:
    """Return the name under which a process is counted: all gateways have one."""
    return _OF_ONE_DEPLOYMENT.sub("", name)


def _by_name(measure: Callable[[Any], float]) -> dict[str, float]:
    import psutil

    from benchmarks.growth import name_of

    sums: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            name, value = group_of(name_of(process.cmdline())), measure(process)
        except psutil.Error:  # it ended a moment ago
            continue
        sums[name] = sums.get(name, 0.0) + value
    return sums


def held(ports: Ports) -> dict[str, float]:
    """Return all that is held now."""
    return {**metrics(ports), **rays()}


def idle(ports: Ports) -> dict[str, float]:
    """Return the most of everything in a few seconds in which nobody asks for anything.

    Ray's own calls come and go all the time.
    """
    looks = []
    for _ in range(LOOKS):
        looks.append(held(ports))
        time.sleep(LOOK_S)
    return {name: max(look[name] for look in looks) for name in looks[0]}


def above(now: Mapping[str, float], before: Mapping[str, float]) -> list[str]:
    """Return the names of what is more than before."""
    return [name for name, value in now.items() if value > before[name]]


def wait_back(
    ports: Ports, before: Mapping[str, float], timeout_s: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Wait until nothing is more than before, or for so long.

    Returns what is held then, and how long each thing was more than before.
    """
    started_s = time.monotonic()
    back_s = dict.fromkeys(before, 0.0)
    while True:
        now = held(ports)
        passed_s = time.monotonic() - started_s
        more = above(now, before)
        back_s.update(dict.fromkeys(more, passed_s))
        if not more or passed_s > timeout_s:
            return now, back_s
        time.sleep(LOOK_S)
