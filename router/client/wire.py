"""Between the clients' types and gRPC's messages and errors."""

from __future__ import annotations

from typing import Any

import grpc

from cluster.errors import ExpertMeshError
from cluster.reports import ChangeReport, ClusterStatus, LoadStatus, RebalanceReport
from router.client.attempts import Attempts
from router.client.types import ModelInfo, Reply, Sampling, UnreachableError
from router.messages.request import TokenLogprobs, Usage
from router.protos import inference_pb2
from router.protos.errors import DETAILS_KEY, error_from_grpc, is_from_server

# The server answers DEADLINE_EXCEEDED itself at the request's timeout; this is the way back.
_GRACE_S = 5.0
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # gRPC's own grows to two minutes; a proxy is back within seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_LOST = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.NOT_FOUND,
)
"""Without our server's word: a connection, a proxy or its gateway is gone, or not yet there."""


def sampling_message(sampling: Sampling) -> Any:
    """Return a sampling as a message; raises ``TypeError`` or ``ValueError`` where it has none."""
    names = [name for name in Sampling.__dataclass_fields__ if name != "stop"]
    given = {name: getattr(sampling, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return inference_pb2.Sampling(**given, stop=sampling.stop)


def call_options(attempts: Attempts) -> dict[str, Any]:
    """Return a call's timeout, and whether it waits for a server that is away."""
    if attempts.is_first:
        return {"timeout": attempts.remaining_s + _GRACE_S}
    return {"timeout": max(attempts.remaining_s, 0.0), "wait_for_ready": True}


def typed_error(error: Any, address: str) -> ExpertMeshError:
    """Return the typed error of a ``grpc.RpcError`` at this address."""
    metadata = dict(error.trailing_metadata() or ())
    status_details = metadata.get(DETAILS_KEY)
    code, details = error.code(), error.details() or "no details"
    # A server answers at the request's own timeout, so a deadline without its word is silence.
    if code in _LOST and not is_from_server(status_details):
        return UnreachableError(f"no ExpertMesh server answers at {address}", retry_after_s=1.0)
    return error_from_grpc(code, details, status_details)


def reply_of(message: Any) -> Reply:
    """Return one choice, or a piece of one, of a ``GenerateReply``."""
    rows = tuple(
        TokenLogprobs(
            row.logprob,
            tuple(top.token_id for top in row.top),
            tuple(top.logprob for top in row.top),
        )
        for row in message.logprobs
    )
    usage = Usage(message.usage.prompt_tokens, message.usage.completion_tokens)
    return Reply(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=rows,
        finish_reason=message.finish_reason or None,
        exact=message.exact,
        usage=usage if message.HasField("usage") else None,
    )


def choices_of(answer: Any) -> list[Reply]:
    """Return all choices of a ``GenerateReply``, by index."""
    return [reply_of(answer), *(reply_of(choice) for choice in answer.other_choices)]


def models_of(answer: Any) -> list[ModelInfo]:
    """Return the models of a ``GetModelInfoReply``."""
    names = ModelInfo.__dataclass_fields__
    return [ModelInfo(**{name: getattr(one, name) for name in names}) for one in answer.models]


def status_of(answer: Any) -> ClusterStatus:
    """Return what a ``GetStatusReply`` tells."""
    actors = [
        {
            "actor_id": actor.actor_id,
            "pid": actor.pid,
            "node": actor.node,
            "device": actor.device,
            "generation": actor.generation,
            "experts": [(one.model, one.layer, one.expert) for one in actor.experts],
            "tokens": actor.tokens,
            "weight_bytes": actor.weight_bytes,
        }
        for actor in answer.actors
    ]
    wire = {
        "models": list(answer.models),
        "epoch": answer.epoch,
        "placement_version": answer.placement_version,
        "controller_pid": answer.controller_pid,
        "missing_experts": answer.missing_experts,
        "routers": [{"pid": one.pid, "node": one.node} for one in answer.routers],
        "gateways": [{"pid": one.pid, "node": one.node} for one in answer.gateways],
        "actors": actors,
        "min_copies": answer.min_copies,
        "live_copies": answer.live_copies,
        "loading": [
            {
                "actor_id": one.actor_id,
                "held_experts": one.held_experts,
                "num_experts": one.num_experts,
                "weight_bytes": one.weight_bytes,
            }
            for one in answer.loading
        ],
    }
    return ClusterStatus.from_wire(wire)


def load_of(answer: Any) -> LoadStatus:
    """Return what a ``GetLoadReply`` tells."""
    return LoadStatus.from_wire(_plain(answer))


def rebalance_of(answer: Any) -> RebalanceReport:
    """Return what a ``RebalanceReply`` tells."""
    return RebalanceReport.from_wire(_plain(answer))


def change_of(answer: Any) -> ChangeReport:
    """Return what a ``ChangeReply`` tells."""
    return ChangeReport.from_wire(_plain(answer))


def _plain(message: Any) -> dict[str, Any]:
    """Return a message's fields, also those that are zero, by their names."""
    return {
        field.name: [_plain(one) if field.message_type else one for one in value]
        if field.is_repeated
        else value
        for field in message.DESCRIPTOR.fields
        for value in [getattr(message, field.name)]
    }
