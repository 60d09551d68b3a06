"""The gRPC methods, from request bytes to reply messages; they know nothing of Serve or of gRPC.

Each raises :class:`cluster.errors.ExpertMeshError`; ``service.py`` turns that into a status.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from cluster.errors import InvalidRequestError, TooLargeError, UnknownModelError, shown
from router.gateway.openai.call import Collected
from router.gateway.service import Delta, GenerationService
from router.gateway.tokenizer import Tokenizer
from router.gateway.validate import CheckedRequest, RawRequest
from router.messages.request import Received, TokenLogprobs, Usage
from router.protos import admin_pb2, inference_pb2

SERVICES = ("expertmesh.v1.Inference", "expertmesh.v1.Admin")
"""The names that health knows, beside the empty one for the whole server."""

EPOCH_KEY = "expertmesh-epoch"
VERSION_KEY = "expertmesh-placement-version"
LOOP_AGE_KEY = "expertmesh-controller-loop-age-s"

_SAMPLING_FIELDS = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "ignore_eos", "logprobs", "n",
)  # fmt: skip


class GrpcHandlers:
    """Answers parsed requests through the :class:`GenerationService`."""

    def __init__(self, service: GenerationService) -> None:
        self.service = service

    async def generate(self, data: bytes) -> Any:
        """Run a ``GenerateRequest`` to its end and return one ``GenerateReply``."""
        checked = self._check(data, streamed=False)
        wholes = [Collected() for _ in range(checked.request.sampling.n)]
        usage: Usage | None = None
        async with aclosing(self.service.generate(checked, "grpc")) as deltas:
            async for delta in deltas:
                wholes[delta.index].add(delta)
                usage = delta.usage
        tokenizer = checked.model.tokenizer
        replies = [_whole_reply(index, whole, tokenizer) for index, whole in enumerate(wholes)]
        reply = replies[0]
        reply.other_choices.extend(replies[1:])
        if usage is not None:
            reply.usage.CopyFrom(_usage(usage))
        return reply

    async def generate_stream(self, data: bytes) -> AsyncGenerator[Any, None]:
        """Run a ``GenerateRequest`` and yield a ``GenerateReply`` per delta."""
        checked = self._check(data, streamed=True)
        async with aclosing(self.service.generate(checked, "grpc")) as deltas:
            async for delta in deltas:
                yield _delta_reply(delta, checked.model.tokenizer)

    async def get_model_info(self, data: bytes) -> Any:
        """Return the numbers of one model, or of all when none is named."""
        request = _parse(inference_pb2.GetModelInfoRequest, data)
        models = self.service.models()
        if request.model:
            models = [self.service.model(request.model).info]
        infos = [
            inference_pb2.ModelInfo(
                id=model.id,
                family=model.family,
                num_layers=model.num_layers,
                num_experts=model.num_experts,
                num_experts_per_tok=model.num_experts_per_tok,
                vocab_size=model.vocab_size,
                max_model_len=model.max_model_len,
                dtype=model.dtype,
            )
            for model in models
        ]
        return inference_pb2.GetModelInfoReply(models=infos)

    async def get_status(self, data: bytes) -> Any:
        """Return what the controller knows of the cluster."""
        _parse(admin_pb2.GetStatusRequest, data)
        wire = (await self.service.status()).to_wire()
        for actor in wire["actors"]:
            actor["experts"] = [
                admin_pb2.ExpertKey(model=model, layer=layer, expert=expert)
                for model, layer, expert in actor["experts"]
            ]
        return admin_pb2.GetStatusReply(**wire)

    async def get_load(self, data: bytes) -> Any:
        """Return the load of experts and devices lately."""
        _parse(admin_pb2.GetLoadRequest, data)
        return admin_pb2.GetLoadReply(**(await self.service.load()).to_wire())

    async def rebalance(self, data: bytes) -> Any:
        """Spread the load over the actors, or only tell how."""
        request = _parse(admin_pb2.RebalanceRequest, data)
        report = await self.service.rebalance(request.dry_run)
        return admin_pb2.RebalanceReply(**report.to_wire())

    async def scale(self, data: bytes) -> Any:
        """Bring a pool to a number of actors."""
        request = _parse(admin_pb2.ScaleRequest, data)
        report = await self.service.scale(request.actors, request.pool, request.dry_run)
        return admin_pb2.ChangeReply(**report.to_wire())

    async def drain(self, data: bytes) -> Any:
        """Empty and end an actor, or those of a node."""
        request = _parse(admin_pb2.DrainRequest, data)
        report = await self.service.drain(request.target, request.dry_run)
        return admin_pb2.ChangeReply(**report.to_wire())

    async def set_copies(self, data: bytes) -> Any:
        """Bring one expert to a number of copies."""
        request = _parse(admin_pb2.SetCopiesRequest, data)
        report = await self.service.set_copies(
            request.model, request.layer, request.expert, request.copies, request.dry_run
        )
        return admin_pb2.ChangeReply(**report.to_wire())

    async def check_health(self, data: bytes) -> Any:
        """Answer ``grpc.health.v1.Health/Check``; an unknown service is NOT_FOUND."""
        name = _parse(health_pb2.HealthCheckRequest, data).service
        if name and name not in SERVICES:
            served = ", ".join(SERVICES)
            raise UnknownModelError(f"{shown(name)} is not one of {served}", "service")
        return self.health()

    def health(self) -> Any:
        """Return SERVING when every expert has a live copy, else NOT_SERVING."""
        status = health_pb2.HealthCheckResponse
        is_ready = self.service.ready().is_ready
        return status(status=status.SERVING if is_ready else status.NOT_SERVING)

    def health_metadata(self) -> list[tuple[str, str]]:
        """Return what health goes by, for a call's trailing metadata; its message has no room."""
        told = self.service.ready()
        metadata: list[tuple[str, str]] = []
        if told.order is not None:
            metadata += zip((EPOCH_KEY, VERSION_KEY), map(str, told.order), strict=True)
        if told.loop_age_s is not None:
            metadata.append((LOOP_AGE_KEY, f"{told.loop_age_s:.3f}"))
        return metadata

    def _check(self, data: bytes, streamed: bool) -> CheckedRequest:
        with self.service.metrics.refusals("grpc"):
            limit = self.service.limits.max_body_bytes
            if len(data) > limit:
                raise TooLargeError(f"the message is over the limit of {limit} bytes")
            request = _parse(inference_pb2.GenerateRequest, data)
            return self.service.check(_raw_request(request, streamed))


