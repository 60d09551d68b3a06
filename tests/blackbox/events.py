"""What is done to the cluster: drawn episodes of faults and changes, and how each is done."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.blackbox.judge import Fault
from tests.blackbox.machines import ACTORS, MODEL, WORKERS, Machines
from tests.fault.ray_nodes import wait_for
from tests.fault.signals import is_running, is_stopped, kill, let_go, stop

ATTEMPTS, AGAIN_S = 5, 3.0
"""How often an operator gives a command that fails beside a fault, and the time between."""
LATE_S, LATE_AFTER_CUT_S = 10.0, 30.0
"""How long after a fault the cluster may still change. Serve notices up to 30 s after a cut that a
call of its own was lost, and replaces the gateway."""
LAYERS, EXPERTS, FEWEST, MOST = 4, 8, 2, 4
"""Of the model; and how few and how many actors there may be."""
SIGNALS = [f"{what} {part}" for what in ("kill", "freeze") for part in (
    "actors", "routers", "gateways", "controller")]  # fmt: skip
LOSE, CUT, DRAIN = "kill a raylet", "cut a link", "drain a machine"
DRAIN_ACTOR, SCALE, COPIES, REBALANCE = "drain an actor", "scale", "copies", "rebalance"
REDEPLOY = "redeploy"
KINDS = (*SIGNALS, LOSE, CUT, DRAIN, DRAIN_ACTOR, SCALE, COPIES, REBALANCE, REDEPLOY)
ONCE = ({LOSE, CUT, DRAIN}, {SCALE, DRAIN_ACTOR, COPIES})
"""An episode has one of each at most: with both workers lost at once some experts have no copy, and
of two changes of the number of actors, which bounds the copies, the order decides the end."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: ``at_s`` after its episode began, to a machine or the ``choice``-th of a part."""

    kind: str
    at_s: float
    lasts_s: float
    worker: int
    choice: int


def draw(seed: int, number: int, bag: list[str]) -> list[Event]:
    """Return an episode of a run; takes kinds from ``bag``, which holds each kind in turn."""
    source = random.Random(f"{seed}: episode {number}")
    events: list[Event] = []
    for _ in range(source.choice((1, 1, 2, 2, 3))):
        if not bag:
            bag += source.sample(KINDS, len(KINDS))
        if any(bag[-1] in kinds and {e.kind for e in events} & kinds for kinds in ONCE):
            break
        lasts_s = source.choice((source.uniform(0.3, 3), source.uniform(3, 12), 35.0))
        at_s = source.uniform(0, 5) if events else 0.0
        victim = source.choice(WORKERS), source.randrange(1 << 16)
        events.append(Event(bag.pop(), at_s, lasts_s, *victim))
    return events


