"""Adoption: a controller that starts takes over living actors, and ends those that do not fit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from cluster.controller.pool import ExpertPool, kind_of
from cluster.spec import ActorReport, ActorSpec

logger = logging.getLogger("expertmesh.controller")


@dataclass(slots=True)
class Adopted:
    """The adopted actors by id, and the numbers that the new controller must go beyond.

    ``epoch`` is the highest that any living actor has seen. ``generations`` has the last generation
    of every actor that was found, also of the ended ones.
    """

    handles: dict[str, ActorHandle] = field(default_factory=dict)
    reports: dict[str, ActorReport] = field(default_factory=dict)
    epoch: int = 0
    generations: dict[str, int] = field(default_factory=dict)


async def adopt(pool: ExpertPool, specs: Mapping[str, ActorSpec], timeout_s: float) -> Adopted:
    """Adopt the newest generation of each actor that answers and fits its specification.

    All other actors of the application are ended.
    """
    adopted = Adopted()
    found = await asyncio.to_thread(pool.find)
    found.sort(key=lambda entry: entry[:2])
    # Concurrently, so that hanging actors cost one timeout together.
    described = await asyncio.gather(*(_describe(pool, *entry, timeout_s) for entry in found))
    for (actor_id, generation, handle), report in zip(found, described, strict=True):
        adopted.generations[actor_id] = max(generation, adopted.generations.get(actor_id, 0))
        if report is None:
            pool.kill(handle)
            continue
        adopted.epoch = max(adopted.epoch, report.epoch)
        if actor_id in adopted.handles:  # an older generation that should be gone
            pool.kill(adopted.handles.pop(actor_id))
            del adopted.reports[actor_id]
        spec = specs.get(actor_id)
        if spec is not None and report.digest == spec.digest:
            adopted.handles[actor_id], adopted.reports[actor_id] = handle, report
        else:
            logger.info("%s g%d has another configuration; ending it", actor_id, generation)
            pool.kill(handle)
    return adopted


async def _describe(
    pool: ExpertPool, actor_id: str, generation: int, handle: ActorHandle, timeout_s: float
) -> ActorReport | None:
    """Return an actor's report, or ``None`` where it does not answer."""
    try:
        return await pool.describe(handle, timeout_s)
    except (RayActorError, RayTaskError, TimeoutError) as error:
        logger.warning("%s g%d is not adopted (%s)", actor_id, generation, kind_of(error))
        return None
