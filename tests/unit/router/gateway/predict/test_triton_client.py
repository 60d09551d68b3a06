"""Triton's own HTTP client, unchanged, against a real server over mixtures without experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from cluster.errors import OverloadedError
from tests.unit.gateway_fakes import FakeUpstream, http_app, says
from tests.unit.http_calls import http_server
from tests.unit.prediction_fakes import IDENTITY, LABELS, FakePredictions

PIXELS = np.array([[0, 1, 2, 3], [1, 0.5, -1, 1e-30], [2, 0, 0, 7]], np.float32)


@dataclass
class Served:
    """A server's fake upstream, and Triton's client of the server."""

    upstream: FakePredictions
    client: triton.InferenceServerClient


@pytest.fixture
def served() -> Iterator[Served]:
    upstream = FakePredictions()
    with http_server(http_app(FakeUpstream(says("x")), predictions=upstream)) as port:
        client = triton.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=20.0)
        yield Served(upstream, client)
        client.close()


def tensor(name: str, array: np.ndarray, datatype: str, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, array.shape, datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def digits(served: Served, **options: Any) -> triton.InferResult:
    return served.client.infer("digits", [tensor("pixels", PIXELS, "FP32")], **options)


def test_the_server_and_its_models_are_described(served: Served) -> None:
    client = served.client
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert client.get_model_metadata("digits", "1") == {
        "name": "digits",
        "versions": ["1"],
        "platform": "expertmesh_mixture",
        "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1, 1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "experts", "datatype": "INT64", "shape": [-1, 2]},
        ],
    }
    served.upstream.not_ready.add("digits")
    assert not client.is_model_ready("digits")
    assert client.is_model_ready("team/flow")


@pytest.mark.parametrize("binary_input", [False, True])
@pytest.mark.parametrize("binary_output", [False, True, None])
def test_json_and_binary_in_every_combination(
    served: Served, binary_input: bool, binary_output: bool | None
) -> None:
    """Without a list of outputs, the client asks for all of them as binary."""
    outputs = [
        triton.InferRequestedOutput(name, binary_data=binary_output)
        for name in ("label", "probabilities", "experts")
    ]
    inputs = [tensor("pixels", PIXELS, "FP32", binary_input)]
    result = served.client.infer(
        "digits", inputs, model_version="1", outputs=None if binary_output is None else outputs
    )
    assert ("data" in result.get_output("label")) is (binary_output is False)
    expected = np.stack([PIXELS[:, 0], PIXELS[:, 1:].sum(1), PIXELS[:, 3]], 1)
    if binary_output is False:
        values = {output["name"]: output["data"] for output in result.get_response()["outputs"]}
        assert values["label"] == list(LABELS)
        assert np.array(values["probabilities"], np.float32).tolist() == expected.ravel().tolist()
        assert values["experts"] == [0, -1] * 3
    else:
        assert [text.decode() for [text] in result.as_numpy("label")] == list(LABELS)
        assert result.as_numpy("probabilities").dtype == np.float32
        np.testing.assert_array_equal(result.as_numpy("probabilities"), expected)
        np.testing.assert_array_equal(result.as_numpy("experts"), [[0, -1]] * 3)
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"]) == ("digits", "1")
    assert answer["parameters"] == {"exact": True, "identity": IDENTITY}
    [request] = served.upstream.requests
    assert request.outputs == ("label", "probabilities", "experts")
    np.testing.assert_array_equal(request.inputs["pixels"], PIXELS)


def test_some_outputs_in_the_asked_order_some_of_them_binary(served: Served) -> None:
    outputs = [
        triton.InferRequestedOutput("experts", binary_data=False),
        triton.InferRequestedOutput("label", binary_data=True),
    ]
    result = digits(served, outputs=outputs, request_id="my-id")
    answer = result.get_response()
    assert answer["id"] == "my-id"
    assert [output["name"] for output in answer["outputs"]] == ["experts", "label"]
    assert [text.decode() for text in result.as_numpy("label").ravel()] == list(LABELS)
    assert served.upstream.requests[0].outputs == ("experts", "label")


@pytest.mark.parametrize("binary", [False, True])
def test_several_inputs_of_every_datatype_in_any_order(served: Served, binary: bool) -> None:
    draw = np.random.default_rng(3)
    given = {
        "site": ("INT32", draw.integers(0, 2, (5, 1), np.int32)),
        "features": ("FP64", draw.normal(size=(5, 2, 3))),
        "flags": ("BOOL", draw.integers(0, 2, (5, 2)).astype(bool)),
        "bytes": ("UINT8", draw.integers(0, 256, (5, 1), np.uint8)),
        "counts": ("INT64", draw.integers(-(2**50), 2**50, (5, 1))),
    }
    inputs = [tensor(name, array, kind, binary) for name, (kind, array) in given.items()]
    result = served.client.infer("team/flow", inputs)
    [request] = served.upstream.requests
    for name, (_, array) in given.items():
        assert request.inputs[name].dtype == array.dtype
        np.testing.assert_array_equal(request.inputs[name], array)
    total = sum(array.reshape(5, -1).astype(np.float64).sum(1) for _, array in given.values())
    np.testing.assert_allclose(result.as_numpy("value")[:, 0], total, rtol=1e-14)


def test_rows_of_any_length(served: Served) -> None:
    for length in (1, 9):
        steps = np.ones((2, length, 2), np.float32)
        result = served.client.infer("waves", [tensor("steps", steps, "FP32")])
        np.testing.assert_array_equal(
            result.as_numpy("value"), np.tile(np.arange(1.0, length + 1)[None, :, None], (2, 1, 1))
        )


@pytest.mark.parametrize("request_encoding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("reply_encoding", [None, "gzip", "deflate"])
def test_compressed_bodies(
    served: Served, request_encoding: str | None, reply_encoding: str | None
) -> None:
    pixels = np.ones((900, 4), np.float32)
    result = served.client.infer(
        "digits",
        [tensor("pixels", pixels, "FP32")],
        request_compression_algorithm=request_encoding,
        response_compression_algorithm=reply_encoding,
    )
    assert result.as_numpy("probabilities").shape == (900, 3)
    np.testing.assert_array_equal(served.upstream.requests[0].inputs["pixels"], pixels)


def test_tritons_timeout_and_our_parameters(served: Served) -> None:
    options: dict[str, Any] = {"parameters": {"on_expert_loss": "drop"}, "timeout": 100_000_000}
    served.upstream.exact = False
    assert digits(served, **options).get_response()["parameters"]["exact"] is False
    digits(served, parameters={"timeout_s": 50})
    in_us, in_s = served.upstream.requests
    assert in_us.on_expert_loss == "drop"
    assert 60 < in_us.remaining_s() < 100
    assert 20 < in_s.remaining_s() < 50


def test_errors_come_in_the_protocols_shape(served: Served) -> None:
    def refused(model: str = "digits", **options: Any) -> tuple[str, str]:
        with pytest.raises(InferenceServerException) as caught:
            served.client.infer(model, [tensor("pixels", PIXELS, "FP32")], **options)
        return caught.value.status(), caught.value.message()

    status, message = refused("nobody")
    assert (status, "served: digits, team/flow" in message) == ("404", True)
    status, message = refused(priority=3)
    assert (status, "parameters.priority" in message) == ("400", True)
    status, message = refused(outputs=[triton.InferRequestedOutput("label", class_count=2)])
    assert (status, "outputs[0].parameters.classification" in message) == ("400", True)
    served.upstream.error = OverloadedError("full", "queue", 1.0)
    assert refused() == ("429", "queue: full")
    served.upstream.error = RuntimeError("secret")
    status, message = refused()
    assert (status, "secret" in message) == ("500", False)
    served.upstream.error = None  # a reply of another shape is the server's fault
    served.upstream.compute = lambda request: {
        name: np.zeros((3, 7), np.float32) for name in request.outputs
    }
    assert refused()[0] == "500"


def test_requests_outside_the_protocol_are_refused_in_its_shape(served: Served) -> None:
    client = served.client
    asked: list[tuple[Any, str, str]] = [
        (lambda: client.get_model_config("digits"), "404", "'digits/config' is not served here"),
        (client.get_model_repository_index, "404", "POST /v2/repository/index: Not Found"),
        (lambda: client.load_model("digits"), "404", "POST /v2/repository/models/digits/load"),
        (client.get_inference_statistics, "404", "'stats' is not served here"),
        (lambda: client.update_trace_settings("digits"), "405", "POST /v2/models/digits/trace"),
    ]
    for ask, status, message in asked:
        with pytest.raises(InferenceServerException) as caught:
            ask()
        assert caught.value.status() == status
        assert message in caught.value.message()
