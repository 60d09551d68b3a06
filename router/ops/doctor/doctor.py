"""What is wrong with this machine for serving, and what to do: judged from what was found, pure.

:mod:`router.ops.doctor.probe` finds; here nothing is asked of the machine. ``expertmesh doctor``
shows all checks, and a ``serve run`` (:mod:`router.ops.startup.preflight`) ends before it begins
when one of those that stop a start is a problem.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from router.ops.doctor.machine import Disk, Memory
from router.ops.doctor.needs import Needs
from router.ops.doctor.ports import TakenPort
from router.ops.doctor.running_ray import RunningRay
from router.ops.plan.sizes import format_size

Level = Literal["ok", "warning", "problem"]
MIN_FREE_DISK_BYTES = 100_000_000
ENOUGH_FREE_DISK = 0.05
"""Ray keeps no objects on a disk that is fuller than this share leaves free."""
MIN_SHARED_MEMORY_BYTES = 200_000_000
MAX_SOCKET_PATH = 107
_SOCKET = "session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""A name as long as Ray makes them, below its folder."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: how it is, and what to do where it is not ok."""

    name: str
    level: Level
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Installed:
    """Versions of Python and of packages (``None``: not there), and what our package requires."""

    python: str
    requires_python: str
    packages: dict[str, str | None]
    requirements: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Devices:
    """Processors and the GPUs that torch sees; ``reason`` says why it could not be asked."""

    num_cpus: int
    gpus: tuple[str, ...] = ()
    reason: str = ""


def check_versions(installed: Installed) -> list[Check]:
    """Compare what is installed with what our package requires."""
    wrong = []
    if not SpecifierSet(installed.requires_python).contains(installed.python, prereleases=True):
        wrong.append(
            Check(
                "python",
                "problem",
                f"{installed.python}; needed: {installed.requires_python}",
                "Make a virtual environment with such a Python.",
            )
        )
    good = [f"python {installed.python}"]
    for requirement in map(Requirement, installed.requirements):
        found = installed.packages.get(requirement.name)
        if found is None:
            said = f"not installed; needed: {requirement.specifier}"
        elif not requirement.specifier.contains(found, prereleases=True):
            said = f"{found}; needed: {requirement.specifier}"
        else:
            good.append(f"{requirement.name} {found}")
            continue
        advice = f"pip install '{requirement}'"
        wrong.append(Check(requirement.name, "problem", said, advice))
    if not installed.requirements:
        advice = "pip install ."
        wrong.append(Check("expertmesh", "problem", "is not installed as a package", advice))
    return [*wrong, Check("versions", "ok", ", ".join(good))]


def check_native(is_built: bool) -> Check:
    """Look whether messages go natively, which installing leaves out without a C compiler."""
    if is_built:
        return Check("native code", "ok", "built")
    return Check(
        "native code",
        "warning",
        "was not built: Python does its work, and a layer of few tokens takes twice as long",
        "Install a C compiler and Python's headers, then ExpertMesh again, with --no-cache-dir.",
    )


def check_devices(devices: Devices, gpus_wanted: float) -> Check:
    """Look whether there are as many GPUs as a deployment's actors reserve."""
    cpus = f"{devices.num_cpus} CPUs"
    if devices.reason:
        return Check("devices", "problem", f"{cpus}; torch cannot be asked: {devices.reason}",
                     "See what `python -c 'import torch'` says.")  # fmt: skip
    gpus = f"{len(devices.gpus)} GPUs ({', '.join(devices.gpus)})" if devices.gpus else "no GPU"
    if gpus_wanted > len(devices.gpus):
        advice = (
            "Lower experts.num_gpus or experts.actors, add machines to Ray, or see "
            "`python -c 'import torch; print(torch.cuda.is_available())'`."
        )
        return Check("devices", "problem", f"{cpus}, {gpus}; wanted: {gpus_wanted:g}", advice)
    return Check("devices", "ok", f"{cpus}, {gpus}")


def check_memory(memory: Memory, needs: Needs | None) -> Check:
    """Look whether what a deployment takes at least is available."""
    available = f"{format_size(memory.available_bytes)} of {format_size(memory.total_bytes)} free"
    if needs is None:
        return Check("memory", "ok", available)
    need = needs.total_bytes
    said = (
        f"{available}; about {format_size(need)} needed (experts "
        f"{format_size(needs.experts_bytes)}, routers' weights and cache "
        f"{format_size(needs.routers_bytes)}, processes {format_size(needs.processes_bytes)})"
    )
    advice = (
        "End other programs, add machines to Ray, or lower router.cache_tokens, "
        "router.replicas, experts.min_copies or experts.actors."
    )
    if need > memory.available_bytes:
        return Check("memory", "problem", said, advice)
    if need > 0.8 * memory.available_bytes:
        return Check("memory", "warning", said, advice)
    return Check("memory", "ok", said)


