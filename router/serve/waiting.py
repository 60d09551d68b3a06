"""Says why a replica waits for a place.

A replica is an actor of Ray, which lets it wait for ever for resources that no node has free. Serve
says so in a log of its own alone. Nodes may come later, so nothing is refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayError

from cluster.controller.keeper import PLACE_NOTICE_S
from cluster.controller.pool import shortage

ASK_TIMEOUT_S = 5
MAX_NOTICE_S = 320.0

logger = logging.getLogger("expertmesh.controller")

Resources = tuple[tuple[str, float], ...]
"""Amounts by name, in the order of ``CPU``, ``GPU`` and others."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A deployment with replicas that Ray has not placed, and what each needs."""

    deployment: str
    needed: Resources
    num_replicas: int


@dataclass(slots=True)
class Notices:
    """When a deployment's wait is logged: after :data:`PLACE_NOTICE_S`, then ever more seldom."""

    _since_s: dict[str, float] = field(default_factory=dict)
    _next_s: dict[str, float] = field(default_factory=dict)

    def due(self, waiting: Iterable[Waiting], now_s: float) -> list[Waiting]:
        """Return the waits to log now; a deployment that waits no more is forgotten."""
        waits = {wait.deployment: wait for wait in waiting}
        for times in (self._since_s, self._next_s):
            for name in times.keys() - waits.keys():
                del times[name]
        found = []
        for name, wait in waits.items():
            since_s = self._since_s.setdefault(name, now_s)
            if now_s < self._next_s.setdefault(name, since_s + PLACE_NOTICE_S):
                continue
            self._next_s[name] = now_s + min(max(now_s - since_s, PLACE_NOTICE_S), MAX_NOTICE_S)
            found.append(wait)
        return found


async def say_why_replicas_wait(app: str) -> None:
    """Log which replicas of an application wait for a place, and for what.

    Ends, with a line, where Ray's answers are others than expected: nothing else depends on it.
    """
    notices = Notices()
    while True:
        try:
            waiting = await asyncio.to_thread(waiting_replicas, app)
            for wait in notices.due(waiting, time.monotonic()):
                logger.warning("%s", line_of(wait, await asyncio.to_thread(ray.nodes)))
        except (RayError, RuntimeError) as error:  # Ray's control service may be away for a while
            logger.warning("Ray cannot be asked which replicas wait for a place: %s", error)
        except Exception:  # most of this is Ray's own, and changes with its releases
            logger.warning("this Ray does not tell which replicas wait for a place", exc_info=True)
            return
        await asyncio.sleep(PLACE_NOTICE_S)


def line_of(wait: Waiting, nodes: list[dict[str, object]]) -> str:
    """Say what a deployment's replicas wait for; ``nodes`` as Ray lists them."""
    many = f" for {wait.num_replicas} replicas" if wait.num_replicas > 1 else ""
    return f"{wait.deployment} waits for a place{many}: {shortage(dict(wait.needed), nodes)}"


def waiting_replicas(app: str) -> list[Waiting]:
    """Ask Ray which replicas of an application it has not placed.

    A replica that is placed and whose process starts does not count: Ray no longer looks for its
    resources.
    """
    pending = _pending_replicas(app)
    demanded = _demanded() if pending else frozenset[Resources]()
    return [
        Waiting(deployment, needed, count)
        for (deployment, needed), count in sorted(pending.items())
        if needed in demanded
    ]


def _pending_replicas(app: str) -> Counter[tuple[str, Resources]]:
    # Nothing public tells what an actor needs.
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import ActorTableData
    from ray.serve._private.common import ReplicaID
    from ray.serve._private.constants import SERVE_NAMESPACE

    accessor = state._connect_and_get_accessor()
    pending: Counter[tuple[str, Resources]] = Counter()
    for data in accessor.get_actor_table(None, "PENDING_CREATION"):
        actor = ActorTableData.FromString(data)
        if actor.ray_namespace != SERVE_NAMESPACE or not ReplicaID.is_full_id_str(actor.name):
            continue
        deployment = ReplicaID.from_full_id_str(actor.name).deployment_id
        if deployment.app_name == app:
            pending[deployment.name, resources_of(actor.required_resources)] += 1
    return pending


def _demanded() -> frozenset[Resources]:
    """Return the resources that Ray looks for, one for each kind of actor and task."""
    from ray.autoscaler.v2.sdk import get_cluster_status  # seldom needed

    address = ray.get_runtime_context().gcs_address
    status = get_cluster_status(address, timeout=ASK_TIMEOUT_S)
    return frozenset(
        resources_of(kind.bundle)
        for demand in status.resource_demands.ray_task_actor_demand
        for kind in demand.bundles_by_count
    )


def resources_of(amounts: Mapping[str, float]) -> Resources:
    """Return amounts above 0 in one order, as Ray counts them, in ten thousandths."""
    own = ("CPU", "GPU")
    order = sorted(amounts, key=lambda name: (name not in own, name))
    return tuple((name, round(amounts[name], 4)) for name in order if amounts[name] > 0)
