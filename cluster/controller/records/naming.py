"""Reports as clients see them: models have their ids, and earlier models are left out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TypeVar

from cluster.controller.records.kernels import with_ids
from cluster.reports import ActorStatus, ChangeReport, RebalanceReport
from cluster.spec import ActorReport, ExpertKey, model_id_of

Report = TypeVar("Report", ChangeReport, RebalanceReport)


def with_model_ids(report: Report) -> Report:
    """Return a report whose moves name models by their ids."""
    moves = tuple(replace(move, model=model_id_of(move.model)) for move in report.moves)
    return replace(report, moves=moves)


def named(report: ActorReport, keys: Collection[str]) -> ActorReport:
    """Return a report without the experts of earlier models; models have their ids."""
    own = [key for key in report.experts if key.model in keys]
    tokens = {_with_id(key): n for key, n in report.tokens.items() if key.model in keys}
    kernels = with_ids(report.kernels, keys)
    return replace(report, experts=tuple(map(_with_id, own)), tokens=tokens, kernels=kernels)


def _with_id(key: ExpertKey) -> ExpertKey:
    return key._replace(model=model_id_of(key.model))


def actor_status(report: ActorReport, silence: str) -> ActorStatus:
    """Return an actor's line of the status; ``silence`` is why a silent actor is kept."""
    return ActorStatus(
        actor_id=report.actor_id,
        pid=report.pid,
        node=report.node,
        device=report.device,
        generation=report.generation,
        experts=tuple((k.model, k.layer_id, k.expert_id) for k in report.experts),
        tokens=sum(report.tokens.values()),
        weight_bytes=report.weight_bytes,
        kernels=report.kernels,
        silence=silence,
    )
