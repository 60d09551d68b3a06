"""A fake pool of expert actors, and a controller over it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import RayActorError, RaySystemError

from cluster.controller.controller import Controller
from cluster.controller.records.last_words import LastWords
from cluster.controller.records.ledger import Ledger, LedgerStore
from cluster.errors import InvalidRequestError, StaleEpochError, error_from_wire
from cluster.placement.load import LoadTracker
from cluster.placement.placement import Placement
from cluster.ray_private import MemoryStore
from cluster.reports import ChangeReport, Heard, Samples
from cluster.spec import (
    ActorReport,
    ActorSpec,
    ExpertKey,
    ModelExperts,
    ModelKernel,
    ModelSource,
    PoolSpec,
    ScalingTargets,
)

NUM_EXPERTS = 4
LIMIT_S = 60.0
TARGETS = ScalingTargets(
    min_actors=1,
    max_actors=4,
    target_busy=0.5,
    target_queue_s=0.01,
    upscale_delay_s=0.05,
    downscale_delay_s=0.2,
)


def spec_of(threads: int = 1, model: str = "m", num_gpus: float = 0.0) -> ActorSpec:
    experts = ModelExperts(model, (0, 1), NUM_EXPERTS, 10)
    source = ModelSource("path", "float32", experts, "")
    return ActorSpec("app", (source,), 0.1, num_gpus, threads, 100)


@dataclass(eq=False)
class FakeActor:
    """An actor as the pool's callers see it; a test may kill or hang it."""

    actor_id: str
    generation: int
    digest: str
    epoch: int
    pid: int
    keys: list[ExpertKey] = field(default_factory=list)
    tokens: dict[ExpertKey, int] = field(default_factory=dict)
    alive: bool = True
    killed: bool = False
    hung: bool = False
    node: str = "node"
    heartbeats: int = 0
    loads: int = 0
    busy_s: float = 0.0
    free_bytes: int = 10**9
    kernel_class: str = "fused"
    device: str = "cpu"
    steps: int = 0
    failed_tests: int = 0
    asked_s: float = field(default_factory=time.monotonic)

    def report(self) -> ActorReport:
        return ActorReport(
            actor_id=self.actor_id,
            generation=self.generation,
            digest=self.digest,
            epoch=self.epoch,
            pid=self.pid,
            node=self.node,
            device=self.device,
            experts=tuple(sorted(self.keys)),
            weight_bytes=10 * len(self.keys),
            tokens=dict(self.tokens),
            queued_rows=0,
            steps=self.steps,
            failed_tests=self.failed_tests,
            failure="the device is gone" if self.failed_tests else "",
            busy_s=self.busy_s,
            free_bytes=self.free_bytes,
            kernels=tuple(ModelKernel(m, self.kernel_class) for m in {k.model for k in self.keys}),
        )

    async def _goes_on(self) -> None:
        while self.hung:
            await asyncio.sleep(0.001)

    async def answer(self, epoch: int | None, timeout_s: float | None) -> ActorReport:
        if not self.alive:
            raise RayActorError
        if self.hung:
            await asyncio.wait_for(self._goes_on(), timeout_s)
        if epoch is not None:
            if epoch < self.epoch:
                raise StaleEpochError(f"is older than {self.epoch}", "epoch")
            self.epoch = epoch
        return self.report()


