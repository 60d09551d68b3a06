"""Ray's side of the expert pool: creating, finding, asking and killing expert actors.

Nothing is decided here; :mod:`cluster.controller.controller` decides. Every wait but a heartbeat's,
which the controller looks at, has a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state  # nothing public tells these
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.controller.ledger import LedgerStore
from cluster.spec import (
    ACTOR_NAMESPACE,
    ActorReport,
    ActorSpec,
    ExpertKey,
    actor_name,
    parse_actor_name,
)

DATA_CALLS = 32
"""How many dispatch calls may be in an actor at once, each on a thread of its own; a router has at
most one under way, so this is how many routers' messages can merge."""
CONTROL_CALLS = 4
AGAIN_S = 0.1
SERVING_ENVIRONMENT = {
    # Ray gives workers nice 15, but only once they have started: one that starts, as after a fault,
    # would halt those that serve beside it.
    "RAY_worker_niceness": "0",
    # A heap per thread would keep memory that no other thread reuses, and grow for hours.
    "MALLOC_ARENA_MAX": "1",
    # Up to so many bytes Ray carries what it carries in the call itself. Its own 100 KB are fewer
    # than a step's rows of a large model, and by the object store a call takes twice as long.
    "RAY_max_direct_call_object_size": "1048576",
}
"""Environment variables of every process that requests or the control of them go through."""


def actor_options(
    spec: ActorSpec, name: str, environment: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the Ray options of an expert actor: detached, never restarted by Ray itself.

    ``environment`` is what its process is to have beside what every one has.
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
        "runtime_env": {
            "env_vars": {
                **SERVING_ENVIRONMENT,
                # Threads started later than torch.set_num_threads obey only the environment.
                "OMP_NUM_THREADS": str(spec.threads),
                # Rearranged weights must not lie in the heap; plain ones never do (experts.pages).
                "MALLOC_MMAP_THRESHOLD_": "1048576",
                # But what products let go is needed by the next ones; fresh pages cost more.
                "MALLOC_TRIM_THRESHOLD_": "33554432",
                # oneDNN keeps the code that it compiles for each shape of a product, 0.5 MB, and
                # torch a description of it for each thread, 0.5 MB too; both keep 1024 by default,
                # and prompts bring new numbers of rows for ever.
                "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
                "LRU_CACHE_CAPACITY": "1",
                **environment,
            }
        },
    }


class ExpertPool:
    """The actors of one application, all of one injected class."""

    def __init__(
        self,
        app: str,
        specs: Mapping[str, ActorSpec],
        actor_class: type,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """``specs`` are by actor; ``actor_class`` takes (spec, actor_id, generation, epoch).

        ``environment`` is for the processes of all, and not part of what they are made of: an actor
        that has another is adopted.
        """
        self._app = app
        self._specs = specs
        self._environment = environment
        self.ledger = LedgerStore(app)
        self._remote = ray.remote(concurrency_groups={"control": CONTROL_CALLS})(actor_class)

    def create(
        self, actor_id: str, generation: int, epoch: int, node: str | None = None
    ) -> ActorHandle:
        """Ask Ray for a new actor; returns at once, the first call waits for its start.

        It comes on ``node``, when that is given and lives, and waits there for room; else wherever
        Ray puts it.
        """
        spec = self._specs[actor_id]
        options = actor_options(
            spec, actor_name(self._app, actor_id, generation), self._environment
        )
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

    def shortage(self, actor_id: str) -> str:
        """Return what an actor that Ray has not started waits for, for people."""
        return shortage(self._needed(actor_id), ray.nodes())

    def nodes_for(self, actor_id: str) -> list[str]:
        """Return the living nodes that have room for an actor now, and are to stay."""
        needed, free = self._needed(actor_id), available_resources_per_node()
        draining = self.draining()
        return [
            node["NodeID"]
            for node in _fitting(needed, ray.nodes())
            if _has(free.get(node["NodeID"], {}), needed) and node["NodeID"] not in draining
        ]

    def nodes(self) -> list[str]:
        """Return the nodes that live."""
        return [node["NodeID"] for node in ray.nodes() if node["Alive"]]

    def draining(self) -> set[str]:
        """Return the nodes that Ray is about to take away: scaled down, or with a spot notice."""
        return set(state.get_draining_nodes())

    def _needed(self, actor_id: str) -> dict[str, float]:
        spec = self._specs[actor_id]
        needed = {"CPU": spec.num_cpus, "GPU": spec.num_gpus, **spec.resources}
        return {name: amount for name, amount in needed.items() if amount}

    async def describe(self, handle: ActorHandle, timeout_s: float) -> ActorReport:
        """Ask an actor what it is and holds."""
        return await _within(handle.describe.remote(), timeout_s)

    async def heartbeat(self, handle: ActorHandle, epoch: int) -> ActorReport:
        """Renew an actor's lease and get its report; how long to wait is the caller's business.

        A call that Ray lost on its way says nothing of the actor, and is made again.
        """
        while True:
            try:
                report: ActorReport = await handle.heartbeat.remote(epoch)
                return report
            except ActorUnavailableError:
                await asyncio.sleep(AGAIN_S)

    async def load(
        self, handle: ActorHandle, epoch: int, keys: Sequence[ExpertKey], timeout_s: float
    ) -> ActorReport:
        """Have an actor load experts; returns when it holds them."""
        return await _within(handle.load.remote(epoch, list(keys)), timeout_s)

    async def unload(
        self, handle: ActorHandle, epoch: int, keys: Sequence[ExpertKey], timeout_s: float
    ) -> ActorReport:
        """Have an actor let experts go."""
        return await _within(handle.unload.remote(epoch, list(keys)), timeout_s)

    def kill(self, handle: ActorHandle) -> None:
        """End an actor at once; routers see it as dead and try elsewhere."""
        ray.kill(handle, no_restart=True)


def _fitting(
    needed: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    return [node for node in nodes if node["Alive"] and _has(node["Resources"], needed)]


def _has(resources: Mapping[str, float], needed: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0) >= amount for name, amount in needed.items())


def shortage(needed: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> str:
    """Return why no node takes an actor that needs these resources; ``nodes`` as Ray lists them."""
    asked = ", ".join(f"{name} {amount:g}" for name, amount in needed.items())
    if fitting := _fitting(needed, nodes):
        return f"it needs {asked}, which is in use on all nodes that have it ({len(fitting)})"
    alive = [node for node in nodes if node["Alive"]]
    lacking = [n for n in needed if all(node["Resources"].get(n, 0) < needed[n] for node in alive)]
    what = f"so much {', '.join(lacking)}" if lacking else "all of it"
    return f"it needs {asked}; none of the {len(alive)} nodes has {what}"


async def _within(answer: Awaitable[ActorReport], timeout_s: float) -> ActorReport:
    async with asyncio.timeout(timeout_s):
        return await answer


def cause_of(error: RayTaskError) -> Exception:
    """Return the actor's own exception instead of Ray's wrapper with its stack."""
    cause = error.cause
    return cause if isinstance(cause, Exception) else error


def kind_of(error: BaseException) -> str:
    """Return an error's class by name."""
    return type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return what is said of an actor that is replaced because of an error."""
    if isinstance(error, TimeoutError):
        return "does not answer; replacing it"
    if isinstance(error, RayActorError):
        return "died; replacing it"
    return f"{kind_of(error)}; replacing it"
