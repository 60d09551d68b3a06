"""The locked packages: what the project asks for, in its ranges, each with hashes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.lock import (
    CPU_WHEELS,
    DEVELOPED,
    FOLDER,
    PYTHON,
    ROOT,
    SERVED,
    Pin,
    cpu_wheels,
    missing_from_bill,
    not_locked,
    pins,
    requirements,
    unmet,
)

HASHES = ("a" * 64, "b" * 64)
PIN = "one==1.2 \\\n" + " \\\n".join(f"    --hash=sha256:{digest}" for digest in HASHES) + "\n"


def torch_of(device: str) -> dict[str, Pin]:
    return {"torch": pins(FOLDER / f"{device}.txt")["torch"]}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_container_meets_every_requirement_and_extra_that_is_served(device: str) -> None:
    wanted = requirements(SERVED)
    assert {"ray", "torch", "onnxruntime", "gguf"} <= {one.name for one in wanted}
    wrong = unmet(wanted, pins(FOLDER / f"{device}.txt"))
    assert wrong == [], "python -m tests.lock --write"


def test_the_linters_meet_every_requirement_of_dev_and_of_the_extras_in_it() -> None:
    wanted = requirements(DEVELOPED)
    assert {"ruff", "pytest", "pandas", "matplotlib"} <= {one.name for one in wanted}
    wrong = unmet(wanted, pins(FOLDER / "dev.txt") | torch_of("cpu"))
    assert wrong == [], "python -m tests.lock --write"


def test_every_build_of_torch_is_of_one_version_and_of_its_own_files() -> None:
    version, hashes = cpu_wheels()
    assert torch_of("cpu")["torch"] == Pin(version, hashes)
    cuda = torch_of("cuda")["torch"]
    assert cuda.version == version
    assert not {*cuda.hashes} & {*hashes}
    tag = f"-cp{PYTHON.replace('.', '')}-"
    assert all(tag in line for line in CPU_WHEELS.read_text(encoding="utf-8").splitlines())


def test_the_container_for_cpus_has_no_cuda() -> None:
    names = ("nvidia", "cuda", "triton")
    assert [name for name in pins(FOLDER / "cpu.txt") if name.startswith(names)] == []
    assert [name for name in pins(FOLDER / "cuda.txt") if name.startswith(names)] != []


def test_the_build_is_locked_too() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [needed] = re.findall(r'^requires = \["(.*)"\]$', text, re.MULTILINE)
    assert unmet([Requirement(needed)], pins(FOLDER / "lock.txt")) == []


def test_no_lock_names_an_index_or_a_machine() -> None:
    files = sorted(FOLDER.iterdir())
    assert len(files) == 5
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert "://" not in text
        assert "--index" not in text
        assert " @ " not in text


def test_pins_of_included_locks_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(f"# A comment.\n{PIN}")
    (tmp_path / "two.txt").write_text(f"-r one.txt\n{PIN.replace('one', 'two', 1)}")
    one = Pin(Version("1.2"), HASHES)
    assert pins(tmp_path / "two.txt") == {"one": one, "two": one}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one==1.2\n", "has no pin with hashes here: one==1.2"),
        ("one==1.2 \\\n    --hash=md5:abc\n", "has no pin with hashes"),
        (PIN.replace("==", ">="), "has no pin with hashes"),
        (f"--index-url https://somewhere\n{PIN}", "has no pin with hashes here: --index-url"),
        ("one @ https://somewhere/one.whl \\\n    --hash=sha256:" + "a" * 64, "has no pin"),
        (PIN + PIN, "pins one twice"),
    ],
)
def test_a_lock_with_anything_but_pins_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        pins(tmp_path / "lock.txt")


def test_what_the_lock_does_not_meet_is_named() -> None:
    locked = {"one": Pin(Version("1.2"), HASHES)}
    wanted = [Requirement("One>=1"), Requirement("one<1.2"), Requirement("two>=1")]
    assert unmet(wanted, locked) == ["one<1.2: locked at 1.2", "two>=1: not locked"]


def test_packages_of_an_environment_that_are_not_the_locked_ones_are_named() -> None:
    locked = {"one": Pin(Version("1.2"), HASHES)}
    installed = [("One", "1.2"), ("torch", "9"), ("nvidia-nvtx", "9"), ("expertmesh", "9")]
    assert not_locked(installed, locked) == []
    wrong = not_locked([("one", "1.3"), ("torchvision", "1"), ("two", "1")], locked)
    assert wrong == ["one==1.3: locked at 1.2", "torchvision==1: not locked", "two==1: not locked"]


@pytest.mark.parametrize(
    ("component", "is_missing"),
    [
        ({"name": "one", "version": "1.2", "hashes": HASHES}, False),
        ({"name": "One", "version": "1.2", "hashes": (*HASHES, "c" * 64)}, False),
        ({"name": "one", "version": "1.2", "hashes": HASHES[:1]}, True),
        ({"name": "one", "version": "1.3", "hashes": HASHES}, True),
        ({"name": "two", "version": "1.2", "hashes": HASHES}, True),
    ],
)
def test_a_bill_of_materials_lacks_a_pin_without_its_version_or_a_hash(
    component: dict[str, Any], is_missing: bool, tmp_path: Path
) -> None:
    hashes = [{"alg": "SHA-256", "content": digest} for digest in component.pop("hashes")]
    component["externalReferences"] = [{"type": "distribution", "hashes": hashes}]
    file = tmp_path / "bill.json"
    file.write_text(json.dumps({"bomFormat": "CycloneDX", "components": [component]}))
    found = missing_from_bill(file, {"one": Pin(Version("1.2"), HASHES)})
    assert found == (["one==1.2"] if is_missing else [])
