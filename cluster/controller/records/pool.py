"""Ray's side of the expert actors: creates, finds, calls and kills them, and decides nothing.

Every call has a deadline, except the heartbeat: its caller decides when to give up.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.controller.records.last_words import LastWords
from cluster.environment import actor_environment
from cluster.errors import InvalidRequestError
from cluster.ray_private import draining_nodes, free_resources, ray_store
from cluster.spec import (
    ACTOR_NAMESPACE,
    ActorReport,
    ActorSpec,
    ExpertKey,
    actor_name,
    parse_actor_name,
)

DATA_CALLS = 32
"""How many dispatch calls an actor takes at once, each on its own thread. A router has at most one
in flight, so messages of this many routers can merge into one batch."""
CONTROL_CALLS = 4
HEAD = "node:__internal_head__"
"""The resource by which Ray marks the head."""
DRAIN_TIMEOUT_S = 60.0
RESEND_S = 0.1
"""How long to wait before sending a call again that Ray lost."""


def actor_options(
    spec: ActorSpec, name: str, environment: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the Ray options of an expert actor: detached, never restarted by Ray itself.

    ``environment`` adds variables to those of every expert actor's process.
    """
    return {
        "name": name,
        "namespace": ACTOR_NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "num_cpus": spec.num_cpus,
        "num_gpus": spec.num_gpus,
        "resources": dict(spec.resources),
        "scheduling_strategy": "SPREAD",
        "max_concurrency": DATA_CALLS,
        "enable_task_events": False,
        "runtime_env": {"env_vars": {**actor_environment(spec.threads), **environment}},
    }


