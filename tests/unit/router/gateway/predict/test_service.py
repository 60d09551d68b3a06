"""What a gateway counts of predictions, over both surfaces."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cluster.errors import ExpertMeshError, NotFiniteError, UnavailableError
from router.config.deployment import GatewayConfig
from router.gateway.limits.room import Room
from router.gateway.metrics import Metrics
from router.gateway.predict.body import InferParameters
from router.gateway.predict.service import PredictionService
from router.gateway.predict.v2_grpc import PredictionHandlers
from router.gateway.predict.validate import RawTensor
from router.messages.prediction import PredictionReply, PredictionRequest
from router.security.keys import ANYBODY, Caller, Role
from tests.unit.prediction_fakes import MIXTURES, FakePredictions, prediction_service
from tests.unit.router.gateway.predict.v2_calls import Infer, Tensor, grpc_message, tensor

PIXELS = tensor("pixels", np.ones((5, 4), np.float32))
DIGITS = {"model_name": "digits"}
LIMITS = GatewayConfig(max_body_bytes=2048)


@pytest.fixture
def upstream() -> FakePredictions:
    return FakePredictions()


@pytest.fixture
def service(upstream: FakePredictions) -> PredictionService:
    return prediction_service(
        upstream, LIMITS, Metrics(), Room(LIMITS, [*MIXTURES, "tiny"]), ("tiny",)
    )


def counted(service: PredictionService, name: str, **labels: str) -> float:
    name = f"expertmesh_{name}"
    return sum(
        value
        for group in service.metrics.samples().families.values()
        for sample, given, value in group
        if sample == name and labels.items() <= given.items()
    )


async def ask(service: PredictionService, request: Infer, caller: Caller = ANYBODY) -> None:
    data = grpc_message(request).SerializeToString()
    await PredictionHandlers(service).answer("ModelInfer", data, caller)


async def test_rows_outcomes_and_latency(
    service: PredictionService, upstream: FakePredictions
) -> None:
    await ask(service, Infer("digits", [PIXELS]))
    await ask(service, Infer("digits", [PIXELS]), Caller("alice", frozenset({Role.INFERENCE})))
    sent = [PredictionRequest.from_wire(request.to_wire()) for request in upstream.requests]
    assert [request.tenant for request in sent] == ["", "alice"]  # the router is told it
    assert counted(service, "requests_total", surface="grpc", code="ok") == 2
    assert counted(service, "prediction_rows_total", **DIGITS) == 10
    assert counted(service, "inexact_rows_total") == 0
    assert counted(service, "e2e_request_latency_seconds_count", **DIGITS) == 2
    upstream.exact = False
    await ask(service, Infer("digits", [PIXELS], parameters={"on_expert_loss": "drop"}))
    assert counted(service, "inexact_rows_total", reason="drop", **DIGITS) == 5
    assert counted(service, "requests_in_flight", **DIGITS) == 0


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Infer("nobody", [PIXELS]), "not_found"),
        (Infer("digits", []), "invalid_argument"),
        (Infer("digits", [Tensor("pixels", "FP32", (1, 4), b"\0" * 4096)]), "resource_exhausted"),
    ],
)
async def test_refusals(service: PredictionService, request_: Infer, code: str) -> None:
    with pytest.raises(ExpertMeshError):
        await ask(service, request_)
    assert counted(service, "requests_total") == counted(service, "requests_total", code=code) == 1
    assert counted(service, "prediction_rows_total") == 0
    assert service.room.places.taken == service.room.bodies.taken == 0


async def test_failures_and_cancellations(
    service: PredictionService, upstream: FakePredictions
) -> None:
    upstream.error = UnavailableError("lost")
    with pytest.raises(UnavailableError):
        await ask(service, Infer("digits", [PIXELS]))
    assert counted(service, "requests_total", code="unavailable") == 1
    upstream.error, upstream.endless = None, True
    task = asyncio.create_task(ask(service, Infer("digits", [PIXELS])))
    while len(upstream.requests) < 2:
        await asyncio.sleep(0.001)
    assert counted(service, "requests_in_flight", **DIGITS) == 1
    assert service.room.bodies.taken == grpc_message(Infer("digits", [PIXELS])).ByteSize()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert counted(service, "requests_total", code="cancelled") == 1
    assert counted(service, "requests_in_flight", **DIGITS) == 0
    assert service.room.places.taken == service.room.bodies.taken == 0


async def test_a_reply_that_cannot_be_written_is_a_failure(service: PredictionService) -> None:
    def encode(reply: PredictionReply) -> None:
        raise NotFiniteError("has inf", "outputs.x")

    pixels = RawTensor("pixels", "FP32", (1, 4), [1, 2, 3, 4])
    checked = service.validator.check("digits", "", [pixels], (), InferParameters())
    with pytest.raises(NotFiniteError):
        await service.predict(checked, ANYBODY, "http", encode)
    assert counted(service, "requests_total", surface="http", code="internal") == 1
