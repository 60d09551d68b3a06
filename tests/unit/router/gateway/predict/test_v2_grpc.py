"""``inference.GRPCInferenceService`` over a real server, by the stub of the protocol's own file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from router.messages.tensor_bytes import array_of
from router.protos import open_inference_pb2 as messages
from router.protos.errors import DETAILS_KEY, error_from_grpc
from router.protos.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.unit.gateway_fakes import grpc_server
from tests.unit.prediction_fakes import IDENTITY, LABELS, FakePredictions
from tests.unit.router.gateway.predict.v2_calls import (
    TEXT_UPSTREAM,
    Infer,
    Tensor,
    grpc_message,
    tensor,
)

WAIT_S = 60.0
PIXELS = np.array([[0, 1, 2, 3], [1, 0.5, -1, 4]], np.float32)
PROBABILITIES = np.array([[0, 6, 3], [1, 3.5, 4]], np.float32)


@pytest.fixture
def upstream() -> FakePredictions:
    return FakePredictions()


@pytest.fixture
def stub(upstream: FakePredictions) -> Iterator[Any]:
    with (
        grpc_server(TEXT_UPSTREAM, predictions=upstream) as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield GRPCInferenceServiceStub(channel)


def infer(stub: Any, request: Infer) -> Any:
    return stub.ModelInfer(grpc_message(request), timeout=WAIT_S)


@pytest.mark.parametrize("is_exact", [True, False])
def test_raw_bytes_are_answered_with_raw_bytes(
    stub: Any, upstream: FakePredictions, is_exact: bool
) -> None:
    upstream.exact = is_exact
    message = grpc_message(Infer("digits", [tensor("pixels", PIXELS)]))
    message.id = "mine"
    reply, call = stub.ModelInfer.with_call(message, timeout=WAIT_S)
    assert (reply.model_name, reply.model_version, reply.id) == ("digits", "1", "mine")
    assert reply.parameters["exact"].bool_param is is_exact
    assert dict(call.trailing_metadata())["expertmesh-exact"] == str(is_exact).lower()
    assert reply.parameters["identity"].string_param == IDENTITY
    assert [output.name for output in reply.outputs] == ["label", "probabilities", "experts"]
    label, *_ = reply.raw_output_contents
    assert array_of("BYTES", (2, 1), label).tolist() == [[LABELS[0]], [LABELS[1]]]
    assert not any(output.HasField("contents") for output in reply.outputs)


def test_typed_contents_are_answered_with_typed_contents(stub: Any) -> None:
    sent = Infer("digits", [tensor("pixels", PIXELS, binary=False)], ["probabilities", "label"])
    reply = infer(stub, sent)
    probabilities, label = reply.outputs
    assert list(probabilities.contents.fp32_contents) == PROBABILITIES.ravel().tolist()
    assert [text.decode() for text in label.contents.bytes_contents] == list(LABELS[:2])
    assert not reply.raw_output_contents


def test_typed_contents_of_every_datatype(stub: Any, upstream: FakePredictions) -> None:
    given = {
        "features": np.arange(6.0).reshape(1, 2, 3),
        "site": np.array([[1]], np.int32),
        "flags": np.array([[True, False]]),
        "bytes": np.array([[255]], np.uint8),
        "counts": np.array([[-(2**40)]]),
    }
    tensors = [tensor(name, array, binary=False) for name, array in given.items()]
    reply = infer(stub, Infer("team/flow", tensors))
    for name, array in given.items():
        assert upstream.requests[0].inputs[name].dtype == array.dtype
        np.testing.assert_array_equal(upstream.requests[0].inputs[name], array)
    total = 15.0 + 1 + 1 + 255 - 2**40
    assert list(reply.outputs[0].contents.fp64_contents) == [total, -total]


def test_the_server_and_its_models_are_described(stub: Any, upstream: FakePredictions) -> None:
    assert stub.ServerLive(messages.ServerLiveRequest(), timeout=WAIT_S).live
    assert stub.ServerReady(messages.ServerReadyRequest(), timeout=WAIT_S).ready
    server = stub.ServerMetadata(messages.ServerMetadataRequest(), timeout=WAIT_S)
    assert (server.name, list(server.extensions)) == ("expertmesh", ["binary_tensor_data"])
    upstream.not_ready.add("waves")
    for name, is_ready in (("digits", True), ("waves", False), ("tiny", True)):
        ready = messages.ModelReadyRequest(name=name, version="1")
        assert stub.ModelReady(ready, timeout=WAIT_S).ready is is_ready


def test_errors_have_a_status_and_the_field(stub: Any, upstream: FakePredictions) -> None:
    def refused(work: Callable[..., Any], *given: Any, **options: Any) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as caught:
            work(*given, **options)
        return caught.value

    wrong = Infer("digits", [Tensor("pixels", "FP32", (2, 4), b"\0" * 31)])
    error = refused(infer, stub, wrong)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "inputs.pixels: has 31 bytes, must have 32: 8 values of FP32"
    details = dict(error.trailing_metadata())[DETAILS_KEY]
    assert error_from_grpc(error.code(), error.details(), details).field == "inputs.pixels"
    unknown = messages.ModelReadyRequest(name="nobody")
    assert refused(stub.ModelReady, unknown).code() is grpc.StatusCode.NOT_FOUND
    error = refused(stub.ModelMetadata, messages.ModelMetadataRequest(name="tiny"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "/v1/completions" in error.details()
    upstream.error = RuntimeError("secret")
    error = refused(infer, stub, Infer("digits", [tensor("pixels", PIXELS)]))
    assert (error.code(), "secret" in error.details()) == (grpc.StatusCode.INTERNAL, False)
