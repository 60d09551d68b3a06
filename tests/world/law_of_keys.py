"""The law of keys: who may not gets nothing, and who has a quota gets neither more nor less.

It judges by what clients have sent and got, and by what the documents say of quotas. A rate is a
bucket that fills steadily, so what a gateway could take at a time is the least, over all earlier
times, of the whole bucket, what has come since, less what was taken since. What is taken is known
within bounds, and what other gateways have taken is told within :data:`REPORT_S`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from router.control.placement_view import WATCH_S
from tests.world.gateways import LIMITS, MONITOR, SMALL, STRANGER, Call, keyring

if TYPE_CHECKING:
    from tests.world.clients import Answer
    from tests.world.weather import Event
    from tests.world.world import World

REPORT_S = 2 * WATCH_S + 0.3
"""How late a gateway learns what another one has given."""
CAPACITY = LIMITS[SMALL]["tokens_per_min"]
RATE_PER_S = CAPACITY / 60.0
REQUESTS_PER_S = LIMITS[SMALL]["requests_per_s"]
UNHEARD = {
    "hangs", "links cut", "answers lost", "controller cut off", "controller starts cut off",
    "node lost", "node drains", "second controller", "clock jumps",
}  # fmt: skip
"""Events after which gateways may not hear of each other, as after the end of a controller."""
REFUSED = {STRANGER: "UnauthenticatedError", MONITOR: "ForbiddenError"}
_EPSILON = 1e-6


class LawOfKeys:
    """The keys of a world's gateways, and the calls that were made with them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.ring = keyring() if world.setting.keys else None
        self.calls: list[Call] = []

    def judges(self, answer: Answer) -> bool:
        """Return whether the end of a request is this law's to judge, and judge it."""
        name, is_of_key = answer.plan.tenant, "this key's" in answer.message
        if name in REFUSED and answer.error not in ("", "NoGateway"):
            if answer.error != REFUSED[name]:
                self._broken("a wrong key gets nothing", f"{answer.error} for {name}")
            return True
        if is_of_key and not LIMITS.get(name):
            self._broken("a quota is its tenant's alone", f"{answer.message} for {name}")
        return is_of_key

    def look(self) -> None:
        """Look at all calls, and at what gateways count."""
        if self.ring is None:
            return
        for call in self.calls:
            if call.name in REFUSED and call.received:
                self._broken("a wrong key gets nothing", f"{call.name} got {call.received} tokens")
        self._quiet_s = min(
            (e.at_s for e in self._world.happenings.hit if _is_disturbing(e)), default=float("inf")
        )
        gateways = {call.gateway for call in self.calls}
        for name, limits in LIMITS.items():
            if limits:
                for gateway in sorted(gateways):
                    self._limited(name, gateway)
        for replica in self._world.serve.deployments["gateway"].running():
            self._given_back(replica.process.name, replica.handle.instance)

    def _limited(self, name: str, gateway: str) -> None:
        calls = [call for call in self.calls if call.name == name]
        for call in calls:
            if call.gateway != gateway or call.ended_at_s == float("inf"):
                continue
            others = [other for other in calls if other is not call and other.at_s <= call.at_s]
            if name == SMALL:
                self._rates(call, others)
            else:
                self._concurrent(call, others)
            self._comes_back(call, calls)

    def _rates(self, call: Call, others: list[Call]) -> None:
        told = f"{call.name} at {call.at_s:.3f} by {call.gateway}"
        is_quiet = call.ended_at_s < self._quiet_s
        if call.was_read and not call.is_refused():
            for start_s, tokens, requests in _least(call, others, is_quiet):
                passed_s = call.at_s - start_s
                over = call.prompt + call.received + tokens - CAPACITY - RATE_PER_S * passed_s
                if over > _EPSILON:
                    self._broken("no tenant gets more than its quota", f"{over:g} tokens: {told}")
                over = 1 + requests - REQUESTS_PER_S * (1 + passed_s)
                if over > _EPSILON:
                    self._broken("no tenant gets more than its quota", f"{over:g} requests: {told}")
        elif is_quiet and call.is_refused("tokens_per_min"):
            needed = call.prompt + call.most if call.was_read else 0
            if _certain_level(call, others) >= needed + RATE_PER_S * REPORT_S + 1:
                self._broken("who is within its quota is served", told)

    def _concurrent(self, call: Call, others: list[Call]) -> None:
        bound, own = LIMITS[call.name]["concurrent_tokens"], call.prompt + call.most
        is_quiet = call.ended_at_s < self._quiet_s
        told = f"{call.name} at {call.at_s:.3f} by {call.gateway}"
        running = [o for o in others if o.was_read and not o.is_refused()]
        if not call.is_refused():
            held = [
                o for o in running
                if o.at_s < call.at_s < o.ended_at_s < float("inf")
                and (o.gateway == call.gateway or (is_quiet and o.at_s < call.at_s - REPORT_S))
            ]  # fmt: skip
            most = max(own, bound)
            if sum(o.prompt + o.most for o in held) + own > most:
                self._broken("no tenant gets more than its quota", f"tokens under way: {told}")
        elif is_quiet:
            held = [o for o in running if o.ended_at_s >= call.at_s - REPORT_S]
            if sum(o.prompt + o.most for o in held) + own <= bound:
                self._broken("who is within its quota is served", told)

    def _comes_back(self, call: Call, calls: list[Call]) -> None:
        """Who comes back at the announced time is let in, if nobody else took it meanwhile."""
        before = call.before
        if before is None or call.gateway != before.gateway or call.ended_at_s > self._quiet_s:
            return
        if call.was_read and not before.was_read:
            return  # the first was refused for another amount, before its size was known
        for other in calls:
            late_s = 0.0 if other.gateway == call.gateway else REPORT_S
            is_between = before.at_s - late_s < other.at_s <= call.at_s
            if other.was_read and other is not call and is_between:
                return
        limits = [
            limit for limit in ("tokens_per_min", "requests_per_s") if before.is_refused(limit)
        ]
        if any(call.is_refused(limit) for limit in limits):
            self._broken(
                "the time to come back is true", f"{call.error} at {call.at_s:.6f}, after "
                f"{before.error} at {before.at_s:.6f}",
            )  # fmt: skip

    def _given_back(self, name: str, gateway: object) -> None:
        """A gateway has counted what its callers have had, and nothing else."""
        for tenant, account in gateway.charges._accounts.items():  # type: ignore[attr-defined]
            calls = [c for c in self.calls if c.name == tenant and c.gateway == name and c.was_read]
            least, most = (sum(map(count, calls)) for count in (_least_used, _most_used))
            if not least <= account.used_tokens <= most:
                self._broken(
                    "what is unused is given back",
                    f"{name}: {account.used_tokens} tokens of {tenant}, not {least} to {most}",
                )

    def _broken(self, law: str, text: str) -> None:
        self._world.law.broken(law, text)


