"""What the command needs, and the one line that says what is missing; nothing is installed.

The packages are looked for with the standard library alone, before anything else is imported.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def refusal() -> str:
    """Return a line that says why the command cannot run here; empty where it can."""
    return packages_refusal() or device_refusal()


def packages_refusal() -> str:
    """Return a line about packages that are missing or of a version that is not taken."""
    try:
        texts = requires("expertmesh") or []
    except PackageNotFoundError:
        return "expertmesh is not installed: pip install --no-deps -e . (in the repository)"
    needed = [text for text in texts if "extra ==" not in text]
    missing = [text for text in needed if not _is_installed(text)]
    if missing:
        return f"packages are missing: pip install {' '.join(map(repr, missing))}"
    from router.ops.doctor.doctor import check_versions
    from router.ops.doctor.probe import find_installed

    wrong = [check for check in check_versions(find_installed()) if check.level == "problem"]
    return "; ".join(f"{check.name} is {check.found} ({check.advice})" for check in wrong)


def _is_installed(requirement: str) -> bool:
    found = _NAME.match(requirement)
    assert found is not None, requirement
    try:
        version(found[0])
    except PackageNotFoundError:
        return False
    return True


def device_refusal() -> str:
    """Return a line about an accelerator that torch does not find or cannot describe."""
    from router.ops.doctor.probe import find_devices

    devices, torch_version = find_devices(), version("torch")
    if not devices.gpus:
        reason = f" ({devices.reason})" if devices.reason else ""
        return f"torch {torch_version} finds no accelerator{reason}: nothing was measured"
    import torch

    if not hasattr(torch.accelerator, "get_memory_info"):
        return f"torch {torch_version} cannot tell a device's free memory: install a newer one"
    return ""
