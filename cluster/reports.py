"""The controller's knowledge of the cluster, as gateways and commands show it.

Routers and gateways send their samples with each watch call. Expert actors report to the
controller. The controller keeps the newest report of each process, and a gateway asks for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.spec import ActorReport, ModelKernel


@dataclass(frozen=True, slots=True)
class ActorStatus:
    """One live expert actor.

    ``experts`` are (model, layer, expert), ``tokens`` the rows that the actor has computed,
    ``weight_bytes`` the size of the experts' weights in the device's memory. ``kernels`` has the
    kernel class of each language model's experts. ``silence`` says since when the controller does
    not hear the actor and why it is kept; it is empty for an actor that answers. ``slowness`` is
    how many times as long as its twins, the other actors of its pool, it takes for like work; 0
    where routers measure none. ``is_slow`` says that this has been too long for a while.
    """

    actor_id: str
    pid: int
    node: str
    device: str
    generation: int
    experts: tuple[tuple[str, int, int], ...]
    tokens: int
    weight_bytes: int = 0
    kernels: tuple[ModelKernel, ...] = ()
    silence: str = ""
    slowness: float = 0.0
    is_slow: bool = False


@dataclass(frozen=True, slots=True)
class LoadingStatus:
    """The progress of an actor that loads its experts.

    ``held_experts`` of ``num_experts`` are in memory, ``weight_bytes`` so far. The actor serves
    when it holds all of them.
    """

    actor_id: str
    held_experts: int
    num_experts: int
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class FailingActor:
    """An actor that fails self-tests, or dies again and again, or that waits for its next start.

    ``deaths`` are those in a row, ``reason`` is that of the last. ``node`` and ``device`` are where
    it runs or ran last, empty if that is not known. Its next start comes in ``retry_in_s``.
    ``failed_tests`` failed in a row while it lives. Where a memory had no room for its experts,
    ``missing_bytes`` of ``needed_bytes`` are missing.
    """

    actor_id: str
    deaths: int
    reason: str
    node: str
    device: str
    retry_in_s: float
    failed_tests: int = 0
    needed_bytes: int = 0
    missing_bytes: int = 0


def failing_line(actor: FailingActor) -> str:
    """Return a failing actor as a line of text."""
    parts = [f"{actor.deaths} death{'s' if actor.deaths > 1 else ''} in a row"] * bool(actor.deaths)
    if actor.failed_tests:
        parts.append(f"{actor.failed_tests} failed self-tests in a row")
    if actor.retry_in_s:
        parts.append(f"next start in {actor.retry_in_s:.1f} s")
    where = ", ".join(part for part in (actor.device, actor.node[:10]) if part)
    place = f" on {where}" if where else ""
    return f"{actor.actor_id}{place} fails: {', '.join(parts)}; {actor.reason}"


def loading_line(loading: Sequence[LoadingStatus]) -> str:
    """Return the progress of all loading actors together as a line of text."""
    held = sum(actor.held_experts for actor in loading)
    total = sum(actor.num_experts for actor in loading)
    size_gb = sum(actor.weight_bytes for actor in loading) / 1e9
    actors = f"{len(loading)} actor{'s' if len(loading) > 1 else ''}"
    return f"{held} of {total} experts ({held / max(1, total):.0%}, {size_gb:.1f} GB) on {actors}"


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """A router or gateway replica that has called the controller lately.

    ``kernels`` has the kernel class of a router's dense part; it is empty for a mixture's router.
    ``problem`` is what the process itself finds wrong with its keys, and empty elsewhere.
    """

    pid: int
    node: str
    kernels: tuple[ModelKernel, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class KernelCount:
    """The number of actors, or of routers, that compute a model with kernels of one class."""

    kernel_class: str
    processes: int


@dataclass(frozen=True, slots=True)
class KernelStatus:
    """The kernel classes that compute one language model, the most frequent first.

    ``actors`` compute its experts, ``routers`` everything else. ``mixed`` names the classes where
    actors or routers have several, and is empty elsewhere. The last bits of an answer then depend
    on the processes that compute it.
    """

    model: str
    actors: tuple[KernelCount, ...]
    routers: tuple[KernelCount, ...]
    mixed: str


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The answer of ``Admin/GetStatus`` and ``expertmesh status``.

    ``missing_experts`` is the number of (model, layer, expert) without a live copy; 0 means ready.
    ``min_copies`` is the configured number of copies of each expert. ``live_copies`` is the number
    of live copies of the expert that has the fewest. ``loading`` are the actors that do not serve
    yet, ``failing`` those that fail or wait for a next start. ``kernels`` has the kernel classes of
    each language model. ``nodes_without_gateway`` are nodes that are to have one, and have had none
    for a while. ``failed_deploy`` is why the last deployment failed, after which the former one
    serves; or empty.
    """

    models: tuple[str, ...]
    epoch: int
    placement_version: int
    controller_pid: int
    missing_experts: int
    routers: tuple[ProcessStatus, ...] = ()
    gateways: tuple[ProcessStatus, ...] = ()
    actors: tuple[ActorStatus, ...] = field(default=())
    min_copies: int = 1
    live_copies: int = 0
    loading: tuple[LoadingStatus, ...] = ()
    kernels: tuple[KernelStatus, ...] = ()
    failing: tuple[FailingActor, ...] = ()
    nodes_without_gateway: tuple[str, ...] = ()
    failed_deploy: str = ""


