"""One world: a deployment on a few nodes, its clients, and all that happens to them."""

from __future__ import annotations

import gc
import logging
import random
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cluster.controller.controller import Controller
from cluster.controller.records.ledger import LedgerStore
from cluster.controller.records.pool import ExpertPool
from cluster.errors import CheckpointError, StaleEpochError
from cluster.memory import Memory
from cluster.ray_private import ray_store
from cluster.spec import ActorSpec, ModelExperts, ModelSource, PoolSpec, ScalingTargets, model_key
from experts.remote import RemoteExpertActor
from router.config.deployment import RouterConfig
from router.config.experts import ExpertsConfig, TlsConfig
from router.control.client import ControllerClient
from router.engine.replica import RouterReplica
from router.served import ServedModel
from tests.world.choices import look_at_pages
from tests.world.clients import MIXTURE, MODEL, Answer, Client, Plan
from tests.world.excuses import ENOUGH_S, Excuses
from tests.world.forms import vocabulary
from tests.world.gateways import Gateway, client_of
from tests.world.happenings import Happenings
from tests.world.kernel import Process, current_process, running
from tests.world.law import Breach, Law
from tests.world.law_of_copies import LawOfCopies
from tests.world.law_of_devices import LawOfDevices
from tests.world.law_of_ends import LawOfEnds
from tests.world.law_of_frames import look_at_frames
from tests.world.law_of_keys import LawOfKeys
from tests.world.law_of_late import LawOfLate
from tests.world.law_of_places import LawOfPlaces
from tests.world.law_of_queues import MAX_WAITING
from tests.world.law_of_time import look_at_times
from tests.world.mixtures import deploy_mixture, sources_of
from tests.world.model import (
    DTYPE,
    KERNEL_CLASS,
    LAYERS,
    NUM_EXPERTS,
    OTHER_CLASS,
    TOP_K,
    VOCAB,
    ExactCheckpoint,
    ExactExpert,
    ExactModel,
    ExactWeights,
)
from tests.world.network import Network
from tests.world.patches import replaced
from tests.world.ray_api import HEAD, Handle, RayCluster
from tests.world.serve_api import Serve, Version
from tests.world.streams import StreamLoop
from tests.world.weather import Event, Scenario, Setting

APP = "world"
TLS = TlsConfig(certificate="certificate", key="key", authority="authority")
SLOTS = 6
"""The actors that fit on a node."""
EXPERT_BYTES = 1000
ATTENTION_S = 0.008
PRODUCT_S = 0.02
ROW_S = 0.0005
HEAL_S = 40.0
"""How long after the weather has calmed the deployment may need to be whole."""
APART_S = 60.0
"""How long after that copies may share a node."""
DELETE_S = 30.0
"""How long the processes of a deleted application may live."""
LOOK_S = 0.5
"""How often queues and readiness are looked at."""
PROBES = 4
UNHEARD_S = 5.0
"""How long a cut link may still matter."""
LATELY_S = 0.5
"""An actor that a router asks is heard within this time."""


@dataclass
class Device:
    """How the experts of an actor compute: ``slow`` times as long, or with a fault."""

    slow: float = 1.0
    fault: str = ""


@dataclass
class Outcome:
    scenario: Scenario
    breaches: list[Breach]
    trace: list[str]
    hit: list[Event]
    digest: int
    num_callbacks: int
    num_tokens: int
    answers: list[Answer] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    """The process or node that each event of ``hit`` hit; empty where it is no single one."""
    processes: list[Process] = field(default_factory=list)
    """All processes that there ever were."""


