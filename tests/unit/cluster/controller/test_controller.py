"""The controller over a fake pool: every expert stays on a living actor, and routers are told."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from cluster.controller import anti_affinity as apart_module
from cluster.controller import controller as controller_module
from cluster.controller import liveness as progress
from cluster.controller import loading as loading_module
from cluster.controller import members
from cluster.controller.controller import Controller
from cluster.controller.ledger import Ledger
from cluster.errors import CheckpointError, StaleEpochError
from cluster.placement.placement import Placement
from cluster.reports import ClusterStatus, LoadingStatus, ProcessSamples, ProcessStatus, Samples
from cluster.spec import (
    ActorReport,
    ActorSpec,
    ExpertKey,
    ModelExperts,
    ModelSource,
    PoolSpec,
    ScalingTargets,
)

NUM_EXPERTS = 4
LIMIT_S = 20.0


def spec_of(threads: int = 1) -> ActorSpec:
    experts = ModelExperts("m", (0, 1), NUM_EXPERTS, 10)
    return ActorSpec("app", (ModelSource("path", "float32", experts, ""),), 0.1, 0.0, threads, 100)


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
    asked_s: float = field(default_factory=time.monotonic)

    def report(self) -> ActorReport:
        return ActorReport(
            actor_id=self.actor_id,
            generation=self.generation,
            digest=self.digest,
            epoch=self.epoch,
            pid=self.pid,
            node=self.node,
            device="cpu",
            experts=tuple(sorted(self.keys)),
            weight_bytes=10 * len(self.keys),
            tokens=dict(self.tokens),
            queued_rows=0,
            steps=0,
            busy_s=self.busy_s,
        )

    async def answer(self, epoch: int | None, timeout_s: float | None) -> ActorReport:
        if not self.alive:
            raise RayActorError
        if self.hung:
            await asyncio.wait_for(asyncio.Event().wait(), timeout_s)
        if epoch is not None:
            if epoch < self.epoch:
                raise StaleEpochError(f"is older than {self.epoch}", "epoch")
            self.epoch = epoch
        return self.report()


class FakeLedger:
    """Stands in for :class:`cluster.controller.ledger.LedgerStore`."""

    def __init__(self) -> None:
        self.kept = Ledger()

    def read(self) -> Ledger:
        return self.kept

    def write(self, ledger: Ledger) -> None:
        self.kept = ledger

    def clear(self) -> None:
        self.kept = Ledger()


class FakePool:
    """Stands in for :class:`cluster.controller.pool.ExpertPool`; keeps what was asked of it."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.actors: list[FakeActor] = []
        self.unloads: list[tuple[str, list[ExpertKey]]] = []
        self.ledger = FakeLedger()
        self.looks = 0
        self.node_ids = ["node"]
        """Ray's nodes; actors are put on them in turn."""
        self.work_s = 0.0
        """What all actors together compute in each second."""
        self.draining_ids: set[str] = set()
        self.load_gate: Callable[[FakeActor], Awaitable[object]] | None = None
        self._pids = itertools.count(1000)

    def add(self, actor_id: str, generation: int, epoch: int, /, **changes: Any) -> FakeActor:
        actor = FakeActor(actor_id, generation, self.digest, epoch, next(self._pids))
        for name, value in changes.items():
            setattr(actor, name, value)
        self.actors.append(actor)
        return actor

    def create(
        self, actor_id: str, generation: int, epoch: int, node: str | None = None
    ) -> FakeActor:
        node = node or self.node_ids[len(self.actors) % len(self.node_ids)]
        return self.add(actor_id, generation, epoch, node=node)

    def nodes(self) -> list[str]:
        self.looks += 1
        return list(self.node_ids)

    def nodes_for(self, actor_id: str) -> list[str]:
        return list(self.node_ids)

    def draining(self) -> set[str]:
        return set(self.draining_ids)

    def shortage(self, actor_id: str) -> str:
        return "it needs GPU 1"

    def find(self) -> list[tuple[str, int, FakeActor]]:
        return [(a.actor_id, a.generation, a) for a in self.actors if a.alive]

    async def describe(self, actor: FakeActor, timeout_s: float) -> ActorReport:
        return await actor.answer(None, timeout_s)

    async def heartbeat(self, actor: FakeActor, epoch: int) -> ActorReport:
        actor.heartbeats += 1
        self._work(actor)
        return await actor.answer(epoch, None)

    def _work(self, actor: FakeActor) -> None:
        """Have an actor do its part of the work since it was asked last."""
        now_s = time.monotonic()
        holders = sum(bool(one.keys) for one in self.actors if one.alive)
        if actor.keys:
            actor.busy_s += min(self.work_s / holders, 1.0) * (now_s - actor.asked_s)
        actor.asked_s = now_s

    async def load(
        self, actor: FakeActor, epoch: int, keys: Sequence[ExpertKey], timeout_s: float
    ) -> ActorReport:
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

    def of(self, actor_id: str) -> list[FakeActor]:
        return [actor for actor in self.actors if actor.actor_id == actor_id]