@dataclass(frozen=True, slots=True)
class Move:
    """A copy of an expert that an actor loads (``is_added``) or unloads."""

    actor_id: str
    model: str
    layer: int
    expert: int
    is_added: bool


@dataclass(frozen=True, slots=True)
class RebalanceReport:
    """The decision of one rebalancing, and its outcome.

    ``outcome`` is ``committed``, ``planned`` (a dry run), ``balanced`` (no move was worth its cost)
    or ``failed: `` with the reason. ``at_s`` is wall clock. ``moved_bytes`` is the size of the
    loaded copies. A balance is the load of the busiest device over the mean load: ``layers_…`` is
    the average over the layers, ``devices_…`` counts all layers together. ``epoch`` and ``version``
    name the placement afterwards.
    """

    outcome: str
    moves: tuple[Move, ...]
    moved_bytes: int
    layers_before: float
    layers_after: float
    devices_before: float
    devices_after: float
    at_s: float
    took_s: float
    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class ChangeReport:
    """A change of the number of actors, or of the copies of one expert, and its outcome.

    ``what`` describes the change and ``reason`` its cause, both for people. ``outcome`` is
    ``committed``, ``planned`` (a dry run), ``unchanged``, ``pending: `` with the resource that new
    actors wait for, or ``failed: `` with the reason. ``added`` and ``removed`` are ids of actors.
    ``at_s`` is wall clock.
    """

    what: str
    reason: str
    outcome: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    moves: tuple[Move, ...]
    moved_bytes: int
    at_s: float
    took_s: float
    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """One logical expert: its recent token rows a second over all copies, and their actors."""

    model: str
    layer: int
    expert: int
    tokens_per_s: float
    actors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """The recent load of one actor's device.

    ``busy`` is the share of time in which it computed, ``wait_s`` the mean wait of a frame.
    """

    actor_id: str
    node: str
    experts: int
    tokens_per_s: float
    busy: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class LoadStatus:
    """The answer of ``Admin/GetLoad``: rates of about the last ``window_s`` seconds.

    ``rebalances`` and ``changes`` start with the newest.
    """

    window_s: float
    layers_balance: float
    devices_balance: float
    devices: tuple[DeviceStatus, ...]
    experts: tuple[ExpertLoad, ...]
    rebalances: tuple[RebalanceReport, ...]
    changes: tuple[ChangeReport, ...] = ()


Heard = tuple[int, float]
"""The generation of an actor that a router heard last, and how many seconds ago."""

Sample = tuple[str, Mapping[str, str], float]
"""A Prometheus sample: its name with any suffix, its labels, its value."""


@dataclass(frozen=True, slots=True)
class KeyUse:
    """What one gateway has used of the quotas that the keys of one name have.

    ``requests`` and ``tokens`` are sums since the gateway's start, without what was given back.
    ``held_tokens`` are those of requests under way. ``requests_left`` and ``tokens_left`` may be
    used now, below 0 they are owed; a quota without a limit is infinite.
    """

    requests: int
    tokens: int
    held_tokens: int
    requests_left: float
    tokens_left: float


@dataclass(frozen=True, slots=True)
class KeyUsage:
    """What the keys of one name have used, and the calls that their limits refused."""

    name: str
    requests: int
    prompt_tokens: int
    generated_tokens: int
    rows: int
    refused: int


@dataclass(frozen=True, slots=True)
class UsageReport:
    """What keys have used at ``gateways`` gateways, since each of them started; by names."""

    gateways: int
    keys: tuple[KeyUsage, ...]


@dataclass(frozen=True, slots=True)
class Samples:
    """All samples of one process at one moment.

    ``taken_s`` is a time of the process's monotonic clock, which orders the samples of this process
    alone. ``families`` has each metric's samples by its name without a suffix. ``slowness`` is how
    many times as long as the fastest each actor (id, generation) takes for like work, as a router
    measures it where experts have copies. ``problem`` is that of :class:`ProcessStatus`. ``uses``
    are those of a gateway, by the name of the keys. ``deployment`` is Serve's name of a gateway's
    deployment.
    """

    taken_s: float
    families: Mapping[str, Sequence[Sample]]
    slowness: Mapping[tuple[str, int], float] = field(default_factory=dict)
    problem: str = ""
    uses: Mapping[str, KeyUse] = field(default_factory=dict)
    deployment: str = ""


@dataclass(frozen=True, slots=True)
class ProcessSamples:
    """The newest samples of one router or gateway."""

    kind: str
    process: ProcessStatus
    samples: Samples


@dataclass(frozen=True, slots=True)
class Measurements:
    """The newest reports of all actors, routers and gateways.

    While the controller is away, ``status`` is ``None`` and ``processes`` has the asked gateway
    alone.
    """

    status: ClusterStatus | None
    reports: tuple[ActorReport, ...]
    processes: tuple[ProcessSamples, ...]