def check_shared_memory(free_bytes: int | None) -> Check:
    """Look at /dev/shm, where Ray keeps its objects."""
    if free_bytes is None:
        return Check("/dev/shm", "ok", "not on this system; Ray uses its temporary folder")
    found = f"{format_size(free_bytes)} free"
    if free_bytes < MIN_SHARED_MEMORY_BYTES:
        advice = "Give the container more shared memory (`docker run --shm-size=2g`)."
        return Check("/dev/shm", "warning", found, advice)
    return Check("/dev/shm", "ok", found)


def check_temp_folder(disk: Disk) -> Check:
    """Look whether Ray can write its sessions' files: sockets, logs, objects that overflow."""
    found = f"{disk.folder}: {format_size(disk.free_bytes)} free"
    too_long = len(str(disk.folder / _SOCKET)) - MAX_SOCKET_PATH
    if too_long > 0:
        return Check(
            "Ray's folder",
            "problem",
            f"{disk.folder}: the names of sockets in it would be {too_long} characters too long",
            "Set RAY_TMPDIR to a folder with a shorter name.",
        )
    if disk.reason:
        advice = "Free some space, or set RAY_TMPDIR to a folder that can be written to."
        return Check("Ray's folder", "problem", f"{disk.folder} {disk.reason}", advice)
    advice = "Free some space, or set RAY_TMPDIR to a folder on another disk."
    if disk.free_bytes < MIN_FREE_DISK_BYTES:
        return Check("Ray's folder", "problem", found, advice)
    if disk.free_bytes < ENOUGH_FREE_DISK * disk.total_bytes:
        return Check("Ray's folder", "warning", f"{found}, less than 5 % of the disk", advice)
    return Check("Ray's folder", "ok", found)


def check_ports(
    numbers: Iterable[int], taken: Iterable[TakenPort], joins: bool = False
) -> list[Check]:
    """Tell of each port that a start would find taken.

    Where it ``joins`` a cluster that runs, that may have them for this very deployment.
    """
    advice = "Well if it serves this file already. Else end" if joins else "End"
    wrong = [
        Check(
            f"port {one.port.number}",
            "warning" if joins else "problem",
            f"for {one.port.purpose}: {one.reason}",
            f"{advice} that process, or set {one.port.key} to another port.",
        )
        for one in taken
    ]
    if wrong:
        return wrong
    return [Check("ports", "ok", f"{', '.join(map(str, numbers))} are free")]


def check_ray(running: RunningRay | None, raylets: Iterable[int]) -> Check:
    """Tell which Ray a ``serve run`` joins, and whether it can."""
    pids = ", ".join(map(str, raylets))
    if running is None:
        if pids:
            return Check(
                "ray",
                "warning",
                f"a start makes a Ray of its own, beside one that runs (raylet pid {pids})",
                "If it is left over from something that has ended, end it: `ray stop`.",
            )
        return Check("ray", "ok", "none runs; a start makes one of its own")
    target = running.target
    where = f"{target.address or 'a Ray'} (named by {target.named_by})"
    if running.reason:
        advice = (
            "If it has ended, forget it: `ray stop` (and unset RAY_ADDRESS), or start a Ray of its "
            "own: `serve run -a local FILE`."
        )
        if running.ray_version:
            advice = (
                "Start that cluster again from this virtual environment, or a Ray of its own: "
                "`serve run -a local FILE`."
            )
        return Check("ray", "problem", f"{where} {running.reason}", advice)
    told = f", Ray {running.ray_version}" if running.ray_version else ""
    return Check("ray", "ok", f"a start joins {where}{told}")


def check_haproxy(is_wanted: bool, binary: Path | str | None) -> Check:
    """Look for the HAProxy that a deployment file asks for."""
    if binary is not None:
        return Check("haproxy", "ok", str(binary))
    if not is_wanted:
        return Check("haproxy", "ok", "none here: Serve's own proxy listens, more slowly")
    return Check(
        "haproxy",
        "problem",
        "there is none here; ray[serve] brings it on Linux alone",
        "pip install 'ray[serve]', or leave out RAY_SERVE_ENABLE_HA_PROXY: Serve's own proxy, "
        "which is slower, listens instead.",
    )
