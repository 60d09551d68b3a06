"""Deaths of actors: when an actor is broken, when its successor comes, and which nodes it avoids.

Pure, with the caller's clock. An actor's deaths count in a row until it has worked for a while: one
death is forgiven for each :data:`FORGIVEN_S` of work. That an actor came up forgives nothing: a bad
device lets a process come up, and fails its first batch.

A node is to blame for unexplained deaths if they recur, and only on this node.
Deaths on several nodes at once have another reason, such as a request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cluster.reports import FailingActor
from cluster.spec import ActorReport

BROKEN_TESTS = 3
"""After this many failed self-tests in a row an actor counts as broken, and is replaced."""
FORGIVEN_S = 10.0
"""How long an actor must work before one death is forgiven."""
FORGIVEN_IDLE_S = 600.0
"""The same for an actor that is up and idle."""
FIRST_RETRY_S = 0.2
MAX_RETRY_S = 60.0
"""The delay before the second successor, and the longest; each is twice the last."""
AVOID_NODE_S = 60.0
MAX_AVOID_NODE_S = 3600.0
"""How long a node is avoided after one bad end of an actor, and at most; it doubles each time."""
MAX_DOUBLINGS = 30
TOGETHER_S = 20.0
"""Deaths on several nodes within this time have one reason; a start takes part of this time."""


class BrokenActorError(Exception):
    """An actor fails its self-tests and must be replaced."""


@dataclass(frozen=True, slots=True)
class Death:
    """The end of one life of an actor.

    ``is_of_place`` says that the device or the node may be to blame, so that the successor goes
    elsewhere. ``needed_bytes`` and ``missing_bytes`` are set if memory did not suffice.
    """

    reason: str
    is_of_place: bool = False
    needed_bytes: int = 0
    missing_bytes: int = 0


@dataclass(slots=True)
class _Actor:
    """What is known of an actor's lives; ``deaths`` are in a row."""

    deaths: int = 0
    began_at_s: float = 0.0
    node: str = ""
    device: str = ""
    up_since_s: float | None = None
    works_since_s: float | None = None
    retry_at_s: float | None = None
    failed_tests: int = 0
    is_place_bad: bool = False
    lacks_experts: bool = False
    last: Death = field(default_factory=lambda: Death(""))

    def deaths_at(self, now_s: float) -> int:
        """Return the deaths that are not forgiven yet."""
        forgiven = 0
        if self.works_since_s is not None:
            forgiven = int((now_s - self.works_since_s) / FORGIVEN_S)
        if self.up_since_s is not None and not self.failed_tests:
            forgiven = max(forgiven, int((now_s - self.up_since_s) / FORGIVEN_IDLE_S))
        return max(0, self.deaths - forgiven)


@dataclass(slots=True)
class _Node:
    """The bad ends of actors on a node."""

    ends: int = 0
    until_s: float = -math.inf