class World:
    """A deployment and its faults; :meth:`run` lets time pass."""

    def __init__(self, seed: int, setting: Setting | None = None) -> None:
        self.seed = seed
        self.setting = setting or Setting()
        self.kernel = StreamLoop(seed)
        hosts = [HEAD, *(f"node-{i}" for i in range(self.setting.num_nodes))]
        self.network = self.kernel.network = Network(self.kernel, [*hosts, "clients"])
        self.cluster = RayCluster(self.kernel, self.network, dict.fromkeys(hosts[1:], SLOTS))
        self.serve = Serve(self.cluster)
        self.operator = self.kernel.process("operator", HEAD)
        self.law = Law(self)
        self.keys = LawOfKeys(self)
        self.cluster.on_record = self.law.ledger_written
        self.cluster.on_kill = self.law.killed
        self.ends = LawOfEnds(self)
        self.devices = LawOfDevices(self)
        self.places = LawOfPlaces(self)
        self.late = LawOfLate(self)
        self.excuses = Excuses(self)
        self.cluster.on_place = self.devices.placed
        self.copies = LawOfCopies(self)
        self.cluster.on_call = self.copies.called
        self.happenings = Happenings(self)
        self.trace: list[str] = []
        self.kernel.on_life = self._lives
        self.identity = ""
        self.identities: set[str] = set()
        self.least_copies = self.setting.min_copies
        """The fewest copies that any deployment wanted."""
        self.full: set[str] = set()
        """Nodes without memory, until the weather calms."""
        self.small: set[str] = set()
        """Nodes that have no memory to the end."""
        self.moving: set[str] = set()
        """Actors that a controller is about to move to another node."""
        self.failing_disks: set[str] = set()
        self.controllers: dict[str, Controller] = {}
        """The controller of each process that has, or had, one."""
        self.used_at_s: dict[str, float] = {}
        """When each actor's process has computed rows last."""
        self.answers: list[Answer] = []
        """What has come of all requests so far."""
        self.touched_at_s: dict[str, float] = {}
        """When a fault touched a process last."""
        self.bad: dict[str, Device] = {}
        """How a process or a node computes that has a bad device."""
        self._stack = ExitStack()
        # Engines of one real thread enter and leave this mode in any order; the last exit puts it
        # back as it was.
        self._stack.enter_context(torch.inference_mode())
        self._stack.enter_context(running(self.kernel))
        self._stack.enter_context(replaced(self))

    def note(self, text: str) -> None:
        self.trace.append(f"{self.kernel.now_s:9.4f} {text}")

    def _lives(self, process: Process, what: str) -> None:
        self.note(f"{process.name} {what}" + (f" on {process.node}" if process.node else ""))
        self.late.lives(process, what)

    # What processes load.

    def load_dense(
        self, model: ServedModel, config: RouterConfig, layers: Any, device: Any
    ) -> tuple[Any, str]:
        cache_tokens = config.cache_tokens_for(model.max_model_len)
        dense = ExactModel(model.identity, cache_tokens, layers, lambda: ATTENTION_S)
        return dense, KERNEL_CLASS

    def load_expert(
        self, checkpoint: ExactCheckpoint, layer: int, expert: int, dtype: str
    ) -> ExactWeights:
        process = current_process()
        assert process is not None
        if process.node in self.failing_disks:
            raise CheckpointError("the disk fails", f"{checkpoint.identity}/model.safetensors")
        return ExactWeights(checkpoint.identity, layer, expert)

    def make_expert(self, weights: ExactWeights, activation: str, threads: int) -> ExactExpert:
        process = current_process()
        assert process is not None

        def compute(num_rows: int) -> Exception | float | str:
            self.used_at_s[process.name] = self.kernel.now_s
            slow = 1.0
            found = [self.bad.get(name) for name in (process.node, process.name)]
            fault = next((device.fault for device in found if device and device.fault), "")
            self.devices.computed(process, fault)
            self.late.computed(process)
            for device in found:
                if device is not None:
                    if device.fault == "raises":
                        return RuntimeError("the device fails")
                    if device.fault:
                        return device.fault
                    slow *= device.slow
            return slow * (PRODUCT_S + ROW_S * num_rows)

        is_other = self.setting.mixed and ":expert-0:" in process.name
        return ExactExpert(weights, compute, OTHER_CLASS if is_other else KERNEL_CLASS)

    def memory(self) -> Memory:
        process = current_process()
        is_full = process is not None and process.node in self.full | self.small
        return Memory(1 << 34, 100 if is_full else 1 << 33)

    # Faults.

    def end(self, process: Process) -> None:
        self.note(f"{process.name} crashes")
        self.kernel.end(process)
        self.cluster.actors.pop(process.name, None)
        self.kernel.call_later(0.1, self.cluster.place_pending, context=self.network.nobody)

    def touch(self, name: str) -> None:
        """Note that a fault touched a process, or all of a node."""
        self.touched_at_s[name] = self.kernel.now_s
        for process in self.processes():
            if process.node == name:
                self.touched_at_s[process.name] = self.kernel.now_s

    def break_device(self, name: str, **changes: Any) -> None:
        self.bad[name] = Device(**changes)
        if "slow" in changes:
            self.devices.slowed(name, changes["slow"])

    def is_broken(self, process: Process) -> bool:
        return process.name in self.bad or process.node in self.bad

    def is_alive(self, name: str) -> bool:
        return any(process.name == name for process in self.processes())

    def has_bad_devices(self, name: str) -> bool:
        """Return whether the device of a process, or those of a node, fail now."""
        return name in self.bad and self.bad[name].fault in ("raises", "nan")

    def mend_device(self, name: str) -> None:
        self.bad.pop(name, None)
        self.devices.mended(name)
        self.touch(name)

    def lose_node(self, name: str) -> None:
        if not self.cluster.nodes[name].is_alive:
            return
        self.note(f"{name} is down")
        self.cluster.lose_node(name)
        for deployment in self.serve.deployments.values():
            for replica in deployment.replicas:
                if replica.process.node == name:
                    replica.handle.death = "its node died"
                    self.kernel.end(replica.process)

    def processes(self) -> list[Process]:
        found = [handle.process for handle in self.cluster.actors.values()]
        for deployment in self.serve.deployments.values():
            found += [replica.process for replica in deployment.replicas]
        return [process for process in found if process.is_alive]

    def calm(self) -> None:
        self.network.heal()
        for name in list(self.bad):
            self.mend_device(name)
        for process in self.processes():
            self.kernel.go_on(process)
        self.full.clear()
        self.failing_disks.clear()

    # Deployments.

    def deploy(self, identity: str, setting: Setting | None = None) -> None:
        """Deploy weights of this identity, with the world's setting or another."""
        self.identity = identity
        self.identities.add(identity)
        self.setting = setting = setting or self.setting
        self.least_copies = min(self.least_copies, setting.min_copies)
        model = _served(identity)
        experts = ExpertsConfig(
            actors=setting.num_actors, min_copies=setting.min_copies, transport=setting.transport,
            call_timeout_s=2.0, rebalance_period_s=setting.rebalance_period_s,
            redeploy_drain_s=setting.redeploy_drain_s, tls=TLS if setting.tls else None,
        )  # fmt: skip
        routers = RouterConfig(
            cache_tokens=256, max_batch_size=8, max_batch_tokens=16, max_queue_requests=MAX_WAITING
        )

        def router() -> RouterReplica:
            client = ControllerClient(self.serve.handle("controller"))
            letters = (lambda model: vocabulary(model.vocab_size)) if setting.forms else None
            return RouterReplica(APP, model, routers, experts, client, letters)

        self._controller_version = Version(
            lambda: self._start_controller(model, experts, setting),
            1,
            close=lambda made: made.close(),
            check=lambda made: made.check_health(),
        )
        self.serve.deploy("controller", self._controller_version)
        self.serve.deploy(
            "router",
            Version(router, setting.num_routers, lambda made: made.is_its_turn(), self._end_router),
        )
        deploy_mixture(self, routers, experts)
        gateways = Version(lambda: Gateway(self, model), setting.num_gateways)
        self.serve.deploy("gateway", gateways)

    async def _end_router(self, made: RouterReplica) -> None:
        await made.finish()
        await self.kernel.run_in_executor(None, made.close)

    async def _start_controller(
        self, model: ServedModel, experts: ExpertsConfig, setting: Setting
    ) -> Controller:
        tls = None if experts.tls is None else experts.tls.files()
        sources = model.source, *sources_of(model.identity, self.setting)
        actor = ActorSpec(APP, sources, 1.0, 0.0, 1, experts.max_queue_rows, tls)
        targets = None
        if setting.autoscales:
            low, high = setting.num_actors - 1, setting.num_actors + 1 + setting.standby
            targets = ScalingTargets(low, high, 0.6, 1.0, 2, 4, setting.standby)
        pools = (PoolSpec("expert", setting.num_actors, None, actor, targets),)
        made = Controller(
            APP, pools, ExpertPool(APP, RemoteExpertActor), LedgerStore(APP, ray_store()),
            setting.min_copies, setting.rebalance_period_s, setting.redeploy_drain_s,
        )  # fmt: skip
        process = current_process()
        assert process is not None
        self.controllers[process.name] = made
        await made.start()
        made.deletion = self.kernel.create_task(made.look_for_deletion())  # type: ignore[attr-defined]
        return made

    def start_second_controller(self) -> None:
        """Start a controller beside the one that Serve knows; it ends soon."""
        process = self.kernel.process("second controller", self._some_node())
        make = self._controller_version.make

        async def start() -> None:
            with suppress(StaleEpochError):  # a third one was faster; Serve would try again
                await make()

        with self.kernel.within(process):
            self.kernel.create_task(start())
        self.kernel.call_later(2.5, self.kernel.end, process, context=self.network.nobody)

    def _some_node(self) -> str:
        nodes = [n.name for n in self.cluster.nodes.values() if n.is_alive]
        return self.kernel.random.choice(nodes)

    def controller(self) -> Controller | None:
        found = self.serve.deployments["controller"].running()
        return found[-1].handle.instance if found else None

    # Time.

    def run(self, until_s: float, is_done: Callable[[], bool] | None = None) -> None:
        self.kernel.run(until_s, is_done)

    def close(self) -> None:
        """End all that runs; what it says of its end is nobody's."""
        # A thread that ends within a worker of the standard library is logged there.
        workers = logging.getLogger("concurrent.futures")
        before, sys.unraisablehook = sys.unraisablehook, lambda raised: None
        workers.disabled = True
        try:
            self.kernel.close()
            gc.collect()
        finally:
            sys.unraisablehook, workers.disabled = before, False
            self._stack.close()

    # What the law asks.

    def is_removed(self, handle: Handle, killer: Process | None) -> bool:
        """Return whether a kill is the end of an actor that an order took out of the fleet."""
        actor_id = handle.name.rpartition(":g")[0].rpartition(":")[2]
        made = self.controllers.get(killer.name) if killer else None
        if made is not None:
            return actor_id not in made._state.fleet.specs
        return actor_id not in [f"expert-{i}" for i in range(self.setting.num_actors)]

    def is_left(self, handle: Handle) -> bool:
        """Return whether an actor is to move, and no router that runs knows it any longer."""
        name, _, generation = handle.name.rpartition(":g")
        actor_id = name.rpartition(":")[2]
        if actor_id not in self.moving:
            return False
        placements = [
            replica.handle.instance._view.placement
            for replica in self.serve.deployments["router"].running()
        ]
        return all(
            known is not None and known.generations.get(actor_id) != int(generation)
            for known in placements
        )

    def is_away(self, process: Process) -> bool:
        """Return whether a process may not hear the controller now."""
        if process.is_paused or self.cluster.lost:
            return True
        found = self.serve.deployments["controller"].replicas
        return any(
            r.process.is_paused or self.network.was_cut(r.process.node, process.node, UNHEARD_S)
            for r in found
        )

    def may_be_unheard(self, process: Process, killer: Process | None) -> bool:
        """Return whether those who hear an actor may not reach its controller.

        That is where a router was cut off from the controller since the actor was; or where answers
        are lost, and no router has had one of the actor's lately.
        """
        if killer is None:
            return True
        was_cut = self.network.was_cut
        is_cut = was_cut(process.node, killer.node, UNHEARD_S)
        routers = self.serve.deployments["router"].running()
        if (is_cut or killer.pid in self.cluster.cut_off) and self.cluster.lost:
            actor_id = process.name.rpartition(":g")[0].rpartition(":")[2]
            heard = [r.handle.instance._watcher.heard.ages().get(actor_id) for r in routers]
            if all(one is None or one[1] > LATELY_S for one in heard):
                return True
        return is_cut and any(
            was_cut(node, killer.node, UNHEARD_S) or was_cut(node, process.node, UNHEARD_S)
            for node in (router.process.node for router in routers)
        )

    def hung_s(self, answer: Answer) -> float:
        """Return for how long a gateway may have hung under a request."""
        return sum(
            event.for_s
            for event in self.happenings.hit
            if event.kind == "hangs" and event.role == "gateway"
        )

    def unhealed(self) -> str:
        """Say what of the deployment is not whole; nothing where it is."""
        controller = self.controller()
        if controller is None:
            return "no controller runs"
        if leaving := self.cluster.draining():
            return f"{', '.join(leaving)} is about to go"
        placement = controller._state.placement
        if missing := placement.missing():
            return f"{len(missing)} experts have no copy"
        copies = placement.fewest_copies(controller._state.keys)
        if copies < self.setting.min_copies and not self._lacks_slots(controller):
            return f"an expert has {copies} copies of {self.setting.min_copies}"
        for key, holders in placement.holders.items():
            for actor_id in holders:
                if (key, actor_id) and not self._holds(
                    actor_id, placement.generations[actor_id], key
                ):
                    return f"{actor_id} does not hold {key}"
        for name in ("router", "gateway"):
            deployment = self.serve.deployments[name]
            running = deployment.running()
            if any(replica.version is not deployment.version for replica in running):
                return f"an earlier {name} runs"
            if len(running) < self.setting.num_routers:
                return f"too few of {name} run"
        for replica in self.serve.deployments["gateway"].running():
            ready = replica.handle.instance.deployment.ready()
            if not ready.is_ready:
                return f"{replica.process.name} is not ready: {ready.reason}"
        for replica in self.serve.deployments["router"].running():
            placed = replica.handle.instance._view.placement
            if placed is None or placed.order != placement.order:
                return f"{replica.process.name} has an older placement"
        return ""

    def _lacks_slots(self, controller: Controller) -> bool:
        """Return whether more actors are wanted than fit on the nodes that are left."""
        slots = SLOTS * sum(node.is_alive for node in self.cluster.nodes.values())
        return len(controller._state.fleet.specs) > slots

    @staticmethod
    def name_of(actor_id: str, generation: int) -> str:
        return f"expertmesh:{APP}:{actor_id}:g{generation}"

    def _holds(self, actor_id: str, generation: int, key: Any) -> bool:
        handle = self.cluster.actors.get(self.name_of(actor_id, generation))
        if handle is None or not handle.process.is_alive or not handle.is_started:
            return False
        return key in handle.instance._actor._bank


