"""What is done to the cluster: drawn episodes of faults and changes, and how each is done.

An episode ends when the cluster is calm again, which the documents promise within a time.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from tests.blackbox.judge import Fault
from tests.blackbox.machines import MODEL, WORKERS, Done, Machines, send, wait
from tests.fault.signals import is_running

CALM_S, ENDED_S, AGAIN, AGAIN_S = 150.0, 120.0, 5, 3.0
"""How long it may take until the cluster is calm, and until a drained machine's Ray has ended; how
often an operator repeats a command that failed beside a fault, and after how long."""
LAYERS, EXPERTS, ACTORS = 4, 8, (2, 3, 4)
"""Of the model, and how many actors there may be."""


class Kind(StrEnum):
    """What is done to which part."""

    KILL_ACTOR = "kill an actor"
    KILL_ROUTER = "kill a router"
    KILL_GATEWAY = "kill a gateway"
    KILL_CONTROLLER = "kill the controller"
    KILL_RAYLET = "kill a raylet"
    CUT = "cut a link"
    FREEZE = "freeze a process"
    REDEPLOY = "redeploy"
    SCALE = "scale"
    COPIES = "copies"
    REBALANCE = "rebalance"
    DRAIN = "drain a machine"
    DRAIN_ACTOR = "drain an actor"


TOGETHER_ONCE = ({Kind.KILL_RAYLET, Kind.CUT, Kind.DRAIN}, {Kind.SCALE, Kind.DRAIN_ACTOR})
"""Of each of these, an episode has one at most: with both workers lost at once there are no copies
of some experts, and two changes of the number of actors have an end that depends on their order."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: ``at_s`` after its episode began, to the ``choice``-th of its kind of victims."""

    kind: Kind
    at_s: float
    choice: int
    lasts_s: float


def draw(seed: int, number: int, bag: list[Kind]) -> list[Event]:
    """Return an episode of a run; takes kinds from ``bag``, which holds each kind in turn."""
    source = random.Random(f"{seed}: episode {number}")
    events: list[Event] = []
    for _ in range(source.choice((1, 1, 2, 2, 3))):
        if not bag:
            bag += source.sample(list(Kind), len(Kind))
        if any(bag[-1] in kinds and {e.kind for e in events} & kinds for kinds in TOGETHER_ONCE):
            break
        lasts_s = source.choice((source.uniform(0.3, 3), source.uniform(3, 12), 35.0))
        at_s = source.uniform(0, 5) if events else 0.0
        events.append(Event(bag.pop(), at_s, source.randrange(1 << 16), lasts_s))
    return events