@pytest.fixture(autouse=True)
def _short_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "HEARTBEAT_PERIOD_S", 0.01)
    monkeypatch.setattr(controller_module, "ADOPT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(controller_module, "LOOK_S", 0.01)
    monkeypatch.setattr(progress, "LOOK_S", 0.01)
    monkeypatch.setattr(progress, "SILENT_S", 0.1)
    monkeypatch.setattr(controller_module, "FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(controller_module, "MAX_RETRY_S", 0.01)


def tasks_of(controller: Controller) -> list[asyncio.Task[None]]:
    """Return all that a controller runs."""
    return [*controller._tasks, *controller._keepers.values()]


class Cluster:
    """A controller over a fake pool, and every placement that it ever published."""

    def __init__(
        self,
        num_actors: int = 2,
        pool: FakePool | None = None,
        min_copies: int = 1,
        pools: dict[str, tuple[int, int]] | None = None,
        autoscaling: ScalingTargets | None = None,
    ) -> None:
        """``pools`` has each pool's number of actors and budget; by default there is one."""
        self.spec = spec_of()
        specs = [
            PoolSpec(name, count, budget, spec_of(threads))
            for threads, (name, (count, budget)) in enumerate((pools or {}).items(), 1)
        ] or [PoolSpec("expert", num_actors, None, self.spec, autoscaling)]
        self.specs = {actor_id: pool.actor for pool in specs for actor_id in pool.actor_ids()}
        self.controller = Controller("app", specs, object, min_copies)
        self.pool = pool or FakePool(self.spec.digest)
        self.controller._pool = self.pool  # type: ignore[assignment]
        self.published: list[Placement] = []
        publish = self.controller._publish

        async def recorded(change: Callable[[Placement], Placement]) -> None:
            await publish(change)
            self.published.append(self.controller._placement)

        self.controller._publish = recorded  # type: ignore[method-assign]

    async def start(self) -> None:
        await self.controller.start()

    async def until(self, condition: Callable[[Placement], bool]) -> Placement:
        """Wait until the newest published placement satisfies ``condition``."""
        known = (-1, -1)
        async with asyncio.timeout(LIMIT_S):
            while True:
                told = await self.controller.watch("test", 2, "test", known, 5.0)
                wire = told["placement"]
                if wire is None:
                    continue
                placement = Placement.from_wire(wire)
                if condition(placement):
                    return placement
                known = placement.order

    async def complete(self) -> Placement:
        return await self.until(lambda placement: not placement.missing())

    async def stop(self) -> None:
        for task in tasks_of(self.controller):
            task.cancel()


@asynccontextmanager
async def running(
    num_actors: int = 2, pool: FakePool | None = None, min_copies: int = 1
) -> AsyncIterator[Cluster]:
    cluster = Cluster(num_actors, pool, min_copies)
    await cluster.start()
    try:
        yield cluster
    finally:
        await cluster.stop()


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine on an event loop of its own, within a time limit."""

    async def limited() -> None:
        async with asyncio.timeout(2 * LIMIT_S):
            await test()

    asyncio.run(limited())


async def happens(condition: Callable[[], bool]) -> None:
    """Let the event loop run until the condition holds."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0)


def test_actors_are_started_loaded_and_published() -> None:
    async def test() -> None:
        async with running(3) as cluster:
            placement = await cluster.complete()
            assert placement.epoch == 1
            assert placement.generations == {"expert-0": 1, "expert-1": 1, "expert-2": 1}
            assert all(len(actors) == 1 for actors in placement.holders.values())
            for actor in cluster.pool.actors:
                assert actor.epoch == 1
                held = [k for k, actors in placement.holders.items() if actor.actor_id in actors]
                assert sorted(held) == sorted(actor.keys)

    run(test)


def test_nothing_is_published_before_it_is_loaded() -> None:
    async def test() -> None:
        gate = asyncio.Event()
        cluster = Cluster(1)
        cluster.pool.load_gate = lambda actor: gate.wait()
        await cluster.start()
        await happens(lambda: bool(cluster.pool.actors) and cluster.pool.actors[0].loads == 1)
        assert len(cluster.controller._placement.missing()) == 2 * NUM_EXPERTS
        gate.set()
        await cluster.complete()
        await cluster.stop()

    run(test)


def test_while_actors_load_status_and_log_tell_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading_module, "NOTICE_S", 0.02)
    monkeypatch.setattr(controller_module.logger, "propagate", True)

    async def test() -> None:
        gate = asyncio.Event()
        cluster = Cluster(2)
        cluster.pool.load_gate = lambda actor: gate.wait()
        await cluster.start()
        await happens(lambda: sum(actor.loads for actor in cluster.pool.actors) == 2)
        told = ClusterStatus.from_wire(await cluster.controller.status()).loading
        assert told == tuple(LoadingStatus(f"expert-{i}", 0, NUM_EXPERTS, 0) for i in range(2))
        [first] = cluster.pool.of("expert-0")
        first.keys = [ExpertKey("m", 0, 0), ExpertKey("m", 0, 1)]
        await happens(
            lambda: (
                cluster.controller._status().loading[0]
                == LoadingStatus("expert-0", 2, NUM_EXPERTS, 20)
            )
        )
        await happens(lambda: "loading: 2 of 8 experts (25%, 0.0 GB) on 2 actors" in caplog.text)
        gate.set()
        await cluster.complete()
        assert cluster.controller._status().loading == ()
        await cluster.stop()

    with caplog.at_level("INFO", controller_module.logger.name):
        run(test)


def test_an_actor_that_dies_while_it_loads_loads_no_more() -> None:
    async def test() -> None:
        gate = asyncio.Event()
        cluster = Cluster(1)
        cluster.pool.load_gate = lambda actor: gate.wait()
        await cluster.start()
        await happens(lambda: bool(cluster.controller._status().loading))
        cluster.pool.actors[0].alive = False
        gate.set()
        await happens(lambda: len(cluster.pool.actors) == 2)
        await cluster.complete()
        assert cluster.controller._status().loading == ()
        await cluster.stop()

    run(test)


def test_a_dead_actor_is_replaced_by_the_next_generation_and_its_loss_published_first() -> None:
    async def test() -> None:
        async with running() as cluster:
            before = await cluster.complete()
            [victim] = cluster.pool.of("expert-1")
            victim.alive = False
            after = await cluster.until(lambda p: p.generations.get("expert-1") == 2)
            assert after.missing() == []
            assert after.generations["expert-0"] == 1
            [loss] = [p for p in cluster.published if before.order < p.order < after.order]
            assert loss.generations == {"expert-0": 1}
            assert loss.missing() == [k for k, a in before.holders.items() if a == ("expert-1",)]
            assert [actor.generation for actor in cluster.pool.of("expert-1")] == [1, 2]

    run(test)


def test_an_actor_that_dies_again_and_again_is_always_replaced() -> None:
    async def test() -> None:
        async with running(1) as cluster:
            for generation in range(1, 6):
                placement = await cluster.until(
                    lambda p, g=generation: p.generations == {"expert-0": g}  # type: ignore[misc]
                )
                assert placement.missing() == []
                cluster.pool.actors[-1].alive = False

    run(test)


def test_a_hung_actor_is_killed_and_replaced() -> None:
    async def test() -> None:
        async with running() as cluster:
            await cluster.complete()
            [victim] = cluster.pool.of("expert-0")
            victim.hung = True
            await cluster.until(lambda p: p.generations.get("expert-0") == 2)
            assert victim.killed

    run(test)


@pytest.mark.parametrize("failure", [CheckpointError("gone", "file"), TimeoutError(), OSError()])
def test_an_actor_that_fails_to_load_is_killed_and_tried_again_until_it_works(
    failure: Exception,
) -> None:
    async def test() -> None:
        cluster = Cluster(1)

        async def fail(actor: FakeActor) -> None:
            if actor.generation < 4:
                raise failure

        cluster.pool.load_gate = fail
        await cluster.start()
        placement = await cluster.complete()
        assert placement.generations == {"expert-0": 4}
        # A detached actor that nobody knows of would hold its memory for ever.
        assert [actor.alive for actor in cluster.pool.actors] == [False, False, False, True]
        await cluster.stop()

    run(test)


def test_actors_that_come_up_at_the_same_time_do_not_undo_each_others_publication() -> None:
    async def test() -> None:
        cluster = Cluster(6)
        gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        cluster.pool.load_gate = lambda actor: gates[actor.actor_id].wait()
        await cluster.start()
        watchers = [
            asyncio.create_task(cluster.controller.watch("router", i, "n", (1, 0), 10))
            for i in range(20)
        ]
        await happens(lambda: sum(actor.loads for actor in cluster.pool.actors) == 6)
        for i in range(6):
            gates[f"expert-{i}"].set()
        await happens(lambda: min(actor.heartbeats for actor in cluster.pool.actors) > 1)
        assert len(cluster.controller._placement.generations) == 6
        assert cluster.controller._placement.missing() == []
        assert cluster.controller._placement.version == 6
        await asyncio.gather(*watchers)
        await cluster.stop()

    run(test)


def test_living_actors_of_the_same_configuration_are_adopted_under_a_higher_epoch() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        keys = ModelExperts("m", (0, 1), NUM_EXPERTS, 10).expert_keys()
        old = pool.add("expert-0", 7, 41, keys=keys[:2])
        async with running(2, pool) as cluster:
            placement = await cluster.complete()
            assert placement.epoch == 42
            assert placement.generations == {"expert-0": 7, "expert-1": 1}
            assert [actor.actor_id for actor in pool.actors] == ["expert-0", "expert-1"]
            assert (old.alive, old.killed, old.epoch) == (True, False, 42)

    run(test)


def test_a_new_controller_never_calls_living_experts_lost() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        async with running(2, pool) as first:
            before = await first.complete()
        async with running(2, pool) as second:
            taken_over = second.controller._placement  # before any keeper has had its turn
            assert taken_over.epoch == before.epoch + 1
            assert taken_over.missing() == []
            assert taken_over.generations == before.generations
            await second.complete()

    run(test)


def test_after_the_loss_of_controller_and_actors_nothing_goes_backwards() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        async with running(2, pool) as first:
            before = await first.complete()
        for actor in pool.actors:
            actor.alive = False
        async with running(2, pool) as second:
            after = await second.complete()
            assert after.order > before.order
            assert after.epoch == before.epoch + 1
            assert after.generations == {"expert-0": 2, "expert-1": 2}

    run(test)


def test_an_actor_that_died_while_the_controller_was_away_gets_its_next_generation() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        async with running(2, pool) as first:
            await first.complete()
        pool.of("expert-0")[0].alive = False
        async with running(2, pool) as second:
            after = await second.complete()
            assert after.generations == {"expert-0": 2, "expert-1": 1}

    run(test)


def test_an_adopted_actor_that_dies_is_followed_by_its_next_generation() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        old = pool.add("expert-0", 7, 3)
        async with running(1, pool) as cluster:
            await cluster.complete()
            old.alive = False
            await cluster.until(lambda p: p.generations == {"expert-0": 8})

    run(test)


def test_actors_that_hang_are_waited_for_together() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        for place in range(3):
            pool.add(f"expert-{place}", 1, 1)
        asked: list[FakeActor] = []
        all_are_asked = asyncio.Event()
        describe = pool.describe

        async def slow(actor: FakeActor, timeout_s: float) -> ActorReport:
            asked.append(actor)
            if len(asked) == 3:
                all_are_asked.set()
            async with asyncio.timeout(timeout_s):
                await all_are_asked.wait()
            return await describe(actor, timeout_s)

        pool.describe = slow  # type: ignore[method-assign]
        async with running(3, pool):
            assert len(pool.actors) == 3
            assert all(actor.alive for actor in pool.actors)

    run(test)


@pytest.mark.parametrize(
    "changes",
    [{"digest": "another"}, {"actor_id": "expert-9"}, {"hung": True}],
    ids=["another configuration", "one too many", "hung"],
)
def test_an_actor_that_does_not_fit_is_ended_and_not_adopted(changes: dict[str, Any]) -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        old = pool.add("expert-0", 2, 5, **changes)
        async with running(1, pool) as cluster:
            placement = await cluster.complete()
            assert old.killed
            expected = 1 if "actor_id" in changes else 3
            assert placement.generations == {"expert-0": expected}
            # Even an actor that is ended tells which epochs are used up.
            assert placement.epoch == (1 if "hung" in changes else 6)

    run(test)


def test_of_two_generations_the_newer_is_adopted_and_the_older_ended() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        newer, older = pool.add("expert-0", 3, 1), pool.add("expert-0", 2, 1)
        async with running(1, pool) as cluster:
            assert (await cluster.complete()).generations == {"expert-0": 3}
            assert (newer.killed, older.killed) == (False, True)

    run(test)


def test_a_controller_that_was_superseded_stops_and_kills_nothing() -> None:
    async def test() -> None:
        async with running() as cluster:
            await cluster.complete()
            for actor in cluster.pool.actors:
                actor.epoch = 2  # a newer controller has been here
            keepers = list(cluster.controller._keepers.values())
            await asyncio.wait(keepers, timeout=LIMIT_S)
            assert [task.exception() for task in keepers] == [None, None]
            await asyncio.wait(tasks_of(cluster.controller), timeout=LIMIT_S)
            assert all(task.done() for task in tasks_of(cluster.controller))
            assert [(a.alive, a.killed) for a in cluster.pool.actors] == [(True, False)] * 2
            assert cluster.controller._placement.missing() == []

    run(test)


def test_a_superseded_controller_does_not_take_actors_while_it_starts() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        actor = pool.add("expert-0", 1, 5)

        async def overtaken(_: FakeActor) -> None:
            actor.epoch = 9

        pool.load_gate = overtaken
        async with running(1, pool) as cluster:
            await asyncio.wait(tasks_of(cluster.controller), timeout=LIMIT_S)
            assert (actor.alive, actor.killed, actor.epoch) == (True, False, 9)
            assert pool.actors == [actor]

    run(test)


def test_the_loss_of_one_of_two_copies_leaves_every_expert_placed() -> None:
    async def test() -> None:
        async with running(3, min_copies=2) as cluster:
            before = await cluster.until(lambda p: p.fewest_copies() == 2)
            assert all(len(actors) == 2 for actors in before.holders.values())
            gate = asyncio.Event()
            cluster.pool.load_gate = lambda actor: gate.wait()
            cluster.pool.of("expert-1")[0].alive = False
            lost = await cluster.until(lambda p: "expert-1" not in p.generations)
            assert (lost.missing(), lost.fewest_copies()) == ([], 1)
            status = ClusterStatus.from_wire(await cluster.controller.status())
            assert (status.missing_experts, status.min_copies, status.live_copies) == (0, 2, 1)
            gate.set()
            after = await cluster.until(lambda p: p.fewest_copies() == 2)
            assert {k: set(v) for k, v in after.holders.items()} == {
                k: set(v) for k, v in before.holders.items()
            }

    run(test)


def test_copies_sit_on_different_nodes_and_a_successor_on_its_predecessors() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        pool.node_ids = ["n1", "n1", "n2", "n2"]
        async with running(4, pool, min_copies=2) as cluster:
            placement = await cluster.until(lambda p: p.fewest_copies() == 2)
            node_of = {actor.actor_id: actor.node for actor in pool.actors}
            assert len(pool.actors) == 4
            for actors in placement.holders.values():
                assert {node_of[actor_id] for actor_id in actors} == {"n1", "n2"}
            pool.node_ids = ["n2"]
            pool.of("expert-0")[0].alive = False
            await cluster.until(lambda p: p.generations.get("expert-0") == 2)
            assert pool.of("expert-0")[1].node == "n1"

    run(test)


def test_an_actor_that_does_not_tell_its_node_counts_as_one_on_a_node_of_its_own() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        pool.node_ids = ["n1", "n1"]
        describe = pool.describe

        async def silent(actor: FakeActor, timeout_s: float) -> ActorReport:
            if actor.actor_id == "expert-0":
                raise TimeoutError
            return await describe(actor, timeout_s)

        pool.describe = silent  # type: ignore[method-assign]
        async with running(3, pool, min_copies=2) as cluster:
            placement = await cluster.until(lambda p: p.fewest_copies() == 2)
            assert len(pool.actors) == 3
            assert all("expert-0" in actors for actors in placement.holders.values())

    run(test)


def test_a_next_controller_comes_to_the_same_copies() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        pool.node_ids = ["n1", "n2", "n3"]
        async with running(3, pool, min_copies=2) as first:
            before = await first.until(lambda p: p.fewest_copies() == 2)
        async with running(3, pool, min_copies=2) as second:
            after = await second.until(lambda p: p.epoch == 2 and p.fewest_copies() == 2)
            assert len(pool.actors) == 3
            assert {k: set(v) for k, v in after.holders.items()} == {
                k: set(v) for k, v in before.holders.items()
            }

    run(test)


def test_a_next_controller_does_not_wait_for_a_lost_actor_to_place_the_others() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        pool.node_ids = ["n1", "n2", "n3"]
        async with running(3, pool, min_copies=2) as first:
            await first.until(lambda p: p.fewest_copies() == 2)
        kept = {actor.actor_id: list(actor.keys) for actor in pool.actors[1:]}
        pool.actors[0].alive = False
        gate = asyncio.Event()

        async def slow(actor: FakeActor) -> None:
            if actor.actor_id == "expert-0":
                await gate.wait()

        pool.load_gate = slow
        async with running(3, pool, min_copies=2) as second:
            served = await second.until(lambda p: p.epoch == 2 and not p.missing())
            assert "expert-0" not in served.generations
            assert {a: pool.of(a)[0].keys for a in kept} == kept
            gate.set()
            await second.until(lambda p: p.fewest_copies() == 2)

    run(test)


def test_a_next_controller_that_wants_fewer_copies_has_the_others_let_go() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        async with running(3, pool, min_copies=2) as first:
            await first.until(lambda p: p.fewest_copies() == 2)
        pids = {actor.actor_id: actor.pid for actor in pool.actors}
        async with running(3, pool, min_copies=1) as second:
            assert second.controller._placement.fewest_copies() == 2
            after = await second.until(lambda p: set(map(len, p.holders.values())) == {1})
            await happens(lambda: sum(len(a.keys) for a in pool.actors) == 2 * NUM_EXPERTS)
            for actor in pool.actors:
                held = [k for k, actors in after.holders.items() if actor.actor_id in actors]
                assert sorted(held) == actor.keys
            assert {actor.actor_id: actor.pid for actor in pool.actors} == pids
            assert all(placement.missing() == [] for placement in second.published)
            assert len(pool.unloads) == len(set(dict(pool.unloads)))

    run(test)


def test_no_copy_is_let_go_while_one_that_is_to_stay_is_not_there() -> None:
    async def test() -> None:
        pool = FakePool(spec_of().digest)
        async with running(2, pool, min_copies=2) as first:
            await first.until(lambda p: p.fewest_copies() == 2)
        gate = asyncio.Event()

        async def slow(actor: FakeActor) -> None:
            if actor.generation > 1:
                await gate.wait()

        pool.load_gate = slow
        pool.of("expert-0")[0].alive = False
        async with running(2, pool, min_copies=1) as second:
            [kept] = pool.of("expert-1")
            await happens(lambda: kept.heartbeats > 5 and len(pool.of("expert-0")) == 2)
            assert pool.unloads == []
            assert second.controller._placement.missing() == []
            gate.set()
            await second.until(lambda p: len(p.generations) == 2)
            await happens(
                lambda: len(kept.keys) == len(second.controller._changes.shares["expert-1"])
            )
            assert second.controller._placement.missing() == []

    run(test)


def test_a_watch_returns_at_once_when_something_else_is_known() -> None:
    async def test() -> None:
        async with running() as cluster:
            placement = await cluster.complete()
            for known in ((-1, -1), (0, 5), (placement.epoch, placement.version + 7), (9, 9)):
                told = await asyncio.wait_for(
                    cluster.controller.watch("router", 1, "n", known, 3600), LIMIT_S
                )
                assert Placement.from_wire(told["placement"]) == placement

    run(test)


def test_a_watch_returns_no_placement_when_nothing_changes_in_time() -> None:
    async def test() -> None:
        async with running() as cluster:
            placement = await cluster.complete()
            order = placement.order
            told = await cluster.controller.watch("router", 1, "n", order, 0.01)
            assert told["placement"] is None
            # What comes over Ray may be a list.
            known: Any = list(order)
            told = await cluster.controller.watch("router", 1, "n", known, 0.01)
            assert told["placement"] is None

    run(test)


def test_a_watch_never_lasts_longer_than_the_controller_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller_module, "MAX_WATCH_S", 0.01)

    async def test() -> None:
        async with running() as cluster:
            placement = await cluster.complete()
            watch = cluster.controller.watch("router", 1, "n", placement.order, 3600)
            assert (await asyncio.wait_for(watch, LIMIT_S))["placement"] is None

    run(test)


