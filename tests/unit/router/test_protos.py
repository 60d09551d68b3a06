"""The stubs in the tree are what protoc makes of the .proto files, and run with our bounds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from router.protos.generate import generate

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "router/protos"
STUBS = sorted(path.name for path in FOLDER.glob("*_pb2.py"))
GRPC_STUBS = sorted(path.name for path in FOLDER.glob("*_pb2_grpc.py"))


def bounds() -> dict[str, str]:
    """The lowest (or only) version of each dependency in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["test"]
    found = (re.match(r"([A-Za-z0-9-]+)(?:\[\w+\])?(?:>=|==)([\d.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def test_stubs_in_the_tree_are_fresh(tmp_path: Path) -> None:
    fresh = generate(tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in fresh}
    assert names == {str(path.relative_to(ROOT)) for path in FOLDER.glob("*_pb2*.py")}
    for name in names:
        assert (ROOT / name).read_text() == (tmp_path / name).read_text(), (
            f"{name} is stale: run python -m router.protos.generate"
        )


@pytest.mark.parametrize("name", GRPC_STUBS)
def test_grpcio_is_new_enough_for_the_stubs(name: str) -> None:
    text = (FOLDER / name).read_text()
    match = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", text)
    assert match is not None
    assert version(bounds()["grpcio"]) >= version(match[1])
    assert bounds()["grpcio-tools"] == match[1]


@pytest.mark.parametrize("name", STUBS)
def test_protobuf_is_new_enough_for_the_stubs(name: str) -> None:
    match = re.search(r"# Protobuf Python Version: ([\d.]+)", (FOLDER / name).read_text())
    assert match is not None
    assert version(bounds()["protobuf"]) >= version(match[1])
