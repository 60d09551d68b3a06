"""The locked packages in ``requirements/``, made from the ranges in ``pyproject.toml``.

    python -m tests.lock [--write] [--installed] [--bill FILE]

Says which requirements of the project the lock does not meet. ``--write`` makes the lock anew by
uv. ``--installed`` says which packages of this environment are not those of the lock, and
``--bill`` which pins a CycloneDX bill of materials does not name.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "requirements"
SERVED = ("gguf", "onnx", "tracing")
"""Extras of the container."""
DEVELOPED = ("dev",)
"""Extras of the linters and tests."""
CPU_WHEELS = FOLDER / "torch-cpu.sha256"
"""The wheels of torch's CPU index, which no package index has, as ``sha256sum`` prints them."""
PYTHON = "3.11"
PLATFORM = "x86_64-manylinux_2_28"
LIMIT_S = 300
_ACCELERATED = re.compile(r"torch|triton|(nvidia|cuda)-.+")
_UNLOCKED = {"expertmesh", "pip"}
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_PIN = re.compile(r"([a-z0-9][a-z0-9-]*)==(\S+) \\$")
_WHEEL = re.compile(r"([0-9a-f]{64})  torch-([0-9.]+)\+cpu-\S+\.whl")


@dataclass(frozen=True)
class Pin:
    """One package of a lock: its version and the SHA-256 of the files that may be installed."""

    version: Version
    hashes: tuple[str, ...]


def pins(file: Path) -> dict[str, Pin]:
    """Read a lock and the locks that it includes by ``-r``.

    Raises :class:`ValueError` for a line that is neither a pin nor a hash, as an index's address
    would be, and for a package with two pins.
    """
    found: dict[str, Pin] = {}
    for block in _blocks(file.read_text(encoding="utf-8")):
        included = block.removeprefix("-r ")
        more = pins(file.parent / included) if included != block else dict([_pin(block, file)])
        if twice := found.keys() & more.keys():
            raise ValueError(f"{file.name} pins {', '.join(sorted(twice))} twice")
        found |= more
    return found


def _blocks(text: str) -> Iterator[str]:
    """Yield each requirement with the indented lines that continue it, without comments."""
    block: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if block and not line.startswith(" "):
            yield "\n".join(block)
            block = []
        block.append(line)
    if block:
        yield "\n".join(block)


def _pin(block: str, file: Path) -> tuple[str, Pin]:
    first, *others = block.splitlines()
    pin = _PIN.fullmatch(first)
    hashes = [_HASH.fullmatch(line.strip(" \\")) for line in others]
    if pin is None or not hashes or None in hashes:
        raise ValueError(f"{file.name} has no pin with hashes here: {block}")
    found = tuple(one[1] for one in hashes if one is not None)
    return pin[1], Pin(Version(pin[2]), found)