def _served(identity: str) -> ServedModel:
    experts = ModelExperts(model_key(MODEL, identity, DTYPE), LAYERS, NUM_EXPERTS, EXPERT_BYTES)
    source = ModelSource(f"/models/{identity}", DTYPE, experts, identity)
    return ServedModel(
        source=source, family="exact", vocab_size=VOCAB, max_model_len=64,
        num_experts_per_tok=TOP_K, eos_token_ids=(), identity=identity,
    )  # fmt: skip


def run(scenario: Scenario) -> Outcome:
    world, calm_s = World(scenario.seed, scenario.setting), scenario.setting.calm_s
    try:
        world.deploy("a")
        client = client_of(world)
        world.answers = client.answers
        for plan in scenario.plans:
            client.send(plan)
        world.happenings.plan(scenario.events)
        for number in range(int(calm_s / LOOK_S)):
            world.run(number * LOOK_S)
            world.law.look()
            world.late.look()
            world.excuses.look()
        world.run(calm_s)
        world.devices.calmed()
        world.late.calmed()
        world.calm()
        world.note("the weather calms")
        world.run(calm_s + HEAL_S, lambda: not client.is_waiting() and not world.unhealed())
        world.law.healed(calm_s)
        world.run(world.kernel.now_s + APART_S, lambda: not world.copies.crowded())
        if crowded := world.copies.crowded():
            world.law.broken("copies lie apart", crowded)
        _probe(world)
        # A router that has lost a request's gateway computes it until its deadline.
        until_s = max(plan.at_s + plan.timeout_s for plan in scenario.plans) + 1.0
        while world.law.kept() and world.kernel.now_s < until_s:
            world.run(world.kernel.now_s + LOOK_S)
        world.law.answers(client.answers, world.identities)
        look_at_times(world, client.answers)
        look_at_frames(world)
        world.keys.look()
        look_at_pages(world)
        world.law.nothing_left()
        if any(event.kind == "orphaned" for event in scenario.events):
            world.ends.orphaned()
        elif scenario.setting.is_deleted:
            _delete(world)
        return _outcome(scenario, world, client)
    finally:
        world.close()


