"""The card and the versions that the figures depend on."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from typing import Any

from benchmarks.common import machine

TIMEOUT_S = 20.0
UNKNOWN = "unknown"


def free_device_bytes(device: str) -> int:
    """Return the bytes that are free on the device of this kind (``accelerator`` or ``cpu``)."""
    from cluster.device import device_of, free_bytes

    return free_bytes(device_of(device, 0, "--device"))


def driver_version() -> str:
    """Return the version of NVIDIA's or AMD's driver, as its own tool says."""
    queries = (
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        ["rocm-smi", "--showdriverversion", "--csv"],
    )
    for command in queries:
        # There may be no such tool, or it hangs, and torch may still compute.
        with suppress(OSError, subprocess.SubprocessError):
            told = subprocess.check_output(
                command, text=True, timeout=TIMEOUT_S, stderr=subprocess.DEVNULL
            )
            if lines := told.strip().splitlines():
                return f"{command[0].removesuffix('-smi')} {lines[-1].strip()}"
    return UNKNOWN


def run(device: str) -> dict[str, Any]:
    """Describe the device, the machine and the versions."""
    import torch

    from cluster.device import device_of
    from cluster.native import native
    from experts.compute.grouped_ffn import CAPABILITIES

    found = device_of(device, 0, "--device")
    versions = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    described: dict[str, Any] = {
        "device": str(found),
        "name": UNKNOWN,
        "driver": driver_version(),
        "free_bytes": free_device_bytes(device),
        "toolkit": ", ".join(f"{name} {one}" for name, one in versions.items() if one) or UNKNOWN,
        "native": native is not None,
        "has_grouped_kernel": False,
        "machine": machine(),
    }
    if found.type == "cpu":
        return described | {"name": "CPU"}
    module = torch.get_device_module(found)
    name_of = getattr(module, "get_device_name", None)
    if found.type == "cuda" and torch.version.hip is None:
        described["has_grouped_kernel"] = torch.cuda.get_device_capability()[0] in CAPABILITIES
    return described | {
        "name": name_of(0) if name_of is not None else UNKNOWN,
        "total_bytes": torch.accelerator.get_memory_info()[1],
    }
