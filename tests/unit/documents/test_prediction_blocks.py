"""The blocks of ``docs/api.md`` about predictions run, and print what they say.

They are ``py`` blocks: the server that runs the other documents' blocks has no mixture. Here the
bundled ``digits`` computes in this process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import deploy
from experts.checkpoint.mixture import open_mixture
from router.messages.prediction import PredictionRequest
from tests.local_mixture import LocalMixture
from tests.readme import GRPC_PORT, HTTP_PORT, blocks
from tests.unit import prediction_fakes
from tests.unit.gateway_fakes import FakeUpstream, grpc_server, http_app, says
from tests.unit.http_calls import http_server
from tests.unit.prediction_fakes import FakePredictions, served_mixture

API = Path(__file__).parents[3] / "docs" / "api.md"
DIGITS = Path(deploy.__file__).parent / "models" / "digits"


@pytest.mark.parametrize("uses", ["with Client(", "triton."])
def test_a_block_of_the_document_runs(uses: str, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = served_mixture("digits", yaml.safe_load((DIGITS / "mixture.yaml").read_text()))
    monkeypatch.setattr(prediction_fakes, "MIXTURES", {"digits": digits})
    local = LocalMixture(open_mixture(DIGITS))

    def computed(request: PredictionRequest) -> dict[str, np.ndarray]:
        return local.predict(request.inputs, request.outputs)

    upstream = FakePredictions()
    upstream.compute = computed
    [code] = [b.text for b in blocks(API.read_text()) if b.language == "py" and uses in b.text]
    [line] = [line for line in code.splitlines() if "print(" in line]
    text = FakeUpstream(says("x"))
    with (
        http_server(http_app(text, predictions=upstream)) as http_port,
        grpc_server(text, predictions=upstream) as address,
    ):
        code = code.replace(f":{HTTP_PORT}", f":{http_port}")
        code = code.replace(f"127.0.0.1:{GRPC_PORT}", address)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
        )
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.strip() == line.partition("# ")[2]
