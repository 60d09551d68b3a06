"""The distributions: the whole one serves outside the source tree, the client alone asks it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.shipped import free_ports
from router.client import Client
from tests.cluster_fixture import TINY, greedy
from tests.serve_run import copy_with_ports, ready_serve, run_command

ROOT = Path(__file__).parents[2]
SOURCES = ("cluster", "deploy", "expertmesh", "experts", "native", "router", "workshop")
FILES = ("pyproject.toml", "LICENSE", "README.md")
LIMIT_S = 300


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The files of the checkout that the distribution is made of."""
    folder = tmp_path / "source"
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "smol", ".*")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a distribution as ``python -m build`` does, without its network access."""
    program = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(target)]
    done = subprocess.run(
        command, cwd=source, check=True, capture_output=True, text=True, timeout=LIMIT_S
    )
    return target / done.stdout.splitlines()[-1]


def client_alone(wheel: Path, folder: Path, address: str) -> str:
    """Return a completion by a client of this wheel, in a Python without the server's packages."""
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(folder)
    program = f"""
import sys
sys.path.insert(0, {str(folder)!r})
sys.modules.update(dict.fromkeys(("ray", "torch", "numpy", "pydantic", "fastapi")))
from expertmesh import Client, Sampling
with Client({address!r}) as client:
    [reply] = client.generate("And the LORD said", Sampling(max_tokens=4, temperature=0.0))
print(sys.modules["router"].__file__, reply.text, sep="\\n", end="")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, check=True, capture_output=True, text=True
    )
    where, text = done.stdout.split("\n", 1)
    assert Path(where).is_relative_to(folder)
    return text


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel alone into a fresh environment, beside this one's other packages."""
    venv.create(folder)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(packages) / "others.pth").write_text("\n".join(others))
    command = [sys.executable, "-m", "pip", "--python", str(folder), "install"]
    command += ["--no-index", "--no-deps", "--ignore-installed", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S)
    return folder / "bin"


@pytest.mark.timeout(900)
def test_a_wheel_of_the_source_archive_serves_outside_the_source_tree(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    archive = build("sdist", source, tmp_path)
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    wheel = build("wheel", tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path)
    scripts = install(wheel, tmp_path / "fresh")

    @contextmanager
    def serving(file: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        command = [str(scripts / "expertmesh"), "serve", "--ray-address", "local", str(file)]
        with run_command(command, file.parent, log, {}) as process:
            yield process

    program = "import expertmesh, expertmesh_native, router; print(router.__file__)"
    where = subprocess.run(
        [scripts / "python", "-c", program],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert Path(where.strip()).is_relative_to(tmp_path / "fresh")
    http_port, grpc_port = free_ports(2)
    file = copy_with_ports(tmp_path, http_port, grpc_port)
    with (
        ready_serve(file, tmp_path / "log.txt", http_port, serving),
        Client(f"127.0.0.1:{grpc_port}") as client,
    ):
        [reply] = client.generate("And the LORD said", greedy(4), model=TINY)
        wheel = build("wheel", source / "deploy" / "client", tmp_path)
        address = f"127.0.0.1:{grpc_port}"
        assert client_alone(wheel, tmp_path / "client", address) == reply.text
