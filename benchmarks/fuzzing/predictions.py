"""Targets of the Open Inference Protocol: HTTP bodies and gRPC messages of predictions."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import numpy as np

from benchmarks.fuzzing.target import Target
from cluster.errors import ExpertMeshError, InvalidRequestError, UnknownModelError
from router.config.deployment import GatewayConfig
from router.gateway.errors import v2_error
from router.gateway.limits.room import Room
from router.gateway.metrics import Metrics
from router.gateway.predict.service import PredictionService
from router.gateway.predict.v2_grpc import PredictionHandlers
from router.gateway.predict.v2_http import encoded_reply, parse_infer
from router.messages.prediction import PredictionReply, PredictionRequest
from router.messages.tensor_bytes import NUMPY_DTYPES
from router.protos import open_inference_pb2
from router.protos.errors import grpc_error
from router.security.keys import ANYBODY
from tests.unit.prediction_fakes import MIXTURES, FakePredictions, prediction_service

MODEL = "team/flow"
"""It has inputs of five datatypes."""
_ARRAYS = {
    given.name: np.ones((3, *given.shape), NUMPY_DTYPES[given.datatype])
    for given in MIXTURES[MODEL].spec.inputs
}
_INPUTS: list[dict[str, Any]] = [
    {"name": given.name, "datatype": given.datatype, "shape": _ARRAYS[given.name].shape}
    for given in MIXTURES[MODEL].spec.inputs
]


class _Rows(FakePredictions):
    """Answers every row alike, and keeps no request."""

    async def predict(self, request: PredictionRequest) -> PredictionReply:
        outputs = dict.fromkeys(request.outputs, np.zeros((request.num_rows, 2)))
        return PredictionReply(outputs, True, "now")


def service() -> PredictionService:
    """Return a gateway's service for the tests' mixtures, whose rows are all answered alike."""
    limits, metrics = GatewayConfig(), Metrics()
    return prediction_service(_Rows(), limits, metrics, Room(limits, list(MIXTURES)))


def http() -> Target:
    """Return the target of bodies; two bytes before each are the length of its JSON, 0 for none."""
    served = service()

    async def answered(body: bytes, length: str | None) -> None:
        inputs, asked = parse_infer(body, length, served.limits)
        outputs = [output.name for output in asked.outputs]
        checked = served.validator.check(MODEL, "", inputs, outputs, asked.parameters)
        reply = await served.predict(
            checked, ANYBODY, "http", lambda r: encoded_reply(asked, checked, r)
        )
        assert json.loads(reply.body[: reply.json_bytes])["model_name"] == MODEL

    def run(data: bytes) -> None:
        length = int.from_bytes(data[:2], "big")
        try:
            asyncio.run(answered(data[2:], str(length) if length else None))
        except InvalidRequestError as error:
            _check(error)

    return Target(bodies(), run)


def protobuf() -> Target:
    """Return the target of the bytes of ``ModelInferRequest``."""
    handlers = PredictionHandlers(service())

    def run(data: bytes) -> None:
        try:
            reply = asyncio.run(handlers.answer("ModelInfer", data, ANYBODY))
        except (InvalidRequestError, UnknownModelError) as error:
            _check(error)
        else:
            assert reply.model_name == MODEL

    return Target(messages(), run)


def _check(error: ExpertMeshError) -> None:
    status, body, _ = v2_error(error)
    assert status in (400, 404)
    assert 0 < len(json.loads(json.dumps(body))["error"].encode()) < 2000
    code, details, packed = grpc_error(error)
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert len(details.encode()) < 2000
    assert len(packed) < 6000


def bodies() -> list[bytes]:
    """Return good bodies, of JSON alone and with binary tensors."""
    arrays = list(_ARRAYS.values())
    plain = [{**one, "data": array.tolist()} for one, array in zip(_INPUTS, arrays, strict=True)]
    binary = {
        "id": "mine",
        "parameters": {"timeout_s": 3, "on_expert_loss": "drop", "binary_data_output": True},
        "inputs": [
            {**one, "parameters": {"binary_data_size": array.nbytes}}
            for one, array in zip(_INPUTS, arrays, strict=True)
        ],
        "outputs": [{"name": "value", "parameters": {"binary_data": False}}],
    }
    text = json.dumps(binary).encode()
    return [
        b"\0\0" + json.dumps({"inputs": plain}).encode(),
        len(text).to_bytes(2, "big") + text + b"".join(array.tobytes() for array in arrays),
    ]


def messages() -> list[bytes]:
    """Return good messages, of raw bytes and of typed contents."""
    raw = open_inference_pb2.ModelInferRequest(model_name=MODEL, id="mine")
    typed = open_inference_pb2.ModelInferRequest(model_name=MODEL, model_version="1")
    fields = {"FP64": "fp64", "INT32": "int", "BOOL": "bool", "UINT8": "uint", "INT64": "int64"}
    for request in (raw, typed):
        request.parameters["timeout_s"].double_param = 3.0
        request.outputs.add(name="value")
        for one in _INPUTS:
            request.inputs.add(**one)
    for tensor in typed.inputs:
        contents = getattr(tensor.contents, f"{fields[tensor.datatype]}_contents")
        contents.extend(_ARRAYS[tensor.name].ravel().tolist())
    raw.raw_input_contents.extend(array.tobytes() for array in _ARRAYS.values())
    return [request.SerializeToString() for request in (raw, typed)]
