"""Judges the findings about a machine and says what to do: pure functions.

:mod:`router.ops.doctor.probe` collects the findings; this module does not inspect the machine.
``expertmesh doctor`` shows all checks. A ``serve run`` (:mod:`router.ops.startup.preflight`) stops
before it starts anything when a check that can stop a start is a problem.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.memory import Memory
from router.ops.doctor.check import Check, Level
from router.ops.doctor.machine import Disk
from router.ops.doctor.needs import Needs
from router.ops.doctor.ports import TakenPort
from router.ops.doctor.running_ray import RunningRay
from router.ops.plan.sizes import format_size

MIN_FREE_DISK_BYTES = 100_000_000
ENOUGH_FREE_DISK = 0.05
"""Ray stores no objects on a disk with a smaller share of free space."""
MIN_SHARED_MEMORY_BYTES = 200_000_000
MAX_SOCKET_PATH = 107
_SOCKET = "session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""The longest path of a socket that Ray makes below its folder."""


@dataclass(frozen=True, slots=True)
class Installed:
    """Versions of Python and of packages (``None``: absent), and the requirements of ExpertMesh."""

    python: str
    requires_python: str
    packages: dict[str, str | None]
    requirements: tuple[str, ...]


def check_versions(installed: Installed) -> list[Check]:
    """Compare the installed versions with the requirements of ExpertMesh."""
    wrong = []
    if not SpecifierSet(installed.requires_python).contains(installed.python, prereleases=True):
        found = f"{installed.python}; needed: {installed.requires_python}"
        advice = "Make a virtual environment with such a Python."
        wrong.append(Check("python", "problem", found, advice))
    good = [f"python {installed.python}"]
    for requirement in map(Requirement, installed.requirements):
        version = installed.packages.get(requirement.name)
        if version and requirement.specifier.contains(version, prereleases=True):
            good.append(f"{requirement.name} {version}")
            continue
        found = f"{version or 'not installed'}; needed: {requirement.specifier}"
        wrong.append(Check(requirement.name, "problem", found, f"pip install '{requirement}'"))
    if not installed.requirements:
        found, advice = "is not installed as a package", "pip install ."
        wrong.append(Check("expertmesh", "problem", found, advice))
    return [*wrong, Check("versions", "ok", ", ".join(good))]


def check_native(is_built: bool) -> Check:
    """Check for the native code, which an installation without a C compiler leaves out."""
    if is_built:
        return Check("native code", "ok", "built")
    return Check(
        "native code",
        "warning",
        "was not built: Python takes its place, and an MoE layer of few tokens takes twice as long",
        "Install a C compiler and Python's headers, then ExpertMesh again, with --no-cache-dir.",
    )


def check_memory(memory: Memory, needs: Needs | None) -> Check:
    """Compare the available memory with the least that a deployment takes."""
    available = f"{format_size(memory.available_bytes)} of {format_size(memory.total_bytes)} free"
    if needs is None:
        return Check("memory", "ok", available)
    found = (
        f"{available}; about {format_size(needs.total_bytes)} needed (experts "
        f"{format_size(needs.experts_bytes)}, routers' weights and cache "
        f"{format_size(needs.routers_bytes)}, processes {format_size(needs.processes_bytes)})"
    )
    if needs.total_bytes <= 0.8 * memory.available_bytes:
        return Check("memory", "ok", found)
    advice = (
        "End other programs, add machines to Ray, or lower router.cache_tokens, "
        "router.replicas, experts.min_copies or experts.actors."
    )
    is_short = needs.total_bytes > memory.available_bytes
    return Check("memory", "problem" if is_short else "warning", found, advice)


def check_shared_memory(free_bytes: int | None) -> Check:
    """Check /dev/shm, where Ray stores its objects."""
    if free_bytes is None:
        return Check("/dev/shm", "ok", "not on this system; Ray uses its temporary folder")
    found = f"{format_size(free_bytes)} free"
    if free_bytes < MIN_SHARED_MEMORY_BYTES:
        advice = "Give the container more shared memory (`docker run --shm-size=2g`)."
        return Check("/dev/shm", "warning", found, advice)
    return Check("/dev/shm", "ok", found)


def check_temp_folder(disk: Disk) -> Check:
    """Check that Ray can write the files of a session: sockets, logs, objects that overflow."""
    name = "Ray's folder"
    found = f"{disk.folder}: {format_size(disk.free_bytes)} free"
    too_long = len(str(disk.folder / _SOCKET)) - MAX_SOCKET_PATH
    if too_long > 0:
        found = f"{disk.folder}: the paths of sockets in it would be {too_long} characters too long"
        return Check(name, "problem", found, "Set RAY_TMPDIR to a folder with a shorter path.")
    if disk.reason:
        advice = "Free some space, or set RAY_TMPDIR to a folder that can be written to."
        return Check(name, "problem", f"{disk.folder} {disk.reason}", advice)
    advice = "Free some space, or set RAY_TMPDIR to a folder on another disk."
    if disk.free_bytes < MIN_FREE_DISK_BYTES:
        return Check(name, "problem", found, advice)
    if disk.free_bytes < ENOUGH_FREE_DISK * disk.total_bytes:
        return Check(name, "warning", f"{found}, less than 5 % of the disk", advice)
    return Check(name, "ok", found)


def check_ports(
    numbers: Iterable[int], taken_ports: Iterable[TakenPort], joins: bool = False
) -> list[Check]:
    """Report each port that a start would find taken.

    A port may belong to this very deployment where the start ``joins`` a running cluster.
    """
    level: Level = "warning" if joins else "problem"
    end = "Ignore this if the cluster already serves this file. Else end" if joins else "End"
    checks = []
    for taken in taken_ports:
        found = f"for {taken.port.purpose}: {taken.reason}"
        advice = f"{end} that process, or set {taken.port.key} to another port."
        checks.append(Check(f"port {taken.port.number}", level, found, advice))
    return checks or [Check("ports", "ok", f"{', '.join(map(str, numbers))} are free")]


def check_ray(running: RunningRay | None, raylets: Iterable[int]) -> Check:
    """Report which Ray a ``serve run`` joins, and whether it can."""
    if running is None:
        pids = ", ".join(map(str, raylets))
        if not pids:
            return Check("ray", "ok", "none runs; a start makes one of its own")
        found = f"a start makes a Ray of its own, beside a running Ray (raylet pid {pids})"
        return Check("ray", "warning", found, "If it is left over from an ended run: `ray stop`.")
    target = running.target
    where = f"{target.address or 'a Ray'} (named by {target.named_by})"
    if running.reason:
        advice = (
            "If that cluster has ended, run `ray stop` and unset RAY_ADDRESS. If it has other "
            "versions, start it again from this virtual environment. Or start a Ray of its own: "
            "`expertmesh serve FILE` without RAY_ADDRESS."
        )
        return Check("ray", "problem", f"{where} {running.reason}", advice)
    return Check("ray", "ok", f"a start joins {where}")