class Faults:
    """Does events to a cluster; remembers which there were, and which weights were served."""

    def __init__(self, machines: Machines, weights: dict[str, Path], note: Callable[..., None]):
        """``weights`` are two checkpoints by name, the first of which is deployed."""
        self._machines, self._weights, self._note = machines, weights, note
        self._faults: list[Fault] = []
        self._served = [Fault(next(iter(weights)), 0.0)]
        self._actors, self._missing = ACTORS, ""
        self._told: Any = None
        self._nodes: dict[int, str] = {}
        """Ray's node of each machine, when the cluster was calm last."""

    def around(self, began_s: float, ended_s: float) -> tuple[list[str], list[Fault]]:
        """Return the weights that may have been served, and the faults, of this time."""
        found = [fault for fault in self._faults if fault.overlaps(began_s, ended_s)]
        return [one.what for one in self._served if one.overlaps(began_s, ended_s)], found

    def become_calm(self) -> None:
        """Wait until every part is there, and still is; the faults so far end then.

        Raises ``TimeoutError``.
        """
        began_s = time.monotonic()
        is_cut = any(one.what == CUT and one.ended_s > began_s for one in self._faults)

        def is_calm() -> bool:
            for machine in WORKERS:
                if not self._machines.rays.is_up(machine):  # an operator starts it again
                    self._machines.start(machine)
            self._told, self._missing = self._machines.whole(self._actors)
            return not self._missing

        try:
            wait_for(is_calm, "calm")
            while self._faults:
                threading.Event().wait(LATE_AFTER_CUT_S if is_cut else LATE_S)
                if is_calm():
                    break
                wait_for(is_calm, "calm again")
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self._missing}") from None
        gateways = self._told.gateways
        self._nodes = {self._machines.machine_of(one.pid): one.node for one in gateways}
        now_s = time.monotonic()
        for fault in [*self._faults, *self._served[:-1]]:
            fault.ended_s = min(fault.ended_s, now_s)
        self._note("calm", "", after_s=round(now_s - began_s, 1))

    def episode(self, events: list[Event]) -> None:
        """Do the events of an episode, each on a thread of its own; returns when all are over."""
        is_alone = len(events) == 1
        threads = [threading.Thread(target=self._do, args=(one, is_alone)) for one in events]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _do(self, event: Event, is_alone: bool) -> None:
        threading.Event().wait(event.at_s)
        try:
            if event.kind in SIGNALS:
                hit = self._signal(event)
            elif event.kind in (LOSE, CUT):
                hit = self._isolate(event)
            else:
                hit = self._operate(event, is_alone)
        except Exception as error:  # told, not lost with its thread
            self._note("violation", "event", found=[f"{event.kind}: {error!r}"])
        else:
            self._note("event", event.kind, hit=hit)

    def _begin(self, event: Event, **others: Any) -> None:
        self._faults.append(Fault(event.kind, time.monotonic(), **others))

    def _pid(self, part: str, choice: int) -> int:
        """Return one of a kind of processes, as the last status has them."""
        told = [one.pid for one in getattr(self._told, part, ())] or [self._told.controller_pid]
        living = [pid for pid in told if is_running(pid)]
        return int(living[choice % len(living)])

    def _signal(self, event: Event) -> str:
        word, part = event.kind.split()
        pid = self._pid(part, event.choice)
        machine = self._machines.machine_of(pid)
        lost, costs = machine * (part == "gateways"), int(part == "actors")
        self._begin(event, lost=lost, costs=costs)
        if word == "kill":
            kill(self._told, pid)
            return f"{pid} on machine {machine}"
        stop(self._told, pid)
        threading.Event().wait(event.lasts_s)
        went_on = is_stopped(pid)  # and was not killed meanwhile
        if went_on:
            let_go(self._told, pid)
        return f"{pid} on machine {machine} for {event.lasts_s:.1f} s, went on: {went_on}"

    def _isolate(self, event: Event) -> str:
        machine = event.worker
        self._begin(event, lost=machine, costs=2 if event.kind == CUT else 1)
        if event.kind == LOSE:
            self._machines.rays.end_raylet(machine)
            threading.Event().wait(event.lasts_s)
        else:
            self._machines.network.cut_off(machine)
            has_hit = not self._machines.is_ready(machine)
            threading.Event().wait(event.lasts_s)
            self._machines.network.reconnect(machine)
            if not has_hit:
                raise RuntimeError(f"the cut of machine {machine} did not hit")
        return f"machine {machine} for {event.lasts_s:.1f} s"

    def _operate(self, event: Event, is_alone: bool) -> str:
        """Give a command, which must succeed; beside a fault it may fail at first."""
        command, drains = self._command(event), event.kind == DRAIN
        left, costs = event.worker * drains, int(event.kind in (DRAIN, DRAIN_ACTOR))
        self._begin(event, left=left, costs=costs, replaces=event.kind == REDEPLOY)
        if event.kind == REDEPLOY:
            self._served.append(Fault(command[1], time.monotonic()))
        for attempt in range(1, ATTEMPTS + 1):
            if event.kind == REDEPLOY:
                done = self._machines.deploy(self._weights[command[1]])
            else:
                done = self._machines.run("expertmesh", *command)
            if done.returncode == 0:
                break
            self._note("failed command", "", words=command, errors=done.stderr[-500:])
            if is_alone or attempt == ATTEMPTS:
                raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-500:]}")
            threading.Event().wait(AGAIN_S)
        if drains:
            wait_for(lambda: not self._machines.rays.is_up(event.worker), "the drained Ray ends")
        return " ".join(command)

    def _command(self, event: Event) -> list[str]:
        kind, choice = event.kind, event.choice
        if kind == REDEPLOY:
            return [kind, next(name for name in self._weights if name != self._served[-1].what)]
        if kind == DRAIN:
            return ["drain", self._nodes[event.worker]]
        if kind == COPIES:
            which = [str(choice % LAYERS), str(choice % EXPERTS)] if choice % 3 else ["all"]
            return [kind, MODEL, *which, str(min(2 + choice % 2, self._actors))]
        if kind == REBALANCE:
            return [kind]
        if kind == DRAIN_ACTOR and self._actors > FEWEST:
            self._actors -= 1
            return ["drain", self._told.actors[choice % len(self._told.actors)].actor_id]
        self._actors = MOST if self._actors == FEWEST else self._actors - 1
        return ["scale", str(self._actors)]
