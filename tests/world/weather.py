"""What happens to a world, drawn from a seed: faults, operations and requests.

A scenario is plain data, so that a part of it can be run again. Its events name their targets by
number: the process or node of that number among those that are there at the time.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tests.world.choices import with_choices
from tests.world.clients import Plan, plans
from tests.world.fleets import with_fleet
from tests.world.gateways import with_keys
from tests.world.late import with_late
from tests.world.loads import with_load
from tests.world.mixtures import with_mixture
from tests.world.natives import with_native
from tests.world.rarities import draw_flood, draw_rarity, with_rarity

BEGIN_S = 3.0
"""The deployment has had this long to start."""
CALM_S = 13.0
"""No fault lasts longer."""
FIRST_LONG, LONG_S = 1_000_000, 120.0
"""Seeds from here on have few events in a longer time, for what comes late: back-off, leases."""
ROLES = ("actor", "router", "gateway", "controller")
IDENTITIES = ("a", "b", "c")


@dataclass(frozen=True)
class Setting:
    """A deployment of a world."""

    num_nodes: int = 3
    num_actors: int = 6
    num_routers: int = 2
    num_gateways: int = 2
    num_clients: int = 8
    min_copies: int = 2
    rebalance_period_s: float | None = None
    transport: str = "auto"
    redeploy_drain_s: float = 6.0
    autoscales: bool = False
    tls: bool = False
    """Whether streams between hosts are encrypted."""
    mixture: bool = False
    """Whether a mixture is served beside the language model."""
    native: bool = False
    """Whether streams and layers are those of native code."""
    keys: bool = False
    """Whether gateways ask for keys."""
    standby: int = 0
    """The actors on standby, where it autoscales."""
    forms: bool = False
    """Whether routers have a vocabulary, which grammars need."""
    mixed: bool = False
    """Whether some actors compute with another kernel class."""
    is_deleted: bool = False
    """Whether the application is deleted at the end."""
    calm_s: float = CALM_S
    """When the weather calms."""


@dataclass(frozen=True)
class Event:
    """Something that happens at a time; ``for_s`` is how long a fault lasts."""

    at_s: float
    kind: str
    what: int = 0
    for_s: float = 0.0
    amount: float = 0.0
    where: tuple[int, ...] = ()
    role: str = ""

    def line(self) -> str:
        parts = [self.kind, self.role, str(self.what)]
        if self.where:
            parts.append(f"nodes {','.join(map(str, self.where))}")
        if self.amount:
            parts.append(f"{self.amount:g}")
        if self.for_s:
            parts.append(f"for {self.for_s:.2f} s")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Scenario:
    """A world's deployment, its requests and its events."""

    seed: int
    setting: Setting
    plans: tuple[Plan, ...]
    events: tuple[Event, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scenario:
        events = [Event(**{**e, "where": tuple(e["where"])}) for e in data["events"]]
        found = [
            Plan(**{**p, "prompt": tuple(p["prompt"]), "received": tuple(p.get("received", ()))})
            for p in data["plans"]
        ]
        return cls(data["seed"], Setting(**data["setting"]), tuple(found), tuple(events))


FAULTS = {
    "dies": 4, "crashes soon": 4, "hangs": 3, "links cut": 4, "links slow": 1, "bytes damaged": 2,
    "calls doubled": 1, "answers lost": 2, "device slow": 2, "device raises": 2,
    "device yields NaN": 2, "node's device raises": 1, "rows lost": 1, "memory full": 1,
    "disk fails": 1, "clock jumps": 1, "node lost": 1,
}  # fmt: skip
COPIES_SHARE = 0.04
"""The share of seeds with one of :data:`OF_COPIES`."""
OF_COPIES = ("redeploy more copies", "redeploy fewer copies")
OPERATIONS = {
    "redeploy the same": 2, "redeploy other weights": 3, "redeploy more actors": 1,
    "redeploy fewer actors": 1, "scale up": 1, "scale down": 1, "drain an actor": 2,
    "change copies": 1, "rebalance": 1, "node drains": 1, "node added": 1, "second controller": 1,
    "burst": 1,
}  # fmt: skip


def draw(seed: int) -> Scenario:
    source = random.Random(seed)
    setting = Setting(
        num_actors=source.choice((4, 5, 6, 6)),
        min_copies=source.choice((1, 2, 2, 2)),
        rebalance_period_s=source.choice((None, None, 1.0)),
        transport=source.choice(("auto", "auto", "auto", "stream", "ray")),
        autoscales=source.random() < 0.15,
        is_deleted=seed % 4 == 0,
    )
    if is_long := seed >= FIRST_LONG:
        setting = replace(setting, calm_s=LONG_S, num_clients=3)
    num_faults = source.choice((1, 2, 3) if is_long else (0, 1, 2, 3, 4, 6))
    num_operations = source.choice((0, 0, 1, 1, 2))
    events = [_fault(source, setting) for _ in range(num_faults)]
    events += [_operation(source, setting) for _ in range(num_operations)]
    requests = plans(source, BEGIN_S, setting.calm_s - 2.0, setting.num_clients)
    for event in events:
        if event.kind == "burst":
            requests += _burst(source, requests, event.at_s)
    events.sort(key=lambda event: event.at_s)
    requests.sort(key=lambda plan: plan.at_s)
    copies = _redeploy_of_copies(seed, setting)
    if copies is not None:
        events = sorted([*events, copies], key=lambda event: event.at_s)
    scenario = Scenario(seed, setting, tuple(requests), tuple(events))
    if is_long and (late := with_late(scenario, Event, BEGIN_S)) is not None:
        return late
    rarity = draw_rarity(seed, Event, BEGIN_S, setting.calm_s) or draw_flood(seed, Event, BEGIN_S)
    if rarity is not None:
        return with_rarity(scenario, rarity)
    if (fleet := with_fleet(scenario, Event, BEGIN_S)) is not None:
        return fleet
    if (load := with_load(scenario, Event, BEGIN_S)) is not None:
        return load
    if (begun := with_choices(scenario, Event, BEGIN_S)) is not None:
        return begun
    scenario = with_mixture(with_keys(scenario, BEGIN_S), Event, BEGIN_S)
    return with_native(scenario)


def _pick(source: random.Random, weights: dict[str, int]) -> str:
    return source.choices(list(weights), list(weights.values()))[0]


def _fault(source: random.Random, setting: Setting) -> Event:
    kind = _pick(source, FAULTS)
    at_s = source.uniform(BEGIN_S, setting.calm_s - 4.0)
    longest_s = setting.calm_s - at_s
    event = Event(at_s, kind, source.randrange(100))
    role = source.choices(ROLES, (5, 3, 2, 2))[0]
    times_s = (0.3, 1.0, 2.0, 4.0, 6.0) if setting.calm_s == CALM_S else (0.3, 2.0, 6.0, 20.0, 40.0)
    for_s = min(longest_s, source.choice(times_s))
    hosts = setting.num_nodes + 1  # the head is number 0
    if kind == "dies":
        return replace(event, role=role)
    if kind == "crashes soon":
        return replace(event, role=role, amount=source.randrange(1, 400))
    if kind == "hangs":
        return replace(event, role=role, for_s=for_s)
    if kind == "links cut":
        one = tuple(sorted(source.sample(range(hosts), source.randrange(1, hosts))))
        return replace(event, where=one, for_s=for_s, what=source.randrange(3))
    if kind == "links slow":
        return replace(event, amount=source.choice((5.0, 20.0, 60.0)), for_s=for_s)
    if kind == "bytes damaged":
        return replace(event, amount=source.choice((0.001, 0.01, 0.05)), for_s=for_s)
    if kind in ("calls doubled", "answers lost"):
        return replace(event, amount=source.choice((0.02, 0.2)), for_s=for_s)
    if kind == "device slow":
        return replace(event, amount=source.choice((3.0, 5.0, 30.0)), for_s=for_s)
    if kind == "clock jumps":
        return replace(event, amount=source.choice((-3600.0, -2.0, 2.0, 3600.0)))
    return replace(event, for_s=for_s)


def _operation(source: random.Random, setting: Setting) -> Event:
    kind = _pick(source, OPERATIONS)
    at_s = source.uniform(BEGIN_S, setting.calm_s - 5.0)
    return Event(at_s, kind, source.randrange(100))


def _redeploy_of_copies(seed: int, setting: Setting) -> Event | None:
    """Draw a redeploy with another number of copies, which few seeds have.

    It is drawn apart, so that the rest of a seed stays as it is.
    """
    source = random.Random(f"copies-{seed}")
    if source.random() >= COPIES_SHARE:
        return None
    kind = source.choice(OF_COPIES)
    return Event(source.uniform(BEGIN_S, setting.calm_s - 5.0), kind)


def _burst(source: random.Random, requests: list[Plan], at_s: float) -> list[Plan]:
    return [
        replace(plan, at_s=at_s + 0.01 * source.random(), max_tokens=min(plan.max_tokens, 4))
        for plan in source.choices(requests, k=min(24, len(requests)))
    ]
