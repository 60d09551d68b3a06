"""The blocks of ``docs/api.md`` about predictions run, over the mixture of ``docs/models.md``.

They are ``py`` blocks: the server that runs the other documents' blocks has no mixture.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from router.messages.prediction import PredictionRequest
from tests.mixture_keys import DOCUMENT
from tests.readme import GRPC_PORT, HTTP_PORT, blocks
from tests.unit import prediction_fakes
from tests.unit.gateway_fakes import FakeUpstream, grpc_server, http_app, says
from tests.unit.http_calls import http_server
from tests.unit.prediction_fakes import FakePredictions, served_mixture

API = Path(__file__).parents[3] / "docs" / "api.md"
PRINTED = {"with Client(": "['0' '1'] True\n", "triton.": "[b'0' b'1']\n"}


def labels(request: PredictionRequest) -> dict[str, np.ndarray]:
    assert request.inputs["pixels"].shape == (2, 64)
    whole = {
        "label": np.array([["0"], ["1"]]),
        "probabilities": np.zeros((2, 10), np.float32),
        "experts": np.zeros((2, 2), np.int64),
        "weights": np.zeros((2, 2), np.float32),
    }
    return {name: whole[name] for name in request.outputs}


@pytest.mark.parametrize("uses", PRINTED)
def test_a_block_of_the_document_runs(uses: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.findall(r"```yaml\n(format: 1\n.*?)```", DOCUMENT.read_text(), re.DOTALL)
    digits = served_mixture("digits", yaml.safe_load(example[0]))
    monkeypatch.setattr(prediction_fakes, "MIXTURES", {"digits": digits})
    upstream = FakePredictions()
    upstream.compute = labels
    [code] = [b.text for b in blocks(API.read_text()) if b.language == "py" and uses in b.text]
    text = FakeUpstream(says("x"))
    with (
        http_server(http_app(text, predictions=upstream)) as http_port,
        grpc_server(text, predictions=upstream) as address,
    ):
        code = code.replace(f":{HTTP_PORT}", f":{http_port}")
        code = code.replace(f"127.0.0.1:{GRPC_PORT}", address)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        )
    assert (done.stdout, done.stderr, done.returncode) == (PRINTED[uses], "", 0)