class FakePool:
    """Stands in for :class:`cluster.controller.records.pool.ExpertPool`; notes the calls.

    ``store`` stands in for Ray's own, so that a next controller over this pool finds the ledger.
    """

    def __init__(self, *node_ids: str, digest: str | None = None) -> None:
        """``node_ids`` are Ray's nodes; actors are put on them in turn."""
        self.digest = digest or spec_of().digest
        self.actors: list[FakeActor] = []
        self.unloads: list[tuple[str, list[ExpertKey]]] = []
        self.store = MemoryStore()
        self.looks = 0
        self.node_ids = list(node_ids) or ["node"]
        self.work_s = 0.0
        """What all actors together compute in each second."""
        self.draining_ids: set[str] = set()
        self.kernel_classes: dict[str, str] = {}
        """The kernel classes of actors, by id, that are not of class "fused"."""
        self.load_gate: Callable[[FakeActor], Awaitable[object]] | None = None
        self.created: Callable[[FakeActor], None] = lambda actor: None
        """Changes an actor when it is created."""
        self._pids = itertools.count(1000)

    def hold_loads(self, actor_id: str = "", is_hung: bool = False) -> asyncio.Event:
        """Have an actor's loads, or all, wait for an event; if ``is_hung``, it answers nothing."""
        event = asyncio.Event()

        async def wait(actor: FakeActor) -> None:
            if actor_id in ("", actor.actor_id):
                actor.hung = is_hung
                await event.wait()
                actor.hung = False

        self.load_gate = wait
        return event

    def add(self, actor_id: str, generation: int, epoch: int, /, **changes: Any) -> FakeActor:
        actor = FakeActor(actor_id, generation, self.digest, epoch, next(self._pids))
        for name, value in changes.items():
            setattr(actor, name, value)
        self.actors.append(actor)
        return actor

    def create(
        self, spec: ActorSpec, actor_id: str, generation: int, epoch: int, node: str | None = None
    ) -> FakeActor:
        node = node or self.node_ids[len(self.actors) % len(self.node_ids)]
        kernel_class = self.kernel_classes.get(actor_id, "fused")
        actor = self.add(actor_id, generation, epoch, node=node, kernel_class=kernel_class)
        self.created(actor)
        return actor

    def nodes(self) -> list[str]:
        self.looks += 1
        return list(self.node_ids)

    def nodes_for(self, spec: ActorSpec) -> list[str]:
        return list(self.node_ids)

    def draining(self) -> set[str]:
        return set(self.draining_ids)

    async def drain_node(self, node: str, dry_run: bool) -> None:
        if len(self.node_ids) == 1:
            raise InvalidRequestError(f"{node} is the head", "target")
        if not dry_run:
            self.draining_ids.add(node)
            self.node_ids = [other for other in self.node_ids if other != node]

    def shortage(self, spec: ActorSpec) -> str:
        return "it needs GPU 1"

    def last_words(self, actor_id: str, generation: int) -> str:
        return LastWords("app", self.store).take(actor_id, generation)

    def find(self) -> list[tuple[str, int, FakeActor]]:
        return [(a.actor_id, a.generation, a) for a in self.actors if a.alive]

    async def describe(self, actor: FakeActor, timeout_s: float, epoch: int = 0) -> ActorReport:
        report = await actor.answer(None, timeout_s)
        actor.epoch = max(actor.epoch, epoch)
        return report

    async def heartbeat(self, actor: FakeActor, epoch: int) -> ActorReport:
        actor.heartbeats += 1
        self._work(actor)
        return await actor.answer(epoch, None)

    def _work(self, actor: FakeActor) -> None:
        """Have an actor do its part of the work since it was asked last."""
        now_s = time.monotonic()
        holders = sum(bool(actor.keys) for actor in self.actors if actor.alive)
        if actor.keys:
            actor.busy_s += min(self.work_s / holders, 1.0) * (now_s - actor.asked_s)
        actor.asked_s = now_s

    async def load(
        self,
        actor: FakeActor,
        epoch: int,
        spec: ActorSpec,
        keys: Sequence[ExpertKey],
        timeout_s: float,
    ) -> ActorReport:
        assert {key.model for key in keys} <= {source.experts.model for source in spec.models}
        actor.loads += 1
        if self.load_gate is not None:
            await self.load_gate(actor)
        await actor.answer(epoch, timeout_s)
        actor.keys = sorted({*actor.keys, *keys})
        return actor.report()

    async def unload(
        self, actor: FakeActor, epoch: int, keys: Sequence[ExpertKey], timeout_s: float
    ) -> ActorReport:
        self.unloads.append((actor.actor_id, list(keys)))
        await actor.answer(epoch, timeout_s)
        actor.keys = sorted(set(actor.keys) - set(keys))
        return actor.report()

    def kill(self, actor: FakeActor) -> None:
        actor.alive = False
        actor.killed = True

    def ledger(self) -> Ledger:
        """Return what a next controller would find."""
        return LedgerStore("app", self.store).read()

    def of(self, actor_id: str) -> list[FakeActor]:
        return [actor for actor in self.actors if actor.actor_id == actor_id]