def test_a_watch_tells_how_long_ago_the_last_look_at_an_actor_ended() -> None:
    async def test() -> None:
        async with running() as cluster:
            placement = await cluster.complete()

            async def loop_age_s() -> float:
                told = await cluster.controller.watch("gateway", 1, "n", placement.order, 0)
                return float(told["loop_age_s"])

            cluster.controller._looped_s -= 1000.0
            await cluster.controller.suspect("expert-0", 1)
            await happens(lambda: time.monotonic() - cluster.controller._looped_s < 500.0)
            assert 0 <= await loop_age_s() < LIMIT_S
            for task in tasks_of(cluster.controller):
                task.cancel()
            await asyncio.wait(tasks_of(cluster.controller), timeout=LIMIT_S)
            cluster.controller._looped_s -= 1000.0
            assert 1000.0 <= await loop_age_s() < 1000.0 + LIMIT_S

    run(test)


def test_a_suspicion_brings_the_next_heartbeat_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "HEARTBEAT_PERIOD_S", 3600)

    async def test() -> None:
        async with running() as cluster:
            await cluster.complete()
            [first], [second] = cluster.pool.of("expert-0"), cluster.pool.of("expert-1")
            await happens(lambda: first.heartbeats == second.heartbeats == 1)
            first.alive = False
            # About an older generation, or nobody: not worth a look.
            await cluster.controller.suspect("expert-0", 0)
            await cluster.controller.suspect("nobody", 1)
            assert not any(event.is_set() for event in cluster.controller._suspected.values())
            await cluster.controller.suspect("expert-0", 1)
            await cluster.until(lambda p: p.generations.get("expert-0") == 2)
            assert second.heartbeats == 1

    run(test)


