"""What routers say of silent actors, and when: the signs by which an actor is replaced."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.controller.health.liveness import LOOK_S, SUSPECTED_S, Silence
from cluster.controller.health.suspicion import ANSWER_S, SUSPICION_S, Suspicion
from cluster.controller.records.members import Members
from cluster.reports import ProcessStatus

ACTORS = [f"expert-{number}" for number in range(4)]
ROUTER = ProcessStatus(1, "node")
BEGIN_S = 1000.0


class Clock:
    """The time of the controller, which only the test moves."""

    def __init__(self) -> None:
        self.now_s = BEGIN_S

    def monotonic(self) -> float:
        return self.now_s


class State:
    """The cluster as the suspicion sees it: four actors of generation 1, each with a twin."""

    def __init__(self) -> None:
        self.handles = dict.fromkeys(ACTORS)
        self.placement = SimpleNamespace(generations=dict.fromkeys(ACTORS, 1), holders={})
        self.shares: dict[str, Any] = {}
        self.fleet = SimpleNamespace(specs=())
        self.asked = 0

    async def ask_members(self, now_s: float) -> None:
        self.asked += 1

    async def check_epoch(self) -> None:
        """This controller is the newest."""


class Cluster:
    """A controller that hears none of some actors, and a router."""

    def __init__(self, clock: Clock, *silent: str) -> None:
        self.clock, self.state, self.members = clock, State(), Members()
        self.suspicion = Suspicion(self.state, self.members, lambda actor_id: None)  # type: ignore[arg-type]
        self.silences = {actor_id: Silence(clock.now_s) for actor_id in silent}
        for actor_id in ACTORS:
            if actor_id not in silent:
                self.suspicion._silences.note(actor_id, None)
        self.router_calls({})

    def router_calls(self, heard: dict[str, float]) -> None:
        """The router's poll, with the ages of the answers that it has heard."""
        self.members.heard("router", ROUTER, heard={a: (1, age_s) for a, age_s in heard.items()})

    def lost_after(self, time_s: float) -> set[str]:
        """Return the actors that are replaced by the end of a time."""
        lost = set()
        until_s = self.clock.now_s + time_s
        while self.clock.now_s < until_s - 1e-9:
            self.clock.now_s += LOOK_S
            for actor_id, silence in self.silences.items():
                silence.look(self.clock.now_s)
                if asyncio.run(self.suspicion.is_lost(actor_id, silence, self.clock.now_s)):
                    lost.add(actor_id)
        return lost


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


def test_one_silent_actor_is_replaced_as_soon_as_a_router_waits_in_vain(clock: Clock) -> None:
    cluster = Cluster(clock, "expert-0")
    assert cluster.lost_after(SUSPECTED_S + LOOK_S) == set()
    cluster.router_calls({})
    cluster.suspicion.suspect("expert-0", hears_others=True)
    assert cluster.lost_after(LOOK_S) == {"expert-0"}


def test_among_many_silent_a_late_suspicion_counts_unless_the_router_takes_it_back(
    clock: Clock,
) -> None:
    for is_heard in (True, False):
        cluster = Cluster(clock, *ACTORS)
        assert cluster.lost_after(2 * SUSPECTED_S) == set()
        asked = cluster.state.asked
        cluster.suspicion.suspect("expert-0", hears_others=True)
        assert cluster.lost_after(ANSWER_S / 2) == set()
        assert cluster.state.asked > asked
        cluster.router_calls({"expert-0": 0.01} if is_heard else {})
        assert cluster.lost_after(LOOK_S) == (set() if is_heard else {"expert-0"})


def test_a_router_that_does_not_call_has_its_time_from_the_first_suspicion_in_a_row(
    clock: Clock,
) -> None:
    cluster = Cluster(clock, *ACTORS)
    assert cluster.lost_after(2 * SUSPECTED_S) == set()
    for _ in range(round(ANSWER_S / LOOK_S) - 1):  # it repeats the suspicion while it waits
        cluster.suspicion.suspect("expert-0", hears_others=True)
        assert cluster.lost_after(LOOK_S) == set()
    cluster.suspicion.suspect("expert-0", hears_others=True)
    assert cluster.lost_after(2 * LOOK_S) == {"expert-0"}
    cluster.clock.now_s += 2 * SUSPICION_S
    cluster.suspicion.suspect("expert-0", hears_others=True)  # after a pause it is a new one
    assert cluster.lost_after(LOOK_S) == set()
