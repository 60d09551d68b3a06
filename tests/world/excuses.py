"""Why a request may have failed: an excuse names the request, and the events that touched it.

An event touches requests from when it happens until the deployment is whole again after it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tests.world.clients import Answer
from tests.world.law_of_time import is_poison

if TYPE_CHECKING:
    from tests.world.weather import Event
    from tests.world.world import World

RECOVERY_S, SETTLED_S = 10.0, 1.0
"""How long after an event a request may suffer from it, and how long once all is whole again."""
GENTLE = {
    "calls doubled", "clock jumps", "links slow", "disk fails", "redeploy the same",
    "redeploy other weights", "redeploy more actors", "scale up", "change copies", "rebalance",
    "node added", "second controller", "burst", "poison raises", "gateway unreachable",
    "router full",
}  # fmt: skip
"""Events under which a request with :data:`ENOUGH_S` is served, where experts have two copies."""
OF_COPIES = {
    "dies", "crashes soon", "device slow", "device raises", "device yields NaN", "rows lost",
    "drain an actor", "scale down", "redeploy fewer actors",
}  # fmt: skip
"""Events that may take one copy of an expert; a request is served under one of them at a time."""
OF_OTHER_WEIGHTS = {"redeploy other weights", "routers die in a redeploy"}
ENOUGH_S, SHORT_S = 5.0, 1.0
"""The time with which a request outlasts a loss, and the time with which it may always be late."""
BROKEN_TEXTS = (
    "output for this request is not finite", "cannot compute this request", "is NaN or infinite",
)  # fmt: skip
"""What a client is told where all copies of an expert are on broken devices."""
OTHER_MODEL_TEXT = "is not the model that is served now"
"""What a client is told that lost its gateway, and resumes after a redeploy."""


class Excuses:
    """Knows from when until when each event of a world touches requests."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._whole_at_s: dict[int, float] = {}
        """When the deployment was whole after each event, by the event's number."""

    def look(self) -> None:
        """Note which events have been overcome by now."""
        hit = self._world.happenings.hit
        left = [i for i in range(len(hit)) if i not in self._whole_at_s and not self._lasts(i)]
        if left and not self._world.unhealed():
            self._whole_at_s.update(dict.fromkeys(left, self._world.kernel.now_s))

    def _lasts(self, number: int) -> bool:
        """Return whether an event goes on: a fault, a bad device or request, or a crash to come."""
        world, event = self._world, self._world.happenings.hit[number]
        target = world.happenings.targets[number]
        is_to_come = event.kind == "crashes soon" and world.is_alive(target)
        if event.at_s + event.for_s >= world.kernel.now_s or is_to_come or target in world.bad:
            return True
        is_of_request = event.kind.startswith("poison")
        return is_of_request and any(is_poison(a) and not a.ended_at_s for a in world.answers)

    def of(self, answer: Answer) -> str:
        """Return what excuses the error of a request; nothing if nothing does."""
        plan = answer.plan
        if is_poison(answer):
            return "it is poisoned"
        if plan.timeout_s < SHORT_S and answer.error in ("DeadlineExceededError", "NoGateway"):
            return "it had little time"
        if self._world.setting.tls and answer.error == "DeadlineExceededError":
            return "a step of many short pieces is slow"
        return "; ".join(event.line() for event in self._events(answer))

    def _events(self, answer: Answer) -> list[Event]:
        """Return the events that touched a request, if they together may end it."""
        near = self._near(answer)
        if self._world.least_copies < 2 or answer.plan.timeout_s < ENOUGH_S:
            return near
        is_of_other = answer.error == "ModelReplacedError" or OTHER_MODEL_TEXT in answer.message
        has_lost = answer.lost_gateways > 0 or any(
            event.role == "router" or event.kind == "gateway unreachable" for event in near
        )
        if is_of_other and has_lost:  # no router of its tokens' model takes it
            return [event for event in near if event.kind in OF_OTHER_WEIGHTS]
        of_copies = [event for event in near if event.kind in OF_COPIES]
        hard = [e for e in near if e.kind not in GENTLE and e.kind not in OF_COPIES]
        return hard or (of_copies if len(of_copies) > 1 else [])

    def _near(self, answer: Answer) -> list[Event]:
        """Return the events that came before a request's end and were not over at its begin."""
        ended_at_s = answer.ended_at_s or self._world.kernel.now_s
        return [
            event
            for number, event in enumerate(self._world.happenings.hit)
            if event.at_s <= ended_at_s
            and answer.begun_at_s <= event.at_s + event.for_s + RECOVERY_S
            and answer.begun_at_s <= self._whole_at_s.get(number, math.inf) + SETTLED_S
        ]

    def may_be_internal(self, answer: Answer) -> bool:
        """Return whether all copies of an expert may have been on broken devices."""
        if not any(text in answer.message for text in BROKEN_TEXTS):
            return False
        hit = self._world.happenings.hit
        is_broken = any("device" in event.kind or event.kind == "rows lost" for event in hit)
        return is_broken and (len(hit) > 1 or self._world.least_copies < 2)