def test_a_suspected_actor_that_answers_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "HEARTBEAT_PERIOD_S", 3600)

    async def test() -> None:
        async with running(1) as cluster:
            await cluster.complete()
            [actor] = cluster.pool.actors
            await happens(lambda: actor.heartbeats == 1)
            await cluster.controller.suspect("expert-0", 1)
            await happens(lambda: actor.heartbeats == 2)
            assert cluster.controller._placement.generations == {"expert-0": 1}
            assert not actor.killed

    run(test)


def test_a_silent_actor_is_replaced_sooner_while_a_router_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "SILENT_S", 3600)
    monkeypatch.setattr(progress, "SUSPECTED_S", 0.05)

    async def test() -> None:
        async with running() as cluster:
            await cluster.complete()
            [suspected], [idle] = cluster.pool.of("expert-0"), cluster.pool.of("expert-1")
            suspected.hung = idle.hung = True
            await cluster.controller.suspect("expert-0", 1)
            await cluster.until(lambda p: p.generations.get("expert-0") == 2)
            assert (suspected.killed, idle.killed) == (True, False)
            # The word on the first generation says nothing of the second.
            [_, successor] = cluster.pool.of("expert-0")
            successor.hung = True
            beats = successor.heartbeats
            await cluster.controller.suspect("expert-0", 1)
            await happens(lambda: successor.heartbeats > beats)
            assert not await replaced_within(cluster, successor, 10 * progress.SUSPECTED_S)

    run(test)


