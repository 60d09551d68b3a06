"""A gateway over an engine in the same process: the path from a body to a model, without Ray."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from cluster.errors import ExpertMeshError
from cluster.spec import ModelExperts, ModelSource
from router.config.deployment import GatewayConfig
from router.control.readiness import Readiness
from router.engine.constraints import Grammars
from router.gateway.grpc.methods import GrpcMethods
from router.gateway.http.app import create_app
from router.gateway.input.tokenizer import GatewayModel, Tokenizer
from router.gateway.limits.charges import Charges
from router.gateway.limits.room import Room
from router.gateway.metrics import Metrics
from router.gateway.predict.v2_grpc import PredictionHandlers
from router.gateway.service import GenerationService
from router.messages.receipts import DeliveredTokens
from router.messages.request import GenerationRequest, TokenEvent
from router.served import ServedModel
from tests.local_cluster import MODEL, LocalCluster
from tests.unit.gateway_fakes import FakeUpstream, admin, everybody
from tests.unit.prediction_fakes import MIXTURES, FakePredictions, prediction_service


async def aislice(
    events: AsyncGenerator[TokenEvent, None], count: int | None
) -> AsyncGenerator[TokenEvent, None]:
    """Yield the first ``count`` events, or all of them."""
    async with aclosing(events):
        number = 0
        while number != count:
            event = await anext(events, None)
            if event is None:
                return
            yield event
            number += 1


class LocalUpstream(FakeUpstream):
    """Sends requests to a cluster's engine, as the bytes that a router gets.

    The first request goes on at the engine anew after ``lost_after`` events, as where its router
    has died.
    """

    def __init__(self, cluster: LocalCluster, lost_after: int | None = None) -> None:
        super().__init__(lambda request: ())
        self._cluster = cluster
        self._lost_after = lost_after

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """See :class:`router.gateway.service.Upstream`."""
        self.requests.append(request)
        receipts = DeliveredTokens(request)
        left, self._lost_after = self._lost_after, None
        while not receipts.all_finished():
            sent = replace(request, request_id=uuid.uuid4().hex, received=receipts.received())
            events = self._events(GenerationRequest.from_wire(sent.to_wire()))
            async with aclosing(aislice(events, left)) as some:
                async for event in some:
                    new = receipts.take(TokenEvent.from_wire(event.to_wire()))
                    if new is not None:
                        yield new
            left = None

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        self._cluster.engine.submit(request)
        num_seen = num_finished = 0
        try:
            while num_finished < sum(
                not request.received_of(index).finished for index in range(request.sampling.n)
            ):
                more = partial(_has_more_than, num_seen)
                outcomes = await asyncio.to_thread(self._cluster.wait, request.request_id, more)
                for outcome in outcomes[num_seen:]:
                    if isinstance(outcome, ExpertMeshError):
                        raise outcome
                    num_seen += 1
                    num_finished += outcome.finish_reason is not None
                    yield outcome
        finally:
            self._cluster.engine.cancel(request.request_id)

    def ready(self) -> Readiness:
        """See :class:`router.gateway.service.Upstream`."""
        return Readiness("", (1, 1), 0.0)


def _has_more_than(count: int, outcomes: list[Any]) -> bool:
    return len(outcomes) > count


def model_of(folder: Path, cluster: LocalCluster) -> GatewayModel:
    """The model of a cluster's folder, as a gateway has it."""
    config, shape = cluster.checkpoint.config, cluster.checkpoint.shape
    experts = ModelExperts(MODEL, shape.layers, shape.num_experts, 1)
    eos = (config["eos_token_id"],)
    context = config.get("max_position_embeddings") or config["max_seq_len"]
    info = ServedModel(
        ModelSource(str(folder), "float32", experts, "local"),
        cluster.checkpoint.family.model_type,
        config["vocab_size"],
        context,
        shape.num_experts_per_tok,
        eos,
    )
    return GatewayModel(info, Tokenizer.load(str(folder), eos))


def grammars_of(folder: Path, vocab_size: int, eos: int) -> Grammars:
    """The grammars of a router for the tokenizer of a folder."""
    tokenizer = Tokenizer.load(str(folder), (eos,))
    return Grammars(lambda: tokenizer.vocabulary(vocab_size, (eos,)), vocab_size)


class LocalGateway:
    """The HTTP app and the gRPC methods over a cluster's engine."""

    def __init__(
        self,
        folder: Path,
        cluster: LocalCluster,
        limits: GatewayConfig | None = None,
        lost_after: int | None = None,
    ) -> None:
        limits = limits or GatewayConfig()
        models = {MODEL: model_of(folder, cluster)}
        self.tokenizer = models[MODEL].tokenizer
        self.upstream = LocalUpstream(cluster, lost_after)
        metrics, room = Metrics(), Room(limits, [*models, *MIXTURES])
        charges = Charges(metrics)
        service = GenerationService(
            models, limits, self.upstream, metrics, room, charges, tuple(MIXTURES)
        )
        predictions = prediction_service(FakePredictions(), limits, metrics, room, ())
        controller = admin(self.upstream, metrics)
        self.access = everybody()
        self.app = create_app(service, predictions, controller, self.access)
        self.methods = GrpcMethods(service, controller, PredictionHandlers(predictions))

    def post(self, **body: Any) -> httpx.Response:
        """Return the answer of ``/v1/completions`` to a body for the model."""

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post("/v1/completions", json={"model": MODEL, **body})

        return asyncio.run(send())