class Deaths:
    """The lives and deaths of all actors of one application."""

    def __init__(self) -> None:
        """Begin without actors."""
        self._actors: dict[str, _Actor] = {}
        self._nodes: dict[str, _Node] = {}
        self._died: dict[str, tuple[str, float]] = {}
        """Where and when each actor last died while it was up and not broken."""

    def begin(self, actor_id: str, now_s: float) -> None:
        """Note that an actor is about to load: it is created, adopted, or loads again."""
        actor = self._actors.setdefault(actor_id, _Actor())
        actor.began_at_s, actor.retry_at_s, actor.lacks_experts = now_s, None, False
        actor.node = actor.device = ""

    def located(self, report: ActorReport) -> None:
        """Note where an actor runs."""
        actor = self._actors.setdefault(report.actor_id, _Actor())
        actor.node, actor.device = report.node, report.device

    def came_up(self, report: ActorReport, now_s: float) -> None:
        """Note that an actor holds its share and serves."""
        self.located(report)
        self._actors[report.actor_id].up_since_s = now_s

    def lacks_experts(self, actor_id: str, reason: Death) -> None:
        """Note that an actor serves but could not load the rest of its share."""
        actor = self._actors.setdefault(actor_id, _Actor())
        actor.lacks_experts, actor.last = True, reason

    def observe(self, report: ActorReport, now_s: float) -> None:
        """Take an actor's heartbeat."""
        actor = self._actors.setdefault(report.actor_id, _Actor())
        if report.failed_tests and not actor.failed_tests:
            actor.deaths, actor.works_since_s = actor.deaths_at(now_s), None
        actor.failed_tests = report.failed_tests
        if report.failed_tests:
            actor.last = Death(report.failure, is_of_place=True)
        elif report.steps > report.failed_batches and actor.works_since_s is None:
            actor.works_since_s = now_s

    def is_broken(self, actor_id: str) -> bool:
        """Return whether an actor must be replaced, judging by its last heartbeat."""
        return self._actors[actor_id].failed_tests >= BROKEN_TESTS

    def ended(self, actor_id: str, death: Death, now_s: float) -> float:
        """Note an actor's death; returns how long to wait before its successor is created."""
        actor = self._actors.setdefault(actor_id, _Actor())
        was_up, was_broken = actor.up_since_s is not None, actor.failed_tests >= BROKEN_TESTS
        is_short = actor.works_since_s is None or now_s - actor.works_since_s < FORGIVEN_S
        actor.deaths = actor.deaths_at(now_s) + 1
        actor.up_since_s, actor.works_since_s, actor.failed_tests = None, None, 0
        actor.last = death
        if was_up and not was_broken:
            self._died[actor_id] = (actor.node, now_s)
        is_again = (
            actor.deaths > 1 and is_short and not self._others_died(actor_id, actor.node, now_s)
        )
        actor.is_place_bad = death.is_of_place and (was_broken or not was_up or is_again)
        if actor.is_place_bad:
            self._blame(actor.node, now_s)
        wait_s = delay_s(actor.deaths, was_up)
        actor.retry_at_s = now_s + wait_s
        return wait_s

    def forget(self, actor_id: str) -> None:
        """Drop an actor that left the fleet."""
        self._actors.pop(actor_id, None)
        self._died.pop(actor_id, None)

    def avoided_nodes(self, now_s: float) -> dict[str, float]:
        """Return the nodes on which actors ended badly lately, and until when to avoid each."""
        return {name: node.until_s for name, node in self._nodes.items() if now_s < node.until_s}

    def is_place_bad(self, actor_id: str) -> bool:
        """Return whether an actor's last end is a reason to avoid its node."""
        return self._actors.get(actor_id, _Actor()).is_place_bad

    def place_of(self, actor_id: str) -> tuple[str, str]:
        """Return node and device of an actor's last life, empty if they are not known."""
        actor = self._actors.get(actor_id, _Actor())
        return actor.node, actor.device

    def status(self, now_s: float) -> tuple[FailingActor, ...]:
        """Return the actors that fail self-tests, lack experts, wait, or died more than once."""
        return tuple(
            FailingActor(
                actor_id=actor_id,
                deaths=actor.deaths_at(now_s),
                reason=actor.last.reason,
                node=actor.node,
                device=actor.device,
                retry_in_s=max(0.0, (actor.retry_at_s or now_s) - now_s),
                failed_tests=actor.failed_tests,
                needed_bytes=actor.last.needed_bytes,
                missing_bytes=actor.last.missing_bytes,
            )
            for actor_id, actor in sorted(self._actors.items())
            if actor.failed_tests
            or actor.lacks_experts
            or actor.deaths_at(now_s) > 1
            or (actor.deaths and actor.up_since_s is None)
        )

    def _others_died(self, actor_id: str, name: str, now_s: float) -> bool:
        """Return whether other actors have died on other nodes lately."""
        return any(
            other != actor_id and node != name and now_s - died_at_s < TOGETHER_S
            for other, (node, died_at_s) in self._died.items()
        )

    def _blame(self, name: str, now_s: float) -> None:
        if not name:
            return
        node = self._nodes.setdefault(name, _Node())
        if now_s - node.until_s > MAX_AVOID_NODE_S:
            node.ends = 0
        node.ends += 1
        avoid_s = AVOID_NODE_S * 2 ** min(node.ends - 1, MAX_DOUBLINGS)
        node.until_s = now_s + min(avoid_s, MAX_AVOID_NODE_S)


def delay_s(deaths: int, came_up: bool) -> float:
    """Return the wait before a successor after this many deaths in a row.

    The successor of an actor that came up and died once is created at once.
    """
    doublings = deaths - 2 if came_up else deaths - 1
    if doublings < 0:
        return 0.0
    return min(FIRST_RETRY_S * 2 ** min(doublings, MAX_DOUBLINGS), MAX_RETRY_S)