def test_a_routers_word_counts_only_while_it_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENT_S", 3600)
    monkeypatch.setattr(progress, "SUSPECTED_S", 0.1)
    monkeypatch.setattr(controller_module, "SUSPICION_S", 0.05)

    async def test() -> None:
        async with running(1) as cluster:
            await cluster.complete()
            [actor] = cluster.pool.actors
            actor.hung = True
            await cluster.controller.suspect("expert-0", 1)
            assert not await replaced_within(cluster, actor, 5 * progress.SUSPECTED_S)
            while not actor.killed:
                await cluster.controller.suspect("expert-0", 1)
                await asyncio.sleep(0.01)

    run(test)


async def replaced_within(cluster: Cluster, actor: FakeActor, timeout_s: float) -> bool:
    """Watch for a while whether an actor is ended."""
    try:
        async with asyncio.timeout(timeout_s):
            await happens(lambda: actor.killed)
    except TimeoutError:
        return False
    return True


def test_actors_of_several_pools_hold_what_their_budgets_allow() -> None:
    async def test() -> None:
        cluster = Cluster(pools={"gpu": (1, 60), "cpu": (2, 10)})
        await cluster.start()
        await cluster.complete()
        assert {a.actor_id: len(a.keys) for a in cluster.pool.actors} == {
            "gpu-0": 6,
            "cpu-0": 1,
            "cpu-1": 1,
        }
        await cluster.stop()

    run(test)