def parse_health_check(data: bytes) -> str:
    """Return the service that a ``HealthCheckRequest`` names."""
    return str(_parse(health_pb2.HealthCheckRequest, data).service)


def _parse(message_type: Any, data: bytes) -> Any:
    try:
        return message_type.FromString(data)
    except DecodeError:
        name = message_type.DESCRIPTOR.full_name
        raise InvalidRequestError(f"the bytes are not a {name} message") from None


def _raw_request(request: Any, streamed: bool) -> RawRequest:
    prompt, prompt_field = _prompt(request)
    given = request.sampling
    sampling: dict[str, object] = {
        name: getattr(given, name) for name in _SAMPLING_FIELDS if given.HasField(name)
    }
    if given.stop:
        sampling["stop"] = list(given.stop)
    return RawRequest(
        model=request.model,
        prompt=prompt,
        is_chat=prompt_field == "messages",
        sampling=sampling,
        options={
            name: getattr(request, name)
            for name in ("timeout_s", "on_expert_loss")
            if request.HasField(name)
        },
        prompt_field=prompt_field,
        sampling_prefix="sampling.",
        streamed=streamed,
        resume=[
            Received(tuple(choice.token_ids), choice.finished, not choice.inexact)
            for choice in request.resume
        ],
    )


def _prompt(request: Any) -> tuple[object, str]:
    """Return the request's one input, and where it stands."""
    which = request.WhichOneof("input")
    if request.messages:
        if which is not None:
            raise InvalidRequestError(f"cannot be given together with {which}", "messages")
        messages = [{"role": one.role, "content": one.content} for one in request.messages]
        return messages, "messages"
    if which is None:
        raise InvalidRequestError("is missing; give it, prompt_token_ids or messages", "prompt")
    if which == "prompt":
        return request.prompt, "prompt"
    return list(request.prompt_token_ids.ids), "prompt_token_ids.ids"


def _whole_reply(index: int, whole: Collected, tokenizer: Tokenizer) -> Any:
    return inference_pb2.GenerateReply(
        index=index,
        text=whole.text,
        token_ids=whole.token_ids,
        logprobs=_logprobs(whole.token_ids, whole.logprobs, tokenizer),
        finish_reason=whole.finish_reason or "",
        exact=whole.exact,
    )


def _delta_reply(delta: Delta, tokenizer: Tokenizer) -> Any:
    return inference_pb2.GenerateReply(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=_logprobs(delta.token_ids, delta.logprobs, tokenizer),
        finish_reason=delta.finish_reason or "",
        usage=None if delta.usage is None else _usage(delta.usage),
        exact=delta.exact,
    )


def _usage(usage: Usage) -> Any:
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def _logprobs(
    token_ids: list[int] | tuple[int, ...],
    rows: list[TokenLogprobs] | tuple[TokenLogprobs, ...],
    tokenizer: Tokenizer,
) -> list[Any]:
    if not rows:
        return []
    replies = []
    for token_id, row in zip(token_ids, rows, strict=True):
        top = [
            inference_pb2.TopLogprob(
                token_id=top_id, token=tokenizer.token_text(top_id), logprob=logprob
            )
            for top_id, logprob in zip(row.top_ids, row.top_logprobs, strict=True)
        ]
        token = tokenizer.token_text(token_id)
        replies.append(
            inference_pb2.TokenLogprob(token_id=token_id, token=token, logprob=row.logprob, top=top)
        )
    return replies
