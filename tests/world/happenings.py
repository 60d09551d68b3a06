"""Lets the events of a scenario happen in a world."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.world.kernel import Process
from tests.world.law_of_places import EMPTY_S, NOTICE_S
from tests.world.ray_api import HEAD, Handle
from tests.world.weather import IDENTITIES, Event, Setting

if TYPE_CHECKING:
    from tests.world.world import World

POOL = "expert"
ASK_S = 20.0
"""How long an operator waits for the controller."""
LOOK_AGAIN_S, LOOKS = 0.05, 20
"""How often a rarity looks at the world, and how many times."""
ELSEWHERE = {
    "burst": True, "poison raises": True, "poison ends routers": True, "poison ends actors": True,
    "long prompts": True, "flood of a name": True, "streams over TLS": False, "orphaned": False,
    "router full": True,
}  # fmt: skip
"""Events that are requests, or a setting, or come at the end; and whether they count as hits."""
DEVICES = {"device raises": "raises", "device yields NaN": "nan", "rows lost": "rows"}
NODES = ("node's device raises", "memory full", "disk fails")
REDEPLOYS: dict[str, Callable[[Setting], dict[str, int]]] = {
    "redeploy the same": lambda now: {},
    "redeploy more actors": lambda now: {"num_actors": now.num_actors + 1},
    "redeploy fewer actors": lambda now: {"num_actors": max(3, now.num_actors - 1)},
    "redeploy more copies": lambda now: {"min_copies": min(now.num_actors, now.min_copies + 1)},
    "redeploy fewer copies": lambda now: {"min_copies": max(1, now.min_copies - 1)},
}
ASKED: dict[str, Callable[[Setting, int], tuple[Any, ...]]] = {
    "scale up": lambda now, what: ("scale", now.num_actors + 1, POOL, False),
    "scale down": lambda now, what: ("scale", max(3, now.num_actors - 1), POOL, False),
    "drain an actor": lambda now, what: ("drain", f"{POOL}-{what % now.num_actors}", False),
    "change copies": lambda now, what: (
        "set_copies",
        "exact",
        what % 2,
        what % 6,
        1 + what % 3,
        False,
    ),
    "rebalance": lambda now, what: ("rebalance", False),
}
"""The controller's methods that an operator calls, and what with."""