@contextmanager
def away(owner: object, *names: str) -> Iterator[list[object]]:
    """Have calls of Ray fail in the body, which gets a list of them."""
    asked: list[object] = []

    def fail(*args: object) -> None:
        asked.append(args)
        raise RaySystemError("the store is away")

    for name in names:
        setattr(owner, name, fail)
    yield asked
    for name in names:
        delattr(owner, name)


def tasks_of(controller: Controller) -> list[asyncio.Task[None]]:
    """Return all tasks that a controller runs."""
    return [*controller._loops, *controller._keeper._tasks.values()]


class Cluster:
    """A controller over a fake pool, and every placement that it ever published."""

    def __init__(
        self,
        num_actors: int = 2,
        pool: FakePool | None = None,
        min_copies: int = 1,
        pools: dict[str, tuple[int, int]] | None = None,
        autoscaling: ScalingTargets | None = None,
        rebalance_period_s: float | None = None,
        model: str = "m",
        redeploy_drain_s: float = 600.0,
        num_gpus: float = 0.0,
    ) -> None:
        """``pools`` has each pool's number of actors and budget; by default there is one."""
        self.spec = spec_of(model=model, num_gpus=num_gpus)
        specs = [
            PoolSpec(name, count, budget, spec_of(threads, model))
            for threads, (name, (count, budget)) in enumerate((pools or {}).items(), 1)
        ] or [PoolSpec("expert", num_actors, None, self.spec, autoscaling)]
        self.specs = {actor_id: pool.actor for pool in specs for actor_id in pool.actor_ids()}
        self.pool = pool or FakePool(digest=self.spec.digest)
        self.controller = Controller(
            "app",
            specs,
            self.pool,
            LedgerStore("app", self.pool.store),
            min_copies,
            rebalance_period_s,
            redeploy_drain_s,
        )
        self.state = self.controller._state
        self.keeper = self.controller._keeper
        self.rebalancer = self.controller._rebalancer
        self.changes = self.rebalancer._changes
        self.published: list[Placement] = []
        publish = self.state.publish

        async def recorded(change: Callable[[Placement], Placement]) -> None:
            await publish(change)
            self.published.append(self.state.placement)

        self.state.publish = recorded  # type: ignore[method-assign]

    async def start(self) -> None:
        await self.controller.start()

    async def until(self, condition: Callable[[Placement], bool]) -> Placement:
        """Wait until the newest published placement satisfies ``condition``."""
        known = (-1, -1)
        async with asyncio.timeout(LIMIT_S):
            while True:
                answer = await self.controller.watch("test", 2, "test", known, 5.0)
                placement: Placement | None = answer["placement"]
                if placement is None:
                    continue
                if condition(placement):
                    return placement
                known = placement.order

    async def complete(self) -> Placement:
        """Wait until every expert has its copies."""
        return await self.until(lambda p: p.fewest_copies() >= self.state.min_copies)

    async def comes(self, actor_id: str, generation: int) -> Placement:
        """Wait until a generation of an actor is published."""
        return await self.until(lambda p: p.generations.get(actor_id) == generation)

    async def superseded(self) -> None:
        """Wait until the controller has stopped all that it runs."""
        await asyncio.wait(tasks_of(self.controller), timeout=LIMIT_S)
        assert all(task.done() for task in tasks_of(self.controller))

    async def stop(self) -> None:
        for task in tasks_of(self.controller):
            task.cancel()


async def started(*args: Any, **options: Any) -> Cluster:
    """Start a cluster (:class:`Cluster`), which is whole; it ends with the test."""
    cluster = Cluster(*args, **options)
    await cluster.start()
    await cluster.complete()
    return cluster


