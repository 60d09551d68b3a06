"""Calls of both surfaces of the Open Inference Protocol over a fake upstream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from cluster.errors import ExpertMeshError
from router.config.deployment import GatewayConfig
from router.gateway.predict.v2_grpc import CONTENTS, PredictionHandlers
from router.messages.tensor_bytes import bytes_of, datatype_of
from router.protos import open_inference_pb2 as messages
from router.security.keys import ANYBODY
from tests.unit.gateway_fakes import FakeUpstream, http_app, says, services
from tests.unit.prediction_fakes import FakePredictions

TEXT_UPSTREAM = FakeUpstream(says("x"))


@dataclass
class Tensor:
    """A tensor as it is to be sent, right or wrong: its values, or its bytes."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: list[Any] | bytes


@dataclass
class Infer:
    """A request as it is to be sent."""

    model: str
    tensors: Sequence[Tensor]
    outputs: Sequence[str] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""


def tensor(name: str, array: np.ndarray, binary: bool = True) -> Tensor:
    data = bytes_of(array) if binary else array.ravel().tolist()
    return Tensor(name, datatype_of(array), array.shape, data)


def http_body(infer: Infer) -> tuple[bytes, dict[str, str]]:
    """The body of a request, and its headers."""
    inputs, binaries = [], []
    for given in infer.tensors:
        sent = {"name": given.name, "datatype": given.datatype, "shape": list(given.shape)}
        if isinstance(given.data, bytes):
            sent["parameters"] = {"binary_data_size": len(given.data)}
            binaries.append(given.data)
        else:
            sent["data"] = given.data
        inputs.append(sent)
    body = {"inputs": inputs, "parameters": dict(infer.parameters)}
    if infer.outputs:
        body["outputs"] = [{"name": name} for name in infer.outputs]
    text = json.dumps(body).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))} if binaries else {}
    return text + b"".join(binaries), headers


def http_call(
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    upstream: FakePredictions | None = None,
    limits: GatewayConfig | None = None,
) -> httpx.Response:
    """One request to a fresh app."""

    async def send() -> httpx.Response:
        app = http_app(TEXT_UPSTREAM, limits, upstream)
        transport = httpx.ASGITransport(app)
        async with (
            asyncio.timeout(20),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            method = "GET" if body is None else "POST"
            return await client.request(method, path, content=body, headers=headers)

    return asyncio.run(send())


def http_infer(
    infer: Infer, upstream: FakePredictions | None = None, limits: GatewayConfig | None = None
) -> httpx.Response:
    """Send a request over HTTP."""
    body, headers = http_body(infer)
    version = f"/versions/{infer.version}" if infer.version else ""
    path = f"/v2/models/{infer.model}{version}/infer"
    return http_call(path, body, headers, upstream, limits)


def grpc_message(infer: Infer) -> Any:
    """The ``ModelInferRequest`` of a request."""
    request = messages.ModelInferRequest(
        model_name=infer.model,
        model_version=infer.version,
        outputs=[{"name": name} for name in infer.outputs],
    )
    for name, value in infer.parameters.items():
        kind = {bool: "bool", int: "int64", float: "double", str: "string"}[type(value)]
        setattr(request.parameters[name], f"{kind}_param", value)
    for given in infer.tensors:
        sent = request.inputs.add(name=given.name, datatype=given.datatype, shape=given.shape)
        if isinstance(given.data, bytes):
            request.raw_input_contents.append(given.data)
        else:
            getattr(sent.contents, CONTENTS[given.datatype]).extend(given.data)
    return request


def grpc_infer(
    infer: Infer, upstream: FakePredictions | None = None, limits: GatewayConfig | None = None
) -> Any:
    """Send a request over gRPC's handlers; raises the typed error."""
    return grpc_call("ModelInfer", grpc_message(infer).SerializeToString(), upstream, limits)


def grpc_call(
    method: str,
    data: bytes,
    upstream: FakePredictions | None = None,
    limits: GatewayConfig | None = None,
) -> Any:
    """Call a method of gRPC's handlers."""
    _, predictions = services(TEXT_UPSTREAM, limits, upstream)
    handlers = PredictionHandlers(predictions)
    return asyncio.run(asyncio.wait_for(handlers.answer(method, data, ANYBODY), 20))


def outcome(work: Callable[[], Any]) -> Any:
    """The result of some work, or its typed error."""
    try:
        return work()
    except ExpertMeshError as error:
        return error


def refusals(
    infer: Infer, limits: GatewayConfig | None = None
) -> tuple[tuple[int, str], ExpertMeshError]:
    """The refusals of both surfaces: HTTP's status and text, gRPC's typed error."""
    upstream = FakePredictions()
    response = http_infer(infer, upstream, limits)
    assert set(response.json()) == {"error"}
    error = outcome(lambda: grpc_infer(infer, upstream, limits))
    assert isinstance(error, ExpertMeshError)
    assert upstream.requests == []
    return (response.status_code, response.json()["error"]), error