class Faults:
    """Does events to a cluster; remembers when each began and ended, and what went wrong."""

    def __init__(self, machines: Machines, weights: dict[str, Path], note: Callable[..., None]):
        """``weights`` are two checkpoints by name, the first of which is deployed."""
        self._machines, self._weights, self._note = machines, weights, note
        self._lock = threading.Lock()
        self.faults: list[Fault] = []
        self.served: list[tuple[str, float, float]] = [(next(iter(weights)), 0.0, float("inf"))]
        """Weights, each from when to when a request may have been answered by them."""
        self.actors = 3
        self.problems: list[str] = []
        self.told: dict[str, Any] = {}

    def around(self, began_s: float, ended_s: float) -> tuple[list[str], list[Fault]]:
        """Return the weights that may have been served, and the faults, of this time."""
        with self._lock:
            served = [i for i, begin_s, end_s in self.served if begin_s <= ended_s and began_s <= end_s]
            return served, [fault for fault in self.faults if fault.overlaps(began_s, ended_s)]

    def become_calm(self) -> None:
        """Wait until every part is there; the faults so far end then. Raises ``TimeoutError``."""
        began_s, missing = time.monotonic(), ""

        def is_calm() -> bool:
            nonlocal missing
            self._revive()
            told, missing = self._machines.whole(self.actors)
            self.told = told or self.told
            return not missing

        try:
            wait(is_calm, "calm", CALM_S)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {missing}") from None
        now_s = time.monotonic()
        with self._lock:
            for fault in self.faults:
                fault.ended_s = min(fault.ended_s, now_s)
            self.served = [
                (one, begin_s, end_s if last else min(end_s, now_s))
                for (one, begin_s, end_s), last in zip(
                    self.served, [False] * (len(self.served) - 1) + [True], strict=True
                )
            ]
        self._note("calm", after_s=round(now_s - began_s, 1))

    def episode(self, events: list[Event]) -> None:
        """Do the events of an episode, each on a thread of its own; returns when all are over."""
        threads = [
            threading.Thread(target=self._do, args=(event, len(events) == 1)) for event in events
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _do(self, event: Event, is_alone: bool) -> None:
        threading.Event().wait(event.at_s)
        try:
            hit = _DEEDS[event.kind](self, event, is_alone)
        except Exception as error:  # told, not lost with its thread
            self._problem(f"{event.kind}: {error!r}")
        else:
            self._note("event", kind=event.kind, hit=hit)

    def _begin(self, what: str, **others: Any) -> None:
        with self._lock:
            self.faults.append(Fault(what, time.monotonic(), **others))

    def _problem(self, what: str) -> None:
        self.problems.append(what)
        self._note("violation", of="event", found=[what])

    def _victim(self, part: str, choice: int) -> dict[str, Any]:
        """Return one of the last status's processes of a kind."""
        parts = {
            "controller": [{"pid": self.told["controller_pid"]}],
            **{name: self.told[name] for name in ("actors", "routers", "gateways")},
        }
        parts["any"] = [{**one, "of": name} for name, all_ in parts.items() for one in all_]
        victims = [one for one in parts[part] if is_running(one["pid"])]
        return dict(victims[choice % len(victims)])

    def _kill(self, part: str, event: Event, costs: int = 0) -> str:
        victim = self._victim(part, event.choice)
        machine = self._machines.machine_of(victim["pid"])
        lost = frozenset({machine} if part == "gateways" else ())
        self._begin(event.kind, lost=lost, costs=costs)
        send(victim["pid"], signal.SIGKILL)
        return f"{part} {victim['pid']} on machine {machine}"

    def _freeze(self, event: Event, is_alone: bool) -> str:
        victim = self._victim("any", event.choice)
        pid, part = victim["pid"], victim["of"]
        machine = self._machines.machine_of(pid)
        lost = frozenset({machine} if part == "gateways" else ())
        self._begin(event.kind, lost=lost, costs=int(part == "actors"))
        send(pid, signal.SIGSTOP)
        threading.Event().wait(event.lasts_s)
        was_killed = not is_running(pid)
        send(pid, signal.SIGCONT)
        end = "was killed meanwhile" if was_killed else "went on"
        return f"{part} {pid} on machine {machine} for {event.lasts_s:.1f} s, {end}"

    def _cut(self, event: Event, is_alone: bool) -> str:
        machine = WORKERS[event.choice % len(WORKERS)]
        self._begin(event.kind, lost=frozenset({machine}), costs=2)
        self._machines.cut(machine)
        try:
            was_ready = self._machines.is_ready(machine)
            threading.Event().wait(event.lasts_s)
        finally:
            self._machines.heal(machine)
        if was_ready:
            raise RuntimeError(f"the cut of machine {machine} did not hit")
        end = "its Ray lives" if self._machines.is_up(machine) else "its Ray has ended"
        return f"machine {machine} for {event.lasts_s:.1f} s, {end}"

    def _kill_raylet(self, event: Event, is_alone: bool) -> str:
        machine = WORKERS[event.choice % len(WORKERS)]
        self._begin(event.kind, lost=frozenset({machine}), costs=1)
        send(self._machines.raylet(machine), signal.SIGKILL)
        wait(lambda: not self._machines.is_up(machine), "its Ray ends", ENDED_S)
        threading.Event().wait(event.lasts_s)
        return f"machine {machine}, away for {event.lasts_s:.1f} s"

    def _drain(self, event: Event, is_alone: bool) -> str:
        machine = WORKERS[event.choice % len(WORKERS)]
        [node] = [
            one["node"]
            for one in self.told["gateways"]
            if self._machines.machine_of(one["pid"]) == machine
        ]
        self._begin(event.kind, left=frozenset({machine}), costs=1)
        self._operate(is_alone, "drain", node)
        wait(lambda: not self._machines.is_up(machine), "the drained machine's Ray ends", ENDED_S)
        return f"machine {machine}"

    def _revive(self) -> None:
        """Start Ray again on machines without, as an operator would."""
        for machine in WORKERS:
            if not self._machines.is_up(machine):
                self._machines.start(machine)

    def _redeploy(self, event: Event, is_alone: bool) -> str:
        name = next(one for one in self._weights if one != self.served[-1][0])
        with self._lock:
            self.faults.append(Fault(event.kind, time.monotonic(), replaces=True))
            self.served.append((name, time.monotonic(), float("inf")))
        self._repeat(is_alone, lambda: self._machines.deploy(self._weights[name]), "deploy")
        return name

    def _scale(self, event: Event, is_alone: bool) -> str:
        self.actors = [n for n in ACTORS if n != self.actors][event.choice % 2]
        self._begin(event.kind)
        self._operate(is_alone, "scale", str(self.actors))
        return f"{self.actors} actors"

    def _copies(self, event: Event, is_alone: bool) -> str:
        self._begin(event.kind)
        copies = str(2 + event.choice % 2)
        which = [str(event.choice % LAYERS), str(event.choice % EXPERTS)]
        words = ["all"] if event.choice % 3 else which
        self._operate(is_alone, "copies", MODEL, *words, copies)
        return " ".join([*words, copies])

    def _rebalance(self, event: Event, is_alone: bool) -> str:
        self._begin(event.kind)
        self._operate(is_alone, "rebalance")
        return ""

    def _drain_actor(self, event: Event, is_alone: bool) -> str:
        if self.actors == min(ACTORS):
            return self._scale(event, is_alone)
        actor = self._victim("actors", event.choice)["actor_id"]
        self._begin(event.kind, costs=1)
        self._operate(is_alone, "drain", actor)
        self.actors -= 1
        return str(actor)

    def _operate(self, is_alone: bool, *words: str) -> None:
        self._repeat(is_alone, lambda: self._machines.run("expertmesh", *words), " ".join(words))

    def _repeat(self, is_alone: bool, command: Callable[[], Done], what: str) -> None:
        """Run a command, which must succeed; beside a fault it may fail and is repeated."""
        for attempt in range(1, AGAIN + 1):
            done = command()
            self._note("command", words=what, exit_code=done.exit_code, errors=done.errors[-500:])
            if done.exit_code == 0:
                return
            if is_alone or attempt == AGAIN:
                raise RuntimeError(f"exit code {done.exit_code}: {done.errors[-500:]}")
            threading.Event().wait(AGAIN_S)


_DEEDS: dict[Kind, Callable[[Faults, Event, bool], str]] = {
    Kind.KILL_ACTOR: lambda self, event, _: self._kill("actors", event, costs=1),
    Kind.KILL_ROUTER: lambda self, event, _: self._kill("routers", event),
    Kind.KILL_GATEWAY: lambda self, event, _: self._kill("gateways", event),
    Kind.KILL_CONTROLLER: lambda self, event, _: self._kill("controller", event),
    Kind.KILL_RAYLET: Faults._kill_raylet,
    Kind.CUT: Faults._cut,
    Kind.FREEZE: Faults._freeze,
    Kind.REDEPLOY: Faults._redeploy,
    Kind.SCALE: Faults._scale,
    Kind.COPIES: Faults._copies,
    Kind.REBALANCE: Faults._rebalance,
    Kind.DRAIN: Faults._drain,
    Kind.DRAIN_ACTOR: Faults._drain_actor,
}