class ExpertPool:
    """The actors of one application, all of one injected class.

    Calls of a dead actor raise ``RayActorError``. What an actor raises itself comes as it is, but
    from :meth:`describe` as ``RayTaskError``.
    """

    def __init__(
        self,
        app: str,
        actor_class: type,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """``actor_class`` takes (spec, actor_id, generation, epoch).

        ``environment`` adds variables to the actors' processes. It is not part of their
        specification: an actor that was started with other variables is adopted.
        """
        self._app = app
        self._environment = environment
        self._remote = ray.remote(concurrency_groups={"control": CONTROL_CALLS})(actor_class)

    def create(
        self, spec: ActorSpec, actor_id: str, generation: int, epoch: int, node: str | None = None
    ) -> ActorHandle:
        """Ask Ray for a new actor; returns at once, the first call waits for its start.

        The actor starts on ``node`` if that is given and alive, and waits there for resources.
        Otherwise Ray chooses the node.
        """
        name = actor_name(self._app, actor_id, generation)
        options = actor_options(spec, name, self._environment)
        if node is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
        return self._remote.options(**options).remote(spec, actor_id, generation, epoch)

    def find(self) -> list[tuple[str, int, ActorHandle]]:
        """Return (actor_id, generation, handle) of every living actor of the application."""
        found = []
        for entry in list_named_actors(all_namespaces=True):
            parsed = parse_actor_name(entry["name"], self._app)
            if parsed is None or entry["namespace"] != ACTOR_NAMESPACE:
                continue
            try:
                handle = ray.get_actor(entry["name"], namespace=ACTOR_NAMESPACE)
            except ValueError:  # it died between the two calls
                continue
            found.append((*parsed, handle))
        return found

    def last_words(self, actor_id: str, generation: int) -> str:
        """Return why an actor ended its own process, empty if it did not say; works once."""
        return LastWords(self._app, ray_store()).take(actor_id, generation)

    def shortage(self, spec: ActorSpec) -> str:
        """Say which resources an actor waits for that Ray has not started."""
        return shortage(_needed(spec), ray.nodes())

    def nodes_for(self, spec: ActorSpec) -> list[str]:
        """Return the living nodes that have free resources for an actor and are not draining."""
        needed, free = _needed(spec), free_resources()
        draining = self.draining()
        return [
            node["NodeID"]
            for node in _fitting(needed, ray.nodes())
            if _has(free.get(node["NodeID"], {}), needed) and node["NodeID"] not in draining
        ]

    def nodes(self) -> list[str]:
        """Return the living nodes."""
        return [node["NodeID"] for node in ray.nodes() if node["Alive"]]

    def draining(self) -> set[str]:
        """Return the nodes that Ray is about to take away: scaled down, or with a spot notice."""
        return draining_nodes()

    async def drain_node(self, node: str, dry_run: bool) -> None:
        """Have Ray start nothing more on a node, and Serve replace its replicas there.

        A dry run only looks whether the node is the head. Raises :class:`InvalidRequestError` with
        Ray's reason if it refuses.
        """
        if any(n["NodeID"] == node and HEAD in n["Resources"] for n in ray.nodes()):
            raise InvalidRequestError(
                f"{node} is the head of the Ray cluster, which lives as long as the cluster; drain "
                "its actors one by one",
                "target",
            )
        if dry_run:
            return
        address = ray.get_runtime_context().gcs_address
        options = ("--address", address, "--node-id", node, "--reason-message", "expertmesh drain")
        why = ("--reason", "DRAIN_NODE_REASON_PREEMPTION")
        ray_command = (sys.executable, "-m", "ray.scripts.scripts", "drain-node")
        drains = await asyncio.create_subprocess_exec(
            *ray_command, *options, *why, stdout=PIPE, stderr=STDOUT
        )
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            told, _ = await drains.communicate()
        if drains.returncode:
            said = " ".join(told.decode(errors="replace").split())
            raise InvalidRequestError(f"Ray does not drain {node}: {said:.400}", "target")

    async def describe(self, handle: ActorHandle, timeout_s: float, epoch: int = 0) -> ActorReport:
        """Return an actor's report without renewing its lease.

        With the ``epoch`` of a controller that adopts it, the actor takes no orders of older ones.
        """
        async with asyncio.timeout(timeout_s):
            report: ActorReport = await handle.describe.remote(epoch)
            return report

    async def heartbeat(self, handle: ActorHandle, epoch: int) -> ActorReport:
        """Renew an actor's lease and return its report; has no deadline of its own."""
        return await _answered(lambda: handle.heartbeat.remote(epoch))

    async def load(
        self,
        handle: ActorHandle,
        epoch: int,
        spec: ActorSpec,
        keys: Sequence[ExpertKey],
        timeout_s: float,
    ) -> ActorReport:
        """Have an actor load experts of the models of ``spec``; returns when it holds them."""
        async with asyncio.timeout(timeout_s):
            return await _answered(lambda: handle.load.remote(epoch, spec, list(keys)))

    async def unload(
        self, handle: ActorHandle, epoch: int, keys: Sequence[ExpertKey], timeout_s: float
    ) -> ActorReport:
        """Have an actor free experts' memory."""
        async with asyncio.timeout(timeout_s):
            return await _answered(lambda: handle.unload.remote(epoch, list(keys)))

    def kill(self, handle: ActorHandle) -> None:
        """End an actor at once; routers see it as dead and ask other copies."""
        ray.kill(handle, no_restart=True)


def _needed(spec: ActorSpec) -> dict[str, float]:
    needed = {"CPU": spec.num_cpus, "GPU": spec.num_gpus, **spec.resources}
    return {name: amount for name, amount in needed.items() if amount}


def _fitting(
    needed: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    return [node for node in nodes if node["Alive"] and _has(node["Resources"], needed)]


def _has(resources: Mapping[str, float], needed: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0) >= amount for name, amount in needed.items())


def shortage(needed: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> str:
    """Say why no node takes an actor that needs these resources; ``nodes`` as Ray lists them."""
    asked = ", ".join(f"{name} {amount:g}" for name, amount in needed.items())
    if fitting := _fitting(needed, nodes):
        return f"it needs {asked}, which is in use on all nodes that have it ({len(fitting)})"
    alive = [node for node in nodes if node["Alive"]]
    lacking = [n for n in needed if all(node["Resources"].get(n, 0) < needed[n] for node in alive)]
    what = f"enough {', '.join(lacking)}" if lacking else "all of these"
    return f"it needs {asked}; none of the {len(alive)} nodes has {what}"


async def _answered(call: Callable[[], Awaitable[ActorReport]]) -> ActorReport:
    """Call an actor; raises its own exception instead of Ray's wrapper with its stack.

    A call that Ray lost on its way says nothing of the actor, and is sent again: all orders may be
    given twice.
    """
    while True:
        try:
            return await call()
        except ActorUnavailableError:
            await asyncio.sleep(RESEND_S)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None


def kind_of(error: BaseException) -> str:
    """Return an error's class by name."""
    return type(error).__name__