def _is_disturbing(event: Event) -> bool:
    is_end = event.kind in ("dies", "crashes soon") and event.role in ("controller", "gateway")
    return is_end or event.kind in UNHEARD or event.kind.startswith("redeploy")


def _least_used(call: Call) -> int:
    return call.prompt + (0 if call.is_refused() else call.received)


def _most_used(call: Call) -> int:
    """Return the most that a call was charged in the end: what its client has not seen may be."""
    if call.error is None or call.is_refused() or call.is_streamed:
        return _least_used(call)
    return call.prompt + call.most


def _least(call: Call, others: list[Call], is_quiet: bool) -> Iterator[tuple[float, int, int]]:
    """Yield times, and the tokens and requests that were surely taken from each on."""
    known = [
        o for o in others
        if o.was_read
        and (o.gateway == call.gateway or (is_quiet and o.ended_at_s + REPORT_S < call.at_s))
    ]  # fmt: skip
    tokens = 0
    for requests, other in enumerate(sorted(known, key=lambda one: -one.at_s), 1):
        is_over = other.ended_at_s <= call.at_s
        tokens += _least_used(other) if is_over else other.prompt + other.received
        yield other.at_s, tokens, requests


def _certain_level(call: Call, others: list[Call]) -> float:
    """Return how many tokens a gateway may surely give at a call's time."""
    level, taken = float(CAPACITY), 0
    for other in sorted(others, key=lambda one: -one.at_s):
        if not other.was_read:
            continue
        late_s = 0.0 if other.gateway == call.gateway else REPORT_S
        is_over = other.ended_at_s + late_s <= call.at_s
        taken += _most_used(other) if is_over or other.is_refused() else other.prompt + other.most
        level = min(level, CAPACITY + RATE_PER_S * (call.at_s - other.at_s - late_s) - taken)
    return level
