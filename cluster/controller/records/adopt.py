"""Adoption: a controller that starts takes over living actors, and ends those that do not fit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from cluster.controller.records.pool import ExpertPool, kind_of
from cluster.spec import ActorReport, ActorSpec

logger = logging.getLogger("expertmesh.controller")


@dataclass(slots=True)
class Adopted:
    """The adopted actors by id, and the epoch and generations that the new controller must exceed.

    ``epoch`` is the highest that any living actor had seen. ``generations`` has the last generation
    of every actor that was found, even of those that were ended. ``silent`` are the adopted actors
    that have not answered yet; the others have a report.
    """

    handles: dict[str, ActorHandle] = field(default_factory=dict)
    reports: dict[str, ActorReport] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    epoch: int = 0
    generations: dict[str, int] = field(default_factory=dict)


async def adopt(
    pool: ExpertPool,
    specs: Mapping[str, ActorSpec],
    epoch: int,
    timeout_s: float,
    check_epoch: Callable[[], Awaitable[None]],
) -> Adopted:
    """Adopt the newest generation of each actor that answers and matches its specification.

    An actor that answers no longer takes orders of an epoch before ``epoch``: an earlier controller
    that is still alive would otherwise take away experts that the actor has reported.

    An actor that is silent for ``timeout_s`` is adopted too, unless another generation of it
    answers: the network between it and the controller may be at fault. All other actors of the
    application are ended. ``check_epoch`` is called before that, and raises if the caller may not
    end actors.
    """
    adopted = Adopted()
    found = await asyncio.to_thread(pool.find)
    found.sort(key=lambda entry: entry[:2])
    # Concurrently, so that hanging actors cost one timeout together.
    described = await asyncio.gather(
        *(_describe(pool, *entry, epoch, timeout_s) for entry in found)
    )
    unfit: list[ActorHandle] = []
    silent: dict[str, ActorHandle] = {}
    for (actor_id, generation, handle), answer in zip(found, described, strict=True):
        adopted.generations[actor_id] = max(generation, adopted.generations.get(actor_id, 0))
        if isinstance(answer, TimeoutError) and actor_id in specs:
            if actor_id in silent:  # an older generation that should be gone
                unfit.append(silent[actor_id])
            silent[actor_id] = handle
            continue
        if isinstance(answer, BaseException):
            unfit.append(handle)
            continue
        adopted.epoch = max(adopted.epoch, answer.epoch)
        if actor_id in adopted.handles:  # an older generation that should be gone
            unfit.append(adopted.handles.pop(actor_id))
            del adopted.reports[actor_id]
        spec = specs.get(actor_id)
        if spec is not None and answer.digest == spec.digest:
            adopted.handles[actor_id], adopted.reports[actor_id] = handle, answer
        else:
            logger.info("%s g%d has a different configuration; ending it", actor_id, generation)
            unfit.append(handle)
    for actor_id, handle in silent.items():
        if actor_id in adopted.handles:
            unfit.append(handle)
        else:
            adopted.handles[actor_id] = handle
            adopted.silent.add(actor_id)
    if unfit:
        await check_epoch()
    for handle in unfit:
        pool.kill(handle)
    return adopted


async def _describe(
    pool: ExpertPool,
    actor_id: str,
    generation: int,
    handle: ActorHandle,
    epoch: int,
    timeout_s: float,
) -> ActorReport | Exception:
    """Return an actor's report, or the error that prevented it."""
    try:
        return await pool.describe(handle, timeout_s, epoch)
    except (RayActorError, RayTaskError, TimeoutError) as error:
        logger.warning("%s g%d did not report (%s)", actor_id, generation, kind_of(error))
        # Unreachable for the moment, like a silent actor.
        return TimeoutError() if isinstance(error, ActorUnavailableError) else error
