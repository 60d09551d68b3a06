"""Predictions by both clients, against a real gRPC server over mixtures without experts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cluster.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    UnknownModelError,
)
from router.client import (
    AsyncClient,
    MixtureInfo,
    ModelInfo,
    TensorInfo,
)
from router.client.prediction import prediction_of
from router.client.wire import first_model
from router.protos import open_inference_pb2 as messages
from tests.unit.gateway_fakes import FakeUpstream, grpc_server, says
from tests.unit.prediction_fakes import IDENTITY, LABELS, FakePredictions
from tests.unit.router.client.broken import Connect

PIXELS = np.array([[0, 1, 2, 3], [1, 0.5, -1, 4]], np.float32)
TEXTS = FakeUpstream(says("x"))


@pytest.fixture
def upstream() -> FakePredictions:
    return FakePredictions()


@pytest.fixture
def address(upstream: FakePredictions) -> Iterator[str]:
    with grpc_server(TEXTS, predictions=upstream) as opened:
        yield opened


def test_arrays_in_and_out(connect: Connect, address: str, upstream: FakePredictions) -> None:
    with connect(address) as client:
        reply = client.predict("digits", {"pixels": PIXELS})
        assert list(reply.outputs) == ["label", "probabilities", "experts"]
        assert reply.outputs["label"].tolist() == [[LABELS[0]], [LABELS[1]]]
        assert reply.outputs["probabilities"].dtype == np.float32
        np.testing.assert_array_equal(reply.outputs["probabilities"], [[0, 6, 3], [1, 3.5, 4]])
        assert (reply.exact, reply.identity) == (True, IDENTITY)
        upstream.exact = False
        some = client.predict("digits", {"pixels": PIXELS}, ["experts"], 50.0, "drop")
        assert list(some.outputs) == ["experts"]
        assert some.exact is False
    first, second = upstream.requests
    np.testing.assert_array_equal(first.inputs["pixels"], PIXELS)
    assert 80 < first.remaining_s() < 120
    assert second.outputs == ("experts",)
    assert 20 < second.remaining_s() < 50
    assert second.on_expert_loss == "drop"


def test_lists_views_and_several_inputs(
    connect: Connect, address: str, upstream: FakePredictions
) -> None:
    inputs = {
        "features": np.arange(24.0).reshape(2, 3, 4)[:, :, ::2].transpose(0, 2, 1),
        "site": np.array([[0], [1]], np.int32),
        "flags": [[True, False], [False, True]],
        "bytes": np.array([[3], [255]], np.uint8),
        "counts": [[1], [-(2**40)]],
    }
    with connect(address) as client:
        client.predict("team/flow", inputs)
    for name, values in inputs.items():
        np.testing.assert_array_equal(upstream.requests[0].inputs[name], values)


def test_a_mixture_is_described(connect: Connect, address: str) -> None:
    with connect(address) as client:
        assert client.mixture_info("waves") == MixtureInfo(
            "waves",
            (TensorInfo("steps", "FP32", (-1, -1, 2)),),
            (TensorInfo("value", "FP32", (-1, -1, 1)),),
        )
        with pytest.raises(UnknownModelError, match="served: digits"):
            client.mixture_info("nobody")


@pytest.mark.parametrize(
    ("inputs", "field", "message"),
    [
        ({"pixels": PIXELS.astype(np.float16)}, "inputs.pixels", "is an array of float16; allowed"),
        ({"pixels": PIXELS.astype(np.float64)}, "inputs.pixels.datatype", "must be FP32; got"),
        ({"pixels": [["a"] * 4]}, "inputs.pixels", "is an array of texts"),
        ({"pixels": [[1, 2], [3]]}, "inputs.pixels", "inhomogeneous"),
        ({"pixels": PIXELS[0]}, "inputs.pixels.shape", "any length; got [4]"),
        ({"x": PIXELS}, "inputs", "'x' is not one of the inputs pixels"),
        ({}, "inputs.pixels", "is missing"),
    ],
)
def test_wrong_inputs_are_typed_errors(
    connect: Connect, address: str, inputs: dict[str, Any], field: str, message: str
) -> None:
    with connect(address) as client, pytest.raises(InvalidRequestError) as caught:
        client.predict("digits", inputs)
    assert caught.value.field == field
    assert message in caught.value.message


@pytest.mark.parametrize("bad", ["\ud800", 3])
def test_a_name_that_cannot_be_sent_is_a_typed_error(
    connect: Connect, address: str, bad: Any
) -> None:
    for asked in ((bad, {"pixels": PIXELS}), ("digits", {bad: PIXELS})):
        with connect(address) as client, pytest.raises(InvalidRequestError):
            client.predict(*asked)


class Flaky(FakePredictions):
    """Fails some times before it answers."""

    failures = 3

    async def predict(self, request: Any) -> Any:
        self.error = UnavailableError("lost", "", 0.0) if self.failures > 0 else None
        self.failures -= 1
        return await super().predict(request)


def test_an_unavailable_server_is_asked_again_with_the_time_that_is_left(connect: Connect) -> None:
    upstream = Flaky()
    with grpc_server(TEXTS, predictions=upstream) as address:
        with connect(address) as client:
            client.predict("digits", {"pixels": PIXELS})
        assert len(upstream.requests) == 4
        deadlines = [request.deadline_s for request in upstream.requests]
        assert max(deadlines) - min(deadlines) < 0.5
        upstream.failures = 1
        with (
            connect(address, retry=None) as client,
            pytest.raises(UnavailableError, match="lost"),
        ):
            client.predict("digits", {"pixels": PIXELS})


@pytest.mark.parametrize("error", [OverloadedError("full", "queue", 0.1), InternalError("failed")])
def test_other_errors_are_not_tried_again(
    connect: Connect, address: str, upstream: FakePredictions, error: ExpertMeshError
) -> None:
    upstream.error = error
    with connect(address) as client, pytest.raises(type(error)):
        client.predict("digits", {"pixels": PIXELS})
    assert len(upstream.requests) == 1


def test_a_deadline(connect: Connect, address: str, upstream: FakePredictions) -> None:
    upstream.endless = True
    with connect(address) as client, pytest.raises(DeadlineExceededError):
        client.predict("digits", {"pixels": PIXELS}, timeout_s=0.05)
    assert upstream.cancelled.wait(20)


async def test_a_cancelled_task_cancels_its_prediction(
    address: str, upstream: FakePredictions
) -> None:
    upstream.endless = True
    async with AsyncClient(address) as client:
        task = asyncio.create_task(client.predict("digits", {"pixels": PIXELS}))
        while not upstream.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(upstream.cancelled.wait, 20)


def test_a_malformed_reply_is_an_error() -> None:
    reply = messages.ModelInferResponse(model_name="digits")
    reply.outputs.add(name="y", datatype="FP32", shape=[2])
    for raw in ([], [b"\0" * 7]):
        del reply.raw_output_contents[:]
        reply.raw_output_contents.extend(raw)
        with pytest.raises(InternalError, match="malformed"):
            prediction_of(reply)
    reply.outputs[0].datatype = "FP17"
    with pytest.raises(InternalError, match="malformed"):
        prediction_of(reply)


def test_a_server_of_mixtures_alone_has_no_first_model() -> None:
    info = ModelInfo("a", "mixtral", 1, 2, 1, 5, 9, "float32")
    assert first_model([info]) == info
    with pytest.raises(UnknownModelError, match="no language model"):
        first_model([])


def test_a_process_that_only_generates_text_leaves_the_protocols_names_free() -> None:
    code = (
        "import sys\nfrom router.client import Client\nclient = Client()\n"
        "assert not any('open_inference' in name for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