def test_an_adopted_actor_is_compared_with_its_own_pool() -> None:
    async def test() -> None:
        cluster = Cluster(pools={"gpu": (1, 60), "cpu": (1, 20)})
        gpu = cluster.pool.add("gpu-0", 1, 1)
        cpu = cluster.pool.add("cpu-0", 1, 1)
        cpu.digest = cluster.specs["cpu-0"].digest
        assert gpu.digest == cluster.specs["gpu-0"].digest != cpu.digest
        await cluster.start()
        await cluster.complete()
        assert not gpu.killed
        assert not cpu.killed
        await cluster.stop()

    run(test)


def test_copies_move_apart_when_a_node_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart_module, "NODES_CHECK_S", 0.01)

    async def test() -> None:
        cluster = Cluster(num_actors=2, min_copies=2)
        await cluster.start()
        await cluster.until(lambda placement: placement.fewest_copies() == 2)
        assert {actor.node for actor in cluster.pool.actors} == {"node"}
        cluster.pool.node_ids.append("joined")
        await happens(lambda: len(cluster.pool.actors) == 3)
        await cluster.until(lambda placement: placement.fewest_copies() == 2)
        living = {a.actor_id: (a.generation, a.node) for a in cluster.pool.actors if a.alive}
        assert living == {"expert-0": (2, "joined"), "expert-1": (1, "node")}
        # One copy of each expert was there all the time, and nothing moves any more.
        assert min(placement.fewest_copies() for placement in cluster.published[2:]) == 1
        cluster.pool.node_ids.append("third")
        published, looks = len(cluster.published), cluster.pool.looks
        await happens(lambda: cluster.pool.looks >= looks + 3)
        assert len(cluster.published) == published
        await cluster.stop()

    run(test)