def _probe(world: World) -> None:
    """Ask a healed deployment, and judge the answers strictly."""
    probes = client_of(world)
    source = random.Random(world.seed)
    for number in range(PROBES):
        prompt = tuple(source.randrange(VOCAB) for _ in range(4))
        plan = Plan(world.kernel.now_s + 0.1 * source.random(), 0, prompt, 4, ENOUGH_S)
        probes.send(replace(plan, model=MIXTURE) if world.setting.mixture and number else plan)
    world.run(world.kernel.now_s + 2 * ENOUGH_S, lambda: _is_done(probes))
    for answer in probes.answers:
        choice = answer.choices[0]
        if answer.error or choice.identity != world.identity or not choice.is_exact:
            model = f"{choice.identity!r} of {world.identity!r}"
            world.law.broken("healed in time", f"a probe: {answer.error} {answer.message} {model}")
    world.law.answers(probes.answers, world.identities)
    world.run(world.kernel.now_s + 1.0)


def _delete(world: World) -> None:
    """Delete the application; nothing of it may live on."""
    world.serve.delete()
    world.note("the application is deleted")
    world.run(world.kernel.now_s + DELETE_S, lambda: not world.processes())
    left = [process.name for process in world.processes()]
    if left:
        world.law.broken("nothing is left", f"{DELETE_S:g} s after its end: {', '.join(left)}")


def _is_done(probes: Client) -> bool:
    return len(probes.answers) == PROBES and not probes.is_waiting()


def _outcome(scenario: Scenario, world: World, client: Client) -> Outcome:
    num_tokens = sum(len(c.token_ids) for a in client.answers for c in a.choices)
    kernel, happenings = world.kernel, world.happenings
    return Outcome(
        scenario, world.law.breaches, world.trace, happenings.hit, kernel.digest,
        kernel.num_callbacks, num_tokens, client.answers, happenings.targets, kernel.processes,
    )  # fmt: skip
