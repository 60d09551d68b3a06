"""The methods of a gateway's gRPC services, from request bytes to reply messages.

Each raises :class:`cluster.errors.ExpertMeshError`; :mod:`router.gateway.grpc.call` turns that into
a status. A new method of the Admin service is a line in :data:`ADMIN_CALLS`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from cluster.errors import OverloadedError, UnknownModelError, shown
from cluster.reports import ClusterStatus
from cluster.spec import EXACT_KEY
from router.gateway.grpc.call import Context, Method
from router.gateway.grpc.messages import checked_message, plain, reply_of
from router.gateway.input import tokens
from router.gateway.input.request.model import TokenizeRequest
from router.gateway.input.validate import CheckedRequest, checked
from router.gateway.limits.room import Share
from router.gateway.predict.v2_grpc import PREDICTION_SERVICE, PredictionHandlers
from router.gateway.service import Collected, Delta, GenerationService
from router.messages.request import Usage
from router.protos import admin_pb2, inference_pb2
from router.protos.parse import parsed
from router.security.keys import Caller, Role

if TYPE_CHECKING:
    from router.gateway.admin import Admin

_WATCH_PERIOD_S = 0.5
_MAX_WATCH_S = 60.0
"""A gateway that a redeploy has replaced ends with its last stream. A client that goes on watching
calls again, and reaches the new gateway."""
_MAX_WATCHES = 256
"""Calls of ``Health/Watch`` in one gateway; they have no place among its requests."""
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"]
INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
ADMIN_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["Admin"]
SERVICES = (INFERENCE_SERVICE.full_name, PREDICTION_SERVICE.full_name)
"""The services that a health check may name; the empty name is the whole server."""

ADMIN_CALLS: Mapping[str, Callable[[Admin, Any], Awaitable[Any]]] = {
    "GetStatus": lambda admin, request: admin.ask("status"),
    "GetLoad": lambda admin, request: admin.ask("load"),
    "GetUsage": lambda admin, request: admin.usage(),
    "Rebalance": lambda admin, request: admin.change("rebalance", request.dry_run),
    "Scale": lambda admin, request: admin.change(
        "scale", request.actors, request.pool, request.dry_run
    ),
    "Drain": lambda admin, request: admin.change("drain", request.target, request.dry_run),
    "SetCopies": lambda admin, request: admin.change(
        "set_copies",
        request.model,
        request.layer,
        request.expert,
        request.copies,
        request.dry_run,
        request.all_experts,
    ),
}
"""The methods of the Admin service; each returns a report that has the fields of its reply."""

SLOW_FIELDS = ("structured_outputs", "routed_experts")
"""The fields of ``sampling`` whose check takes long."""
EPOCH_KEY = "expertmesh-epoch"
VERSION_KEY = "expertmesh-placement-version"
LOOP_AGE_KEY = "expertmesh-controller-loop-age-s"


class GrpcMethods:
    """The methods of all services, by their paths.

    Each gets a request's bytes, its :class:`Caller` (``None`` for an open method's without a key)
    and grpcio's context.
    """

    def __init__(
        self, service: GenerationService, admin: Admin, predictions: PredictionHandlers
    ) -> None:
        self.service = service
        self._admin = admin
        self._predictions = predictions
        self._watches = 0

    def for_clients(self) -> dict[str, Method]:
        """Return the methods for inference and health."""
        charged = partial(Method, Role.INFERENCE, charge=self.service.charges.begin)
        inference = {
            "Generate": charged(self._generate),
            "GenerateStream": charged(self._generate_stream, is_stream=True),
            "GetModelInfo": Method(Role.INFERENCE, self._get_model_info),
            "Tokenize": charged(self._tokenize),
            "Detokenize": charged(self._detokenize),
        }
        predictions = {
            name: Method(Role.INFERENCE, partial(self._predict, name))
            for name in PREDICTION_SERVICE.methods_by_name
        } | {"ModelInfer": charged(partial(self._predict, "ModelInfer"))}
        health = {
            "Check": Method(None, self._check_health, is_open=True),
            "Watch": Method(None, self._watch, is_stream=True),
        }
        return {
            **_by_path(INFERENCE_SERVICE, inference),
            **_by_path(PREDICTION_SERVICE, predictions),
            **_by_path(HEALTH_SERVICE, health),
        }

    def for_operators(self) -> dict[str, Method]:
        """Return the methods of the Admin service."""
        calls = {name: Method(Role.ADMIN, partial(self._administer, name)) for name in ADMIN_CALLS}
        return _by_path(ADMIN_SERVICE, calls)

    async def _generate(self, data: bytes, caller: Caller, context: Context) -> Any:
        """Run a ``GenerateRequest`` to its end and return one ``GenerateReply``."""
        with self.service.room.bodies.share_of(caller.name) as share:
            checked = await self._check(data, False, caller, share)
            wholes = [Collected() for _ in range(checked.request.sampling.n)]
            usage: Usage | None = None
            async with aclosing(self._deltas(checked, caller)) as deltas:
                async for delta in deltas:
                    wholes[delta.index].add(delta)
                    usage = delta.usage
        _set_exact(all(whole.exact for whole in wholes), context)
        reply, *others = [
            reply_of(index, whole, checked, None if index else usage)
            for index, whole in enumerate(wholes)
        ]
        reply.other_choices.extend(others)
        return reply

    async def _generate_stream(
        self, data: bytes, caller: Caller, context: Context
    ) -> AsyncGenerator[Any, None]:
        """Run a ``GenerateRequest`` and yield a ``GenerateReply`` per delta."""
        is_exact = True
        with self.service.room.bodies.share_of(caller.name) as share:
            checked = await self._check(data, True, caller, share)
            async with aclosing(self._deltas(checked, caller)) as deltas:
                async for delta in deltas:
                    is_exact = is_exact and delta.exact
                    _set_exact(is_exact, context)
                    yield reply_of(delta.index, delta, checked, delta.usage)

    async def _deltas(self, checked: CheckedRequest, caller: Caller) -> AsyncGenerator[Delta, None]:
        with self.service.charge([checked], caller, "grpc") as charge:
            async with aclosing(self.service.generate(checked, "grpc", charge)) as deltas:
                async for delta in deltas:
                    yield delta

    async def _check(
        self, data: bytes, streamed: bool, caller: Caller, share: Share
    ) -> CheckedRequest:
        """Return the checked request; gRPC keeps its bytes to the end, so ``share`` does too."""
        with self.service.metrics.refusals("grpc"):
            share.take_message(data, self.service.limits.max_body_bytes)
            with self.service.charges.preparing(caller, len(data)) as preparation:
                request = parsed(inference_pb2.GenerateRequest, data)
                check = partial(checked_message, self.service.validator, request, streamed)
                slow = any(map(request.sampling.HasField, SLOW_FIELDS))
                found = await checked(slow, check)
                if not slow:
                    preparation.cost_tokens = 0
                return found

    async def _get_model_info(self, data: bytes, caller: Caller, context: Context) -> Any:
        """Return the description of one model, or of all models where the request names none."""
        request = parsed(inference_pb2.GetModelInfoRequest, data)
        models = self.service.models()
        if request.model:
            models = [self.service.validator.model(request.model).info]
        names = inference_pb2.ModelInfo.DESCRIPTOR.fields_by_name
        infos = [
            inference_pb2.ModelInfo(**{name: getattr(model, name) for name in names})
            for model in models
        ]
        return inference_pb2.GetModelInfoReply(models=infos)

    async def _tokenize(self, data: bytes, caller: Caller, context: Context) -> Any:
        with self.service.charges.preparing(caller, len(data)) as preparation:
            given = plain(parsed(inference_pb2.TokenizeRequest, data))
            asked = self.service.validator.read(TokenizeRequest, given)
            model = self.service.validator.model(asked.model)
            ids = tokens.tokenize(model, asked)
            preparation.cost_tokens = len(ids)
        texts = map(model.tokenizer.token_text, ids)
        return inference_pb2.TokenizeReply(
            token_ids=ids, tokens=texts, max_model_len=model.info.max_model_len
        )

    async def _detokenize(self, data: bytes, caller: Caller, context: Context) -> Any:
        with self.service.charges.preparing(caller, len(data)) as preparation:
            request = parsed(inference_pb2.DetokenizeRequest, data)
            ids = list(request.token_ids)
            model = self.service.validator.model(request.model)
            text, tokenizer = tokens.detokenize(model, ids, "token_ids"), model.tokenizer
            preparation.cost_tokens = len(ids)
        return inference_pb2.DetokenizeReply(
            text=text,
            tokens=map(tokenizer.token_text, ids),
            special=[token_id in tokenizer.skipped_ids for token_id in ids],
        )

    async def _predict(self, name: str, data: bytes, caller: Caller, context: Context) -> Any:
        reply = await self._predictions.answer(name, data, caller)
        if name == "ModelInfer":
            _set_exact(reply.parameters["exact"].bool_param, context)
        return reply

    async def _administer(self, name: str, data: bytes, caller: Caller, context: Context) -> Any:
        """Answer a method of the Admin service, from its request to its reply."""
        rpc = ADMIN_SERVICE.methods_by_name[name]
        request = parsed(GetMessageClass(rpc.input_type), data)
        report = await ADMIN_CALLS[name](self._admin, request)
        return GetMessageClass(rpc.output_type)(**_reply_fields(report))

    async def _check_health(self, data: bytes, caller: Caller | None, context: Context) -> Any:
        """Answer ``Health/Check``; an unknown service is NOT_FOUND.

        Only a caller with a key gets the placement's epoch and version and the loop's age, as
        trailing metadata: the reply itself has no fields for them.
        """
        if caller is not None:
            ready = self.service.ready()
            metadata: list[tuple[str, str]] = []
            if ready.order is not None:
                metadata += zip((EPOCH_KEY, VERSION_KEY), map(str, ready.order), strict=True)
            if ready.loop_age_s is not None:
                metadata.append((LOOP_AGE_KEY, f"{ready.loop_age_s:.3f}"))
            context.set_trailing_metadata(metadata)
        name = parse_health_check(data)
        if name and name not in SERVICES:
            served = ", ".join(SERVICES)
            raise UnknownModelError(f"{shown(name)} is not one of {served}", "service")
        return self._health()

    def _health(self) -> Any:
        """Return SERVING when every expert has a live copy, else NOT_SERVING."""
        status = health_pb2.HealthCheckResponse
        is_ready = self.service.ready().is_ready
        return status(status=status.SERVING if is_ready else status.NOT_SERVING)

    async def _watch(
        self, data: bytes, caller: Caller | None, context: Context
    ) -> AsyncGenerator[Any, None]:
        name = parse_health_check(data)
        if self._watches >= _MAX_WATCHES:
            raise OverloadedError(
                f"this gateway already has {_MAX_WATCHES} open watches; use Health/Check",
                "",
                _MAX_WATCH_S,
            )
        self._watches += 1
        try:
            async with aclosing(self._changes_of_health(name)) as replies:
                async for reply in replies:
                    yield reply
        finally:
            self._watches -= 1

    async def _changes_of_health(self, name: str) -> AsyncGenerator[Any, None]:
        sent: int | None = None
        until_s = time.monotonic() + _MAX_WATCH_S
        while time.monotonic() < until_s and not self.service.ready().is_deleted:
            reply = self._health()
            if name and name not in SERVICES:
                reply = health_pb2.HealthCheckResponse(
                    status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                )
            if reply.status != sent:
                sent = reply.status
                yield reply
            await asyncio.sleep(_WATCH_PERIOD_S)


def _by_path(service: Any, methods: dict[str, Method]) -> dict[str, Method]:
    if set(methods) != set(service.methods_by_name.keys()):
        raise ValueError(f"{service.full_name} has other methods than {', '.join(methods)}")
    return {f"/{service.full_name}/{name}": method for name, method in methods.items()}


def parse_health_check(data: bytes) -> str:
    """Return the service that a ``HealthCheckRequest`` names."""
    return str(parsed(health_pb2.HealthCheckRequest, data).service)


def _reply_fields(report: Any) -> dict[str, Any]:
    fields: dict[str, Any] = asdict(report)
    if isinstance(report, ClusterStatus):
        for actor in fields["actors"]:
            actor["experts"] = [
                admin_pb2.ExpertKey(model=model, layer=layer, expert=expert)
                for model, layer, expert in actor["experts"]
            ]
    return fields


def _set_exact(is_exact: bool, context: Context) -> None:
    context.set_trailing_metadata([(EXACT_KEY, str(is_exact).lower())])