def test_what_an_actor_without_a_place_waits_for_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(controller_module, "PLACE_NOTICE_S", 0.01)

    async def test() -> None:
        async with running() as cluster:
            await cluster.complete()
            gate = asyncio.Event()

            async def waits(actor: FakeActor) -> None:
                actor.hung = True  # Ray has no place for it, so it answers nothing
                await gate.wait()
                actor.hung = False

            cluster.pool.load_gate = waits
            cluster.pool.of("expert-1")[0].alive = False
            await happens(lambda: "expert-1 waits for a place: it needs GPU 1" in caplog.text)
            gate.set()
            await cluster.complete()
            assert "expert-0 waits" not in caplog.text

    run(test)


def test_a_successor_for_which_its_predecessors_node_has_no_room_comes_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller_module, "PLACE_NOTICE_S", 0.01)

    async def test() -> None:
        pool = FakePool(spec_of().digest)
        pool.node_ids = ["n1", "n2"]
        async with running(2, pool, min_copies=2) as cluster:
            await cluster.until(lambda p: p.fewest_copies() == 2)

            async def waits(actor: FakeActor) -> None:
                actor.hung = actor.node == "n1"  # another program took the room
                while actor.hung and actor.alive:
                    await asyncio.sleep(0.001)

            pool.load_gate = waits
            pool.node_ids = ["n2"]
            pool.of("expert-0")[0].alive = False
            await cluster.until(lambda p: p.generations.get("expert-0") == 3)
            successors = [(a.generation, a.node, a.alive) for a in pool.of("expert-0")[1:]]
            assert successors == [(2, "n1", False), (3, "n2", True)]

    run(test)