def requirements(extras: Iterable[str] = ()) -> list[Requirement]:
    """Return the project's requirements, and those of these extras and of the extras they name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    waiting, seen = list(extras), set()
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in map(Requirement, project["optional-dependencies"][extra]):
            if requirement.name == project["name"]:
                waiting.extend(requirement.extras)
            else:
                found.append(requirement)
    return found


def unmet(wanted: Sequence[Requirement], locked: Mapping[str, Pin]) -> list[str]:
    """Return the requirements that have no pin, or one outside their range."""
    lines = []
    for requirement in wanted:
        pin = locked.get(canonicalize_name(requirement.name))
        if pin is None:
            lines.append(f"{requirement}: not locked")
        elif pin.version not in requirement.specifier:
            lines.append(f"{requirement}: locked at {pin.version}")
    return lines


def cpu_wheels() -> tuple[Version, tuple[str, ...]]:
    """Return torch's version and the hashes of its wheels for CPUs.

    Raises :class:`ValueError` for another line, and for wheels of several versions.
    """
    lines = CPU_WHEELS.read_text(encoding="utf-8").splitlines()
    wheels = [_WHEEL.fullmatch(line) for line in lines]
    versions = {wheel and wheel[2] for wheel in wheels}
    if None in versions or len(versions) != 1:
        raise ValueError(f"{CPU_WHEELS.name} needs the CPU wheels of one version of torch: {lines}")
    [version] = versions
    return Version(str(version)), tuple(wheel[1] for wheel in wheels if wheel is not None)


def write() -> None:
    """Resolve the project's ranges for :data:`PYTHON` on Linux, and write the lock.

    The tests' set is resolved first and the container's within it, so that what is served has the
    versions that are tested. Raises :class:`subprocess.CalledProcessError` when uv fails.
    """
    version, hashes = cpu_wheels()
    with tempfile.TemporaryDirectory() as name:
        constraints = Path(name) / "constraints.txt"
        constraints.write_text(f"torch=={version}\n")
        developed = _resolved(DEVELOPED, constraints)
        constraints.write_text("\n".join(developed))
        served = _resolved(SERVED, constraints)
    shared = [block for block in served if not _is_accelerated(block)]
    of_cpu = " \\\n".join([f"torch=={version}", *(f"    --hash=sha256:{one}" for one in hashes)])
    of_cuda = [block for block in served if _is_accelerated(block)]
    others = [block for block in developed if block not in served and not _is_accelerated(block)]
    _write("lock.txt", "what is served, but torch, which differs by device", shared)
    _write("cpu.txt", "the container for CPUs: torch from its CPU index", ["-r lock.txt", of_cpu])
    _write("cuda.txt", "the container for NVIDIA's GPUs", ["-r lock.txt", *of_cuda])
    _write("dev.txt", "the linters and tests, but torch", ["-r lock.txt", *others])


def _resolved(extras: Sequence[str], constraints: Path) -> list[str]:
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--generate-hashes", "--python-version", PYTHON, "--python-platform", PLATFORM]
    command += [f"--extra={extra}" for extra in extras]
    command += ["--constraints", str(constraints), "pyproject.toml"]
    done = subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S
    )
    return list(_blocks(done.stdout))


def _is_accelerated(block: str) -> bool:
    return _ACCELERATED.fullmatch(block.partition("==")[0]) is not None


def _write(name: str, purpose: str, blocks: Sequence[str]) -> None:
    header = f"# {purpose[0].upper()}{purpose[1:]}. Made by: python -m tests.lock --write"
    (FOLDER / name).write_text("\n".join([header, *blocks]) + "\n", encoding="utf-8")


def not_locked(installed: Iterable[tuple[str, str]], locked: Mapping[str, Pin]) -> list[str]:
    """Return the packages, of (name, version), that have no pin or another version.

    The project, pip and torch with its CUDA libraries are left out: the linters take the build of
    torch that a machine has.
    """
    lines = []
    for name, version in sorted((canonicalize_name(name), version) for name, version in installed):
        pin = locked.get(name)
        if name in _UNLOCKED or _ACCELERATED.fullmatch(name):
            continue
        if pin is None or pin.version != Version(version):
            told = "not locked" if pin is None else f"locked at {pin.version}"
            lines.append(f"{name}=={version}: {told}")
    return lines


def missing_from_bill(bill: Path, locked: Mapping[str, Pin]) -> list[str]:
    """Return the pins that a CycloneDX document in JSON does not name with version and hashes."""
    components = json.loads(bill.read_text(encoding="utf-8"))["components"]
    named: dict[tuple[str, Version], set[str]] = {}
    for component in components:
        key = canonicalize_name(component["name"]), Version(component["version"])
        references = component.get("externalReferences", ())
        hashes = (one["content"] for reference in references for one in reference.get("hashes", ()))
        named.setdefault(key, set()).update(hashes)
    return [
        f"{name}=={pin.version}"
        for name, pin in locked.items()
        if not named.get((name, pin.version), set()) >= set(pin.hashes)
    ]


def main() -> int:
    """Parse the command line, and write or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="make the lock anew")
    parser.add_argument("--installed", action="store_true", help="check this environment")
    parser.add_argument("--bill", type=Path, help="a bill of materials of requirements/cpu.txt")
    arguments = parser.parse_args()
    if arguments.write:
        write()
    served = pins(FOLDER / "cpu.txt")
    wrong = unmet(requirements(SERVED), served)
    if arguments.installed:
        installed = [(one.metadata["Name"], one.version) for one in distributions()]
        wrong += not_locked(installed, pins(FOLDER / "dev.txt"))
    if arguments.bill is not None:
        wrong += missing_from_bill(arguments.bill, served)
    sys.stdout.writelines(f"{line}\n" for line in wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
