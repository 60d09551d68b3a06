"""Judges whether this machine's GPUs take the processes of a deployment: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.ops.doctor.check import Check, Level
from router.ops.plan.devices import DevicesOfFile, Tenant, place

DEVICES = "devices"
"""The name of the check."""
_INSTALL = (
    "install a torch that is built for the GPU: see `python -c 'import torch; "
    "print(torch.__version__, torch.accelerator.is_available())'`."
)
_ON_CPU = "Have it computed on the CPU (num_gpus: 0, router.device: cpu)"
_ELSEWHERE = "Ignore this if other machines of the cluster have them. Else: "
_FEWER = "Change num_gpus, router.replicas or the actors of a pool, or add machines to Ray."


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that torch finds; ``memory_bytes`` is 0 where torch does not say it."""

    name: str
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Devices:
    """Processors, and the GPUs that torch finds; ``reason`` says why torch gave no answer."""

    num_cpus: int
    gpus: tuple[Gpu, ...] = ()
    torch_version: str = ""
    reason: str = ""


def check_devices(devices: Devices, tenants: Sequence[Tenant], joins: bool = False) -> Check:
    """Check that the machine has the GPUs and the memory for the processes of a deployment.

    A process without a place, without torch's support, or without room for what it holds from its
    start is a problem. Without room for all that it may take it is a warning. Where a start
    ``joins`` a cluster, other machines may have the GPUs.
    """
    cpus = f"{devices.num_cpus} CPUs"
    if devices.reason:
        found = f"{cpus}; torch cannot be asked: {devices.reason}"
        return Check(DEVICES, "problem", found, "Run `python -c 'import torch'` for its error.")
    names = ", ".join(gpu.name for gpu in devices.gpus)
    found = f"{cpus}, {_count(len(devices.gpus))}{f' ({names})' if names else ''}"
    if not tenants:
        return Check(DEVICES, "ok", found)
    level, why, advice = _verdict(devices, tenants)
    if level == "ok":
        return Check(DEVICES, "ok", found)
    if joins:
        level, advice = "warning", _ELSEWHERE + advice
    return Check(DEVICES, level, f"{found}; {why}", advice)


def _verdict(devices: Devices, tenants: Sequence[Tenant]) -> tuple[Level, str, str]:
    """Return the level of the first problem, the problem, and what to do."""
    reserving = [tenant for tenant in tenants if tenant.shares]
    if line := place(reserving, len(devices.gpus)).unplaced_line():
        counted = f"torch {devices.torch_version} finds {_count(len(devices.gpus))}"
        return "problem", f"{counted}: {line}", f"{_FEWER} Or {_INSTALL}"
    planned = place(tenants)
    if len(devices.gpus) < len(planned.devices):
        return "problem", _not_found(devices, planned), f"{_ON_CPU}, or {_INSTALL}"
    for number, (device, gpu) in enumerate(zip(planned.devices, devices.gpus, strict=False)):
        name = f"GPU {number} ({gpu.name})"
        if gpu.memory_bytes:
            line, advice = device.shortage(name, gpu.memory_bytes)
            if line:
                lacks_at_start = device.lacks_at_start(gpu.memory_bytes)
                return "problem" if lacks_at_start else "warning", line, advice
    return "ok", "", ""


def _not_found(devices: Devices, planned: DevicesOfFile) -> str:
    named = planned.devices[len(devices.gpus)].tenants[0]
    return (
        f"torch {devices.torch_version} finds {_count(len(devices.gpus))}, and "
        f"{named.name} needs one"
    )


def _count(number: int) -> str:
    return "no GPU" if number == 0 else f"{number} GPU{'' if number == 1 else 's'}"