def test_the_status_tells_what_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MEMBER_TTL_S", 1000)
    monkeypatch.setattr(controller_module, "HEARTBEAT_PERIOD_S", 3600)

    async def test() -> None:
        async with running() as cluster:
            placement = await cluster.complete()
            [first] = cluster.pool.of("expert-0")
            first.tokens = dict.fromkeys(first.keys, 3)
            await cluster.controller.suspect("expert-0", 1)
            await happens(lambda: first.heartbeats == 2)
            await cluster.controller.watch("router", 11, "n1", placement.order, 0)
            await cluster.controller.watch("router", 11, "n1", placement.order, 0)
            await cluster.controller.watch("router", 12, "n1", placement.order, 0)
            await cluster.controller.watch("gateway", 1, "n2", placement.order, 0)
            status = ClusterStatus.from_wire(await cluster.controller.status())
            assert status.models == ("m",)
            assert (status.epoch, status.placement_version) == placement.order
            assert status.missing_experts == 0
            assert (status.min_copies, status.live_copies) == (1, 1)
            assert [(p.pid, p.node) for p in status.routers] == [(11, "n1"), (12, "n1")]
            assert [p.pid for p in status.gateways] == [1]
            assert [a.actor_id for a in status.actors] == ["expert-0", "expert-1"]
            actor = status.actors[0]
            assert (actor.pid, actor.generation, actor.device) == (first.pid, 1, "cpu")
            assert actor.experts == tuple(tuple(key) for key in first.keys)
            assert actor.tokens == 3 * len(first.keys)
            assert actor.weight_bytes == 10 * len(first.keys)

    run(test)


def test_measurements_have_the_newest_samples_of_all_and_the_actors_reports() -> None:
    async def test() -> None:
        async with running() as cluster:
            order = (await cluster.complete()).order
            late, early = Samples(2.0, {"late": []}), Samples(1.0, {"early": []})
            await cluster.controller.watch("router", 11, "n1", order, 0, late)
            await cluster.controller.watch("router", 11, "n1", order, 0, early)  # was overtaken
            await cluster.controller.watch("router", 12, "n1", order, 0)
            own = ProcessSamples("gateway", ProcessStatus(1, "n2"), early)
            told = await cluster.controller.measurements(own)
            assert told.status == ClusterStatus.from_wire(await cluster.controller.status())
            assert [report.actor_id for report in told.reports] == ["expert-0", "expert-1"]
            router = ProcessSamples("router", ProcessStatus(11, "n1"), late)
            assert told.processes == (router, own)

    run(test)


def test_the_status_of_a_cluster_without_actors_misses_everything() -> None:
    async def test() -> None:
        cluster = Cluster()
        status = ClusterStatus.from_wire(await cluster.controller.status())
        assert status.missing_experts == 2 * NUM_EXPERTS
        assert (status.actors, status.routers, status.gateways) == ((), (), ())

    run(test)


def test_a_dead_actor_leaves_the_status_until_it_is_replaced() -> None:
    async def test() -> None:
        async with running() as cluster:
            await cluster.complete()
            gate = asyncio.Event()
            cluster.pool.load_gate = lambda actor: gate.wait()
            cluster.pool.of("expert-0")[0].alive = False
            await happens(lambda: len(cluster.pool.of("expert-0")) == 2)
            status = ClusterStatus.from_wire(await cluster.controller.status())
            assert [a.actor_id for a in status.actors] == ["expert-1"]
            assert status.missing_experts == NUM_EXPERTS
            gate.set()
            await cluster.complete()

    run(test)


def test_members_that_are_not_heard_of_leave_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        cluster = Cluster()
        await cluster.controller.watch("router", 11, "n1", (-1, -1), 0)
        assert len((await cluster.controller.status())["routers"]) == 1
        monkeypatch.setattr(members, "MEMBER_TTL_S", 0)
        assert len((await cluster.controller.status())["routers"]) == 0

    run(test)


def test_a_deletion_is_told_to_all_who_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "APP_CHECK_S", 0.001)
    answers: list[bool | Exception] = [True, ConnectionError("Serve is away"), False]

    def app_is_wanted(app: str) -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(controller_module, "app_is_wanted", app_is_wanted)

    async def test() -> None:
        async with running() as cluster:
            order = (await cluster.complete()).order
            watch = asyncio.create_task(
                cluster.controller.watch("router", 1, "n", order, controller_module.MAX_WATCH_S)
            )
            await asyncio.sleep(0)
            assert not (await cluster.controller.watch("gateway", 1, "n", order, 0))["is_deleted"]
            await cluster.controller.look_for_deletion()
            assert (await watch)["is_deleted"]
            assert (await cluster.controller.watch("gateway", 1, "n", order, 60))["is_deleted"]
            assert not any(actor.killed for actor in cluster.pool.actors)

    run(test)


@pytest.mark.parametrize("wanted", [True, False])
def test_closing_ends_the_actors_only_when_the_application_is_deleted(
    monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    monkeypatch.setattr(controller_module, "app_is_wanted", lambda app: wanted)

    async def test() -> None:
        async with running() as cluster:
            await cluster.complete()
            await cluster.controller.close()
            assert [actor.killed for actor in cluster.pool.actors] == [not wanted] * 2
            await asyncio.wait(tasks_of(cluster.controller), timeout=LIMIT_S)
            assert len(cluster.pool.actors) == 2  # and nobody brings them back

    run(test)


def test_reports_of_other_threads_are_another_configuration() -> None:
    assert replace(spec_of(), threads=2).digest == spec_of(2).digest != spec_of().digest
