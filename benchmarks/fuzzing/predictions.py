"""Targets of the Open Inference Protocol: HTTP bodies and gRPC messages of predictions."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import numpy as np

from benchmarks.fuzzing.target import Target
from cluster.errors import ExpertMeshError, InvalidRequestError, UnknownModelError
from cluster.spec import ModelExperts, ModelSource
from experts.mixture.spec import MixtureSpec
from router.config.deployment import GatewayConfig
from router.control.readiness import Readiness
from router.gateway.errors import v2_error
from router.gateway.limits.charges import Charges
from router.gateway.limits.room import Room
from router.gateway.metrics import Metrics
from router.gateway.predict.service import PredictionService
from router.gateway.predict.v2_grpc import PredictionHandlers
from router.gateway.predict.v2_http import encoded_reply, parse_infer
from router.messages.prediction import PredictionReply, PredictionRequest
from router.protos import open_inference_pb2
from router.protos.errors import grpc_error
from router.security.keys import ANYBODY
from router.served import ServedMixture

MODEL = "rows"
_GATE = {"kind": "linear", "file": "gate.safetensors", "choices": ["a"]}
_SPEC: dict[str, Any] = {
    "format": 1,
    "dtype": "float32",
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [2]},
        {"name": "flag", "datatype": "BOOL", "shape": [1]},
    ],
    "gate": "top",
    "gates": {"top": _GATE},
    "experts": {"a": {"kind": "linear", "file": "a.safetensors"}},
    "combine": {"kind": "probabilities", "classes": ["no", "yes"]},
    "outputs": [
        {"name": "label", "datatype": "BYTES", "from": "label"},
        {"name": "probabilities", "datatype": "FP32", "from": "probabilities"},
    ],
}
_X, _FLAG = np.ones((3, 2), np.float32), np.ones((3, 1), bool)


class _Rows:
    """Answers every row alike."""

    async def predict(self, request: PredictionRequest) -> PredictionReply:
        num_rows = request.num_rows
        outputs = {
            "label": np.full((num_rows, 1), "yes"),
            "probabilities": np.zeros((num_rows, 2), np.float32),
        }
        return PredictionReply({name: outputs[name] for name in request.outputs}, True, "now")

    def ready(self) -> Readiness:
        return Readiness("", (1, 1), 0.0)

    def model_ready(self, model: str) -> Readiness:
        return self.ready()


def service() -> PredictionService:
    """Return a gateway's service for one mixture, whose rows are all answered alike."""
    spec = MixtureSpec.model_validate(_SPEC)
    source = ModelSource("unused", spec.dtype, ModelExperts(f"{MODEL}@1", (0,), 1, 0), "unused")
    limits = GatewayConfig()
    mixtures = {MODEL: ServedMixture(source, spec, "now")}
    upstream: Any = _Rows()  # what a service calls of the routers
    metrics, room = Metrics(), Room(limits, list(mixtures))
    return PredictionService(mixtures, limits, upstream, metrics, room, Charges(metrics))


def http() -> Target:
    """Return the target of bodies; two bytes before each are the length of its JSON, 0 for none."""
    served = service()

    async def answered(body: bytes, length: str | None) -> None:
        raw, asked = parse_infer(MODEL, "", body, length, served.limits)
        checked = served.validator.check(raw)
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
    x = {"name": "x", "datatype": "FP32", "shape": [3, 2]}
    flag = {"name": "flag", "datatype": "BOOL", "shape": [3, 1]}
    plain = {"inputs": [{**x, "data": _X.tolist()}, {**flag, "data": [True, False, True]}]}
    binary = {
        "id": "mine",
        "parameters": {"timeout_s": 3, "on_expert_loss": "drop", "binary_data_output": True},
        "inputs": [
            {**x, "parameters": {"binary_data_size": _X.nbytes}},
            {**flag, "parameters": {"binary_data_size": _FLAG.nbytes}},
        ],
        "outputs": [{"name": "label", "parameters": {"binary_data": False}}],
    }
    text = json.dumps(binary).encode()
    length = len(text).to_bytes(2, "big")
    return [
        b"\0\0" + json.dumps(plain).encode(),
        length + text + _X.tobytes() + _FLAG.tobytes(),
    ]


def messages() -> list[bytes]:
    """Return good messages, of raw bytes and of typed contents."""
    raw = open_inference_pb2.ModelInferRequest(model_name=MODEL, id="mine")
    typed = open_inference_pb2.ModelInferRequest(model_name=MODEL, model_version="1")
    for request in (raw, typed):
        request.parameters["timeout_s"].double_param = 3.0
        request.inputs.add(name="x", datatype="FP32", shape=[3, 2])
        request.inputs.add(name="flag", datatype="BOOL", shape=[3, 1])
        request.outputs.add(name="probabilities")
    raw.raw_input_contents.extend([_X.tobytes(), _FLAG.tobytes()])
    typed.inputs[0].contents.fp32_contents.extend(_X.ravel().tolist())
    typed.inputs[1].contents.bool_contents.extend(_FLAG.ravel().tolist())
    return [request.SerializeToString() for request in (raw, typed)]