class Happenings:
    """Applies events, each at its time; notes which of them hit something."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.hit: list[Event] = []
        self.targets: list[str] = []
        """The process or node that each of ``hit`` hit; empty where it is no single one."""
        self._target = ""
        self._num_nodes = world.setting.num_nodes
        self._identities = 0

    def plan(self, events: tuple[Event, ...]) -> None:
        for event in events:
            self._at(event.at_s, partial(self._happen, event))

    def _happen(self, event: Event) -> None:
        self._target = ""
        if self._has_hit(event):
            self.hit.append(event)
            self.targets.append(self._target)
            self._world.note(event.line() + (f": {self._target}" if self._target else ""))

    def _has_hit(self, event: Event) -> bool:
        """Let an event happen; returns whether it hit something."""
        if event.kind in ELSEWHERE:
            return ELSEWHERE[event.kind]
        if event.kind in DEVICES:
            return self._device(event, fault=DEVICES[event.kind])
        if event.kind in ("device slow", "copy stays slow", "slow once"):
            return self._device(event, slow=event.amount)
        if event.kind in NODES:
            return self._of_node(event)
        if event.kind in REDEPLOYS:
            return self._deploy(**REDEPLOYS[event.kind](self._world.setting))
        if event.kind in ASKED:
            return self._ask(*ASKED[event.kind](self._world.setting, event.what))
        method = getattr(self, "_" + event.kind.replace(" ", "_").replace("'", ""))
        return bool(method(event))

    def _at(self, at_s: float, call: Callable[[], object]) -> None:
        """Have something called that no process does."""
        self._world.kernel.call_at(at_s, call, context=self._world.network.nobody.copy())

    def _later(self, event: Event, call: Callable[[], object]) -> None:
        self._at(min(event.at_s + event.for_s, self._world.setting.calm_s), call)

    def faults(self) -> list[Event]:
        """Return the events that hit, without those that are requests or come at the end."""
        return [event for event in self.hit if event.kind not in ELSEWHERE]

    # Targets.

    def actors(self) -> list[Handle]:
        found = self._world.cluster.actors
        return [found[name] for name in sorted(found) if found[name].process.is_alive]

    def _process(self, event: Event) -> Process | None:
        if event.role == "actor":
            found = [actor.process for actor in self.actors()]
        else:
            replicas = self._world.serve.deployments[event.role].replicas
            found = [r.process for r in replicas if r.process.is_alive]
        if not found:
            return None
        process = found[event.what % len(found)]
        self._target = process.name
        return process

    def _node(self, event: Event) -> str | None:
        nodes = [n.name for n in self._world.cluster.nodes.values() if n.is_alive]
        if not nodes:
            return None
        self._target = nodes[event.what % len(nodes)]
        return self._target

    # Faults.

    def _dies(self, event: Event) -> bool:
        if (process := self._process(event)) is None:
            return False
        self._world.end(process)
        return True

    def _crashes_soon(self, event: Event) -> bool:
        if (process := self._process(event)) is None:
            return False
        self._world.kernel.crash_after(process, int(event.amount), self._world.end)
        return True

    def _hangs(self, event: Event) -> bool:
        if (process := self._process(event)) is None:
            return False
        kernel = self._world.kernel
        kernel.pause(process)
        self._world.touch(process.name)
        self._later(event, lambda: (kernel.go_on(process), self._world.touch(process.name)))
        return True

    def _links_cut(self, event: Event) -> bool:
        """Cut some hosts from the others: their words, the others' words, or both."""
        nodes = [HEAD, *self._world.cluster.nodes]
        some = {nodes[i] for i in event.where if i < len(nodes)}
        others = [host for host in self._world.network.addresses if host not in some]
        out = [(a, b) for a in sorted(some) for b in others]
        back = [(b, a) for a, b in out]
        self._world.network.cut((out + back, out, back)[event.what % 3])
        self._later(event, self._world.network.heal)
        return True

    def _links(self, event: Event, change: Callable[[Any, float], None], reset: float) -> bool:
        links = list(self._world.network.links.values())
        for link in links:
            change(link, event.amount)
        self._later(event, lambda: [change(link, reset) for link in links])
        return True

    def _links_slow(self, event: Event) -> bool:
        def slow(link: Any, amount: float) -> None:
            link.delay_s, link.jitter_s = 0.0004 * amount, 0.0006 * amount

        return self._links(event, slow, 1.0)

    def _bytes_damaged(self, event: Event) -> bool:
        return self._links(event, lambda link, amount: setattr(link, "damage", amount), 0.0)

    def _share_of_calls(self, event: Event, name: str) -> bool:
        cluster = self._world.cluster
        setattr(cluster, name, event.amount)
        self._later(event, lambda: setattr(cluster, name, 0.0))
        return True

    def _calls_doubled(self, event: Event) -> bool:
        return self._share_of_calls(event, "duplicates")

    def _answers_lost(self, event: Event) -> bool:
        return self._share_of_calls(event, "lost")

    def _device(self, event: Event, **changes: Any) -> bool:
        actors = self.actors()
        if not actors:
            return False
        name = self._target = actors[event.what % len(actors)].process.name
        self._world.break_device(name, **changes)
        if "slow" in changes:
            self._later(event, lambda: self._world.mend_device(name))
        return True

    def _of_node(self, event: Event) -> bool:
        """Break the devices, the memory or the disk of a node for a while."""
        node, world = self._node(event), self._world
        if node is None:
            return False
        if event.kind == "node's device raises":
            world.break_device(node, fault="raises")
            self._later(event, lambda: world.mend_device(node))
        else:
            nodes = world.full if event.kind == "memory full" else world.failing_disks
            nodes.add(node)
            self._later(event, lambda: nodes.discard(node))
        return True

    def _clock_jumps(self, event: Event) -> bool:
        node = self._node(event)
        for process in self._world.processes():
            if process.node == node:
                process.wall_s += event.amount
        return True

    def _node_that_may_go(self, event: Event) -> str | None:
        node = self._node(event)
        is_last = sum(n.is_alive for n in self._world.cluster.nodes.values()) < 2
        return None if is_last else node

    def _node_lost(self, event: Event) -> bool:
        if (node := self._node_that_may_go(event)) is None:
            return False
        self._world.lose_node(node)
        return True

    # Operations.

    def _deploy(self, identity: str = "", **changes: Any) -> bool:
        world = self._world
        world.deploy(identity or world.identity, replace(world.setting, **changes))
        return True

    def _redeploy_other_weights(self, event: Event) -> bool:
        self._identities += 1
        return self._deploy(IDENTITIES[self._identities % len(IDENTITIES)])

    def _ask(self, method: str, *args: Any) -> bool:
        """Have an operator call the controller, and note what comes of it."""
        world = self._world
        handle = world.serve.handle("controller")

        async def ask() -> None:
            try:
                async with asyncio.timeout(ASK_S):
                    outcome = await getattr(handle, method).remote(*args)
                world.note(f"{method}{args}: {str(outcome)[:160]}")
                world.ends.changed(outcome)
            except Exception as error:
                world.note(f"{method}{args}: {type(error).__name__}")
                world.ends.not_changed(method, error)

        with world.kernel.within(world.operator):
            world.kernel.create_task(ask())
        return True

    def _node_drains(self, event: Event) -> bool:
        if (node := self._node_that_may_go(event)) is None:
            return False
        world, at_s = self._world, self._world.kernel.now_s
        world.cluster.nodes[node].is_draining = True
        controller = world.controller()
        num_left = len(world.places.actors_on(controller, node)) if controller else 0
        self._at(at_s + EMPTY_S, lambda: world.places.emptied(node, num_left))
        self._at(at_s + NOTICE_S, lambda: world.lose_node(node))
        return True

    def _node_added(self, event: Event) -> bool:
        self._num_nodes += 1
        self._world.cluster.add_node(f"node-{self._num_nodes - 1}", 6)
        return True

    def _second_controller(self, event: Event) -> bool:
        self._world.start_second_controller()
        return True

    # Rarities; the requests of some are the scenario's.

    def _many_choices(self, event: Event) -> bool:
        """Look at the queues while they are long."""
        for number in range(LOOKS):
            self._at(event.at_s + number * LOOK_AGAIN_S, self._world.law.look)
        return True

    def _actor_dies_again_and_again(self, event: Event) -> bool:
        """End each life of an actor once it serves, for a while."""
        actors = self.actors()
        if not actors:
            return False
        world = self._world
        until_s = min(event.at_s + event.for_s, world.setting.calm_s)
        actor_id = actors[event.what % len(actors)].name.rpartition(":g")[0]
        self._target = actor_id
        ends: list[str] = []

        def look() -> None:
            for handle in self.actors():
                is_own = handle.name.rpartition(":g")[0] == actor_id
                if is_own and handle.is_started and handle.instance._actor._bank.experts:
                    ends.append(handle.name)
                    world.end(handle.process)
            if world.kernel.now_s < until_s:
                world.kernel.call_later(LOOK_AGAIN_S, look, context=world.network.nobody.copy())
            else:
                world.ends.looped(actor_id, len(ends))

        look()
        return True

    def _memory_stays_full(self, event: Event) -> bool:
        """Leave a node no memory to the end, and end an actor there."""
        actors = self.actors()
        if not actors:
            return False
        process = actors[event.what % len(actors)].process
        self._target = process.node
        self._world.small.add(process.node)
        self._world.end(process)
        return True

    def _controller_cut_off(self, event: Event) -> bool:
        """Let no call of the controller reach an actor; all others reach each other."""
        if (process := self._process(replace(event, role="controller"))) is None:
            return False
        cluster = self._world.cluster
        cluster.cut_off.add(process.pid)

        def mend() -> None:
            cluster.cut_off.discard(process.pid)
            self._world.network.heal()

        self._later(event, mend)
        return True

    def _routers_die_in_a_redeploy(self, event: Event) -> bool:
        """Deploy other weights, and end the earlier routers while they have requests."""
        replicas = list(self._world.serve.deployments["router"].replicas)

        def end() -> None:
            for replica in replicas:
                if replica.process.is_alive:
                    self._world.end(replica.process)

        self._later(event, end)
        return self._redeploy_other_weights(event)

    def _gateway_unreachable(self, event: Event) -> bool:
        """Break the links of a gateway, and let none be made anew; calls still pass."""
        if (process := self._process(replace(event, role="gateway"))) is None:
            return False
        network = self._world.network
        network.hide(process)
        self._later(event, lambda: network.hidden.discard(process.pid))
        return True