@asynccontextmanager
async def running(
    num_actors: int = 2, pool: FakePool | None = None, min_copies: int = 1, **options: Any
) -> AsyncIterator[Cluster]:
    cluster = Cluster(num_actors, pool, min_copies, **options)
    await cluster.start()
    try:
        yield cluster
    finally:
        await cluster.stop()


@asynccontextmanager
async def router_of(
    cluster: Cluster,
    heard: Callable[[], Mapping[str, Heard]] = dict,
    model: str = "m",
    samples: Callable[[], Samples | None] = lambda: None,
) -> AsyncIterator[list[Placement]]:
    """Have a router of a model call again and again, with what it has heard and measured.

    Yields the placements that it has got.
    """
    got: list[Placement] = []

    async def watch() -> None:
        while True:
            known, own = got[-1].order if got else (-1, -1), samples()
            answer = await cluster.controller.watch(
                "router", hash(model), "n", known, 0.05, own, model, heard=heard()
            )
            if answer["placement"] is not None:
                got.append(answer["placement"])

    task = asyncio.create_task(watch())
    try:
        yield got
    finally:
        task.cancel()
        await asyncio.wait([task])


async def happens(condition: Callable[[], bool]) -> None:
    """Let the event loop run until the condition holds."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.0001)


async def beats(actor: FakeActor, number: int = 3) -> None:
    """Wait for more heartbeats of an actor than a number."""
    since = actor.heartbeats
    await happens(lambda: actor.heartbeats > since + number)


async def settled(cluster: Cluster, min_copies: int) -> Placement:
    """Wait until each actor holds its share and no more, and the placement says just that."""

    def is_settled() -> bool:
        placement = cluster.state.placement
        living = {actor.actor_id: actor for actor in cluster.pool.actors if actor.alive}
        shares = cluster.state.shares
        return (
            placement.fewest_copies() >= min_copies
            and all(
                sorted(living[actor_id].keys)
                == sorted(keys)
                == sorted(key for key, actors in placement.holders.items() if actor_id in actors)
                for actor_id, keys in shares.items()
                if actor_id in living
            )
            and living.keys() == shares.keys()
        )

    await happens(is_settled)
    return cluster.state.placement


def restart(tracker: LoadTracker) -> None:
    """Have a tracker forget all load."""
    for name, value in vars(LoadTracker(time.monotonic())).items():
        setattr(tracker, name, value)


async def busy(cluster: Cluster, rates: Mapping[ExpertKey, int]) -> None:
    """Have actors report that each expert has computed so many rows since the last heartbeat."""
    tracker = cluster.rebalancer.tracker
    restart(tracker)
    placement = cluster.state.placement
    actors = cluster.pool.actors
    before = {actor.actor_id: actor.heartbeats for actor in actors}  # others may yet come up
    await happens(lambda: all(a.heartbeats > before.get(a.actor_id, 0) + 1 for a in actors))
    for expert, count in rates.items():
        [first, *_] = placement.holders[expert]
        tokens = cluster.pool.of(first)[-1].tokens
        tokens[expert] = tokens.get(expert, 0) + count
    for actor_id in cluster.state.handles:  # at once, so that nobody sees a part of the load
        cluster.keeper.heartbeat_now(actor_id)
    await happens(lambda: tracker.tokens_per_s(time.monotonic()).keys() == rates.keys())


async def done(call: Awaitable[dict[str, Any]]) -> ChangeReport:
    outcome = await call
    if "error" in outcome:
        raise error_from_wire(outcome["error"])
    report: ChangeReport = outcome["report"]
    return report


def never_lost(cluster: Cluster, since: int = 0) -> bool:
    """Tell whether every expert had a copy in all placements published ``since``."""
    return all(not placement.missing() for placement in cluster.published[since:])


def sizes(placement: Placement) -> dict[str, int]:
    """Return how many experts each actor holds."""
    counts = dict.fromkeys(placement.generations, 0)
    for actors in placement.holders.values():
        for actor_id in actors:
            counts[actor_id] += 1
    return counts


async def autoscaled(pool: FakePool | None = None, **changes: Any) -> Cluster:
    """Start a cluster whose one pool follows its load."""
    return await started(pool=pool, autoscaling=replace(TARGETS, **changes))
