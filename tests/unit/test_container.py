"""The container's file, read without an engine: its user, its packages, and what it is built of."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from router.cli.app import app
from router.config.listen import ListenConfig
from tests.lock import FOLDER, PYTHON, ROOT
from tests.unit.web_server import web_server

DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Return each instruction with its arguments, lines joined."""
    lines = DOCKERFILE.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    joined = [line for line in text.replace("\\\n", " ").splitlines() if line]
    parts = [line.partition(" ") for line in joined]
    return [(word, " ".join(rest.split())) for word, _, rest in parts]


def given(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def ignored(path: str) -> bool:
    """Return whether ``.dockerignore`` keeps a path from the build; its last match decides."""
    result = False
    folders = [path, *map(str, Path(path).parents)]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        names = [Path(folder).name for folder in folders] if "**/" in line else folders
        if not line.startswith("#") and fnmatch.filter(names, pattern):
            result = not line.startswith("!")
    return result


def test_every_stage_has_the_python_of_the_lock() -> None:
    first, *others = given("FROM")
    image = rf"python:{re.escape(PYTHON)}-slim-[a-z]+(@sha256:[0-9a-f]{{64}})?"
    assert re.fullmatch(rf"{image} AS base", first)
    assert [stage.split()[0] for stage in others] == ["base", "base"]


def test_all_packages_come_by_hash_and_the_project_brings_none() -> None:
    installs = re.findall(r"pip (?:install|wheel) .*?(?= && |$)", "\n".join(given("RUN")), re.M)
    by_hash = [one for one in installs if "--require-hashes" in one]
    [locked] = by_hash
    assert "requirements/$DEVICE.txt" in locked
    others = [one for one in installs if one not in by_hash]
    assert len(others) == 2
    assert all("--no-deps" in one for one in others)
    [device] = given("ARG")
    assert (FOLDER / f"{device.removeprefix('DEVICE=')}.txt").is_file()


def test_it_runs_as_a_user_who_is_not_root() -> None:
    user = given("USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"useradd --uid {user.partition(':')[0]} " in given("RUN")[-1]
    words = [word for word, _ in instructions()]
    last_stage = words[len(words) - words[::-1].index("FROM") :]
    assert last_stage.index("USER") < last_stage.index("ENTRYPOINT")


def test_it_has_no_secrets() -> None:
    text = " ".join(f"{word} {rest}" for word, rest in instructions()).lower()
    assert re.findall(r"secret|password|token|api_?key|credential", text) == []
    assert all(ignored(path) for path in (".git/config", ".env", "key.pem", "docs/api.md"))


def test_what_is_copied_is_there_and_not_ignored() -> None:
    copied = [rest.split()[:-1] for rest in given("COPY") if not rest.startswith("--from=built ")]
    sources = [source for sources in copied for source in sources]
    packages = {"cluster", "deploy", "expertmesh", "experts", "native", "router", "workshop"}
    assert packages | {"pyproject.toml"} <= {*sources}
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    product = [*(ROOT / "native").rglob("*.c"), *(ROOT / "deploy").rglob("*.yaml")]
    assert len(product) > 20
    assert [file for file in product if ignored(str(file.relative_to(ROOT)))] == []
    assert ignored("cluster/__pycache__/native.cpython-311.pyc")
    assert ignored("expertmesh_native.cpython-311-x86_64-linux-gnu.so")
    assert ignored("deploy/models/smol/model.safetensors")


def test_it_serves_and_exposes_the_ports_for_clients() -> None:
    program, command = json.loads(given("ENTRYPOINT")[0])
    assert program == "expertmesh"
    assert command in {one.name or one.callback.__name__ for one in app.registered_commands}
    assert given("CMD") == []
    listen = ListenConfig()
    assert given("EXPOSE") == [f"{listen.http_port} {listen.grpc_port}"]
    assert f"http://127.0.0.1:{listen.http_port}/ready" in given("HEALTHCHECK")[0]


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False)])
def test_it_is_healthy_while_the_gateway_is_ready(status: int, is_healthy: bool) -> None:
    asked = []

    def answer(path: str, _: bytes) -> tuple[int, bytes]:
        asked.append(path)
        return status, b""

    _, python, *code = json.loads("[" + given("HEALTHCHECK")[0].partition("[")[2])
    with web_server(answer) as port:
        command = [sys.executable, python, *(part.replace("8000", str(port)) for part in code)]
        done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    assert asked == ["/ready"]
    assert (done.returncode == 0) == is_healthy
