"""MLServer in an environment of its own, serving combined estimators on ports of its own.

MLServer needs other versions of some libraries than this project, so it is never installed beside
it. The environment has the same versions of numpy and scikit-learn, and the estimators come to it
as joblib files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import sklearn

from benchmarks.shipped import free_ports

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = (
    "mlserver==1.7.1",
    "mlserver-sklearn==1.7.1",
    "uvloop==0.21.0",  # with later ones MLServer's workers end at once
    f"numpy=={np.__version__}",
    f"scikit-learn=={sklearn.__version__}",
)
WORKERS = 2
INSTALL_S, START_S, END_S, ASK_S = 900.0, 120.0, 20.0, 5.0
LOG_CHARS = 4000


@dataclass(frozen=True, slots=True)
class MlServer:
    """A running MLServer: its ports on this machine and its version."""

    http_port: int
    grpc_port: int
    version: str


def environment(folder: Path) -> Path:
    """Return the folder of a virtual environment with MLServer, made where it is not there.

    Raises ``RuntimeError`` with pip's output when the installation fails.
    """
    program = folder / "bin" / "mlserver"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=INSTALL_S)
        install = [str(folder / "bin" / "pip"), "install", "--quiet", *REQUIREMENTS]
        done = subprocess.run(install, capture_output=True, text=True, timeout=INSTALL_S)
        if done.returncode:
            raise RuntimeError(f"pip cannot install MLServer:\n{done.stderr[-LOG_CHARS:]}")
    return folder


@contextmanager
def running(
    environment_folder: Path, folder: Path, models: Mapping[str, Any]
) -> Iterator[MlServer]:
    """Serve estimators by name with two workers until the block ends; ``folder`` is empty.

    Raises ``RuntimeError`` with the end of MLServer's log when it does not become ready.
    """
    http_port, grpc_port, metrics_port = free_ports(3)
    _write(folder / "settings.json", _settings(folder, http_port, grpc_port, metrics_port))
    for name, estimator in models.items():
        (folder / name).mkdir()
        joblib.dump(estimator, folder / name / "model.joblib")
        settings = {
            "name": name,
            "implementation": "mlserver_sklearn.SKLearnModel",
            "parameters": {"uri": "./model.joblib"},
        }
        _write(folder / name / "model-settings.json", settings)
    log_file = folder / "log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [str(environment_folder / "bin" / "mlserver"), "start", str(folder)],
            cwd=folder,
            env=_variables(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group, which ends as one
        )
    try:
        urls = [f"http://127.0.0.1:{http_port}/v2/models/{name}/ready" for name in models]
        _wait_ready(process, urls, log_file)
        yield MlServer(http_port, grpc_port, _version(http_port))
    finally:
        _end(process)


def _variables() -> dict[str, str]:
    """Return the environment: each worker has its share of the cores, and finds the classes.

    With as many threads as cores in each, the workers' products would wait for each other.
    """
    threads = str(max(1, (os.cpu_count() or 1) // WORKERS))
    shares = {f"{library}_NUM_THREADS": threads for library in ("OMP", "OPENBLAS", "MKL")}
    return {**os.environ, **shares, "PYTHONPATH": str(ROOT)}


def _settings(folder: Path, http_port: int, grpc_port: int, metrics_port: int) -> dict[str, Any]:
    return {
        "debug": False,
        "host": "127.0.0.1",
        "http_port": http_port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        "metrics_dir": str(folder / "metrics"),
        "parallel_workers": WORKERS,
    }


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def _wait_ready(process: subprocess.Popen[bytes], urls: list[str], log_file: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while not all(map(_answers, urls)):
        if process.poll() is not None or time.monotonic() > deadline_s:
            log = log_file.read_text(encoding="utf-8", errors="replace")[-LOG_CHARS:]
            raise RuntimeError(f"MLServer did not become ready; its log ends:\n{log}")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=ASK_S) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _version(http_port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/v2", timeout=ASK_S) as reply:
        return str(json.load(reply)["version"])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End MLServer and its workers, which are its process group."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(END_S)
    except ProcessLookupError:
        process.wait(END_S)
