"""Triton's own gRPC client, unchanged, against a gateway's gRPC server.

``tritonclient[grpc]`` wants an older protobuf than this project. So the test makes an environment
of its own, into which pip installs the client from the package index. The calls are in
``triton_grpc_calls.py``. Triton's HTTP client needs no such environment, and is run by
``tests/unit/router/gateway/predict/test_triton_client.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.gateway_fakes import FakeUpstream, grpc_server, says
from tests.unit.prediction_fakes import LABELS, FakePredictions

INSTALL_S, CALLS_S = 400, 90
CALLS = Path(__file__).parent / "triton_grpc_calls.py"


def run(*words: str, timeout_s: float) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment that has Triton's client and nothing of ours."""
    folder = tmp_path_factory.mktemp("triton")
    run(sys.executable, "-m", "venv", str(folder), timeout_s=INSTALL_S)
    python = str(folder / "bin" / "python")
    install = (python, "-m", "pip", "install", "--quiet", "tritonclient[grpc]>=2.50")
    run(*install, timeout_s=INSTALL_S)
    return python


@pytest.mark.timeout(2 * INSTALL_S + CALLS_S)
def test_tritons_grpc_client_works_unchanged(python: str) -> None:
    upstream = FakePredictions()
    with grpc_server(FakeUpstream(says("x")), predictions=upstream) as address:
        told = json.loads(run(python, str(CALLS), address, timeout_s=CALLS_S))
    assert told == {
        "live": True,
        "ready": True,
        "models_ready": [True, True, True],
        "extensions": ["binary_tensor_data"],
        "inputs": [{"name": "pixels", "datatype": "FP32", "shape": ["-1", "4"]}],
        "id": "mine",
        "exact": True,
        "labels": list(LABELS[:2]),
        "probabilities": [[0.0, 6.0, 3.0], [1.0, 3.5, 4.0]],
        "experts": [[0, -1], [0, -1]],
        "some": ["label"],
        "flow": [[6 + 1 + 2 + 255 - 5, -(6 + 1 + 2 + 255 - 5)]],
        "refusal": "StatusCode.INVALID_ARGUMENT inputs.pixels.shape: must be [-1, 4], "
        "where -1 is any length; got [2, 3]",
    }
    assert upstream.requests[1].on_expert_loss == "drop"
