"""The contract of an expert actor: its specification at the start, and its reports.

``cluster`` creates and watches expert actors without their class, which
``router/serve/controller.py`` injects. Both sides share only this file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, NamedTuple, get_args
from urllib.parse import quote

from cluster.tls import TlsFiles

FRAME_VERSION = 6
"""The version of the frames between routers and expert actors (:mod:`cluster.wire.frames`)."""
ACTOR_NAMESPACE = "serve"
"""Serve's own namespace, in which every replica looks for actors by default."""


def model_key(model_id: str, identity: str, dtype: str) -> str:
    """Return the name of a model in the placement, in frames and in actors: its id and its content.

    ``identity`` is the checkpoint's (:mod:`experts.checkpoint.identity`). Weights of another
    content or another ``dtype`` have another key, so that two contents never meet under one name.
    """
    content = hashlib.sha256(json.dumps([identity, dtype]).encode()).hexdigest()
    return f"{model_id}@{content[:32]}"


def model_id_of(key: str) -> str:
    """Return the id in a model's key, as requests and reports name it."""
    return key.rpartition("@")[0] or key


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The checkpoint of one model, and its experts as placement sees them.

    ``identity`` distinguishes the checkpoint from others under the same path
    (:mod:`experts.checkpoint.identity`).
    """

    path: str
    dtype: str
    experts: ModelExperts
    identity: str


@dataclass(frozen=True, slots=True)
class Emulation:
    """The time that an emulated device takes for one expert in one batch.

    ``batch_s`` is the constant part, such as reading the expert's weights; ``row_s`` is the time of
    each row.
    """

    batch_s: float
    row_s: float

    def product_s(self, num_rows: int) -> float:
        """Return the time of one expert for ``num_rows`` rows."""
        return self.batch_s + num_rows * self.row_s


EMULATED = "emulated"
UNKNOWN = "unknown"
"""The kernel class of experts whose actor has not told it yet."""
"""The device of an emulating actor in reports and in ``status``."""


_CHANGEABLE = ("models", "max_queue_rows")


@dataclass(frozen=True, slots=True)
class ActorSpec:
    """The specification of an expert actor; actors with equal digests are interchangeable.

    A living actor takes other ``models`` and ``max_queue_rows`` with its next load; all else is its
    process's for life. With ``emulation`` the actor loads and computes nothing, and answers zeros
    after the time that an accelerator would take.
    """

    app: str
    models: tuple[ModelSource, ...]
    num_cpus: float
    num_gpus: float
    threads: int
    max_queue_rows: int
    tls: TlsFiles | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    emulation: Emulation | None = None

    @property
    def digest(self) -> str:
        """A short hash of what is a process's for life; the controller adopts only its own.

        Of the frames' version and the report's fields too: an older build's actor outlives it,
        reads no newer frame and sends no newer report.
        """
        fixed = {name: value for name, value in asdict(self).items() if name not in _CHANGEABLE}
        reported = [field.name for field in fields(ActorReport)]
        text = json.dumps([FRAME_VERSION, reported, fixed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ScalingTargets:
    """The load that a pool's number of actors follows, and the bounds of that number.

    ``target_busy`` is the share of time in which a device should compute. ``target_queue_s`` is the
    longest time that a frame should wait in any actor. ``standby_actors`` are idle actors kept
    warm, within ``max_actors``, so that scaling up skips process start. With ``dry_run`` decisions
    are reported and not carried out.
    """

    min_actors: int
    max_actors: int
    target_busy: float
    target_queue_s: float
    upscale_delay_s: float
    downscale_delay_s: float
    standby_actors: int = 0
    dry_run: bool = False

    def bounded(self, num_actors: int) -> int:
        """Return the number within the bounds that is nearest to ``num_actors``."""
        return min(max(num_actors, self.min_actors), self.max_actors)


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Expert actors of one specification: their number, and the memory budget of each.

    With ``autoscaling``, ``num_actors`` is the number at the start.
    """

    name: str
    num_actors: int
    memory_budget_bytes: int | None
    actor: ActorSpec
    autoscaling: ScalingTargets | None = None

    def actor_ids(self) -> list[str]:
        """Return the actors' ids; they are unique in the application, as the pools' names are."""
        return [f"{self.name}-{i}" for i in range(self.num_actors)]


def budgets_of(pools: Sequence[PoolSpec]) -> dict[str, int] | None:
    """Return the memory budget of each actor, or ``None`` without budgets."""
    return {
        actor_id: pool.memory_budget_bytes
        for pool in pools
        if pool.memory_budget_bytes is not None
        for actor_id in pool.actor_ids()
    } or None


@dataclass(frozen=True, slots=True, order=True)
class ModelKernel:
    """The class of the kernels that a process computes a model with.

    ``experts/compute/kernel_classes.py`` has the classes. ``model`` is a model's key, and its id in
    reports for people.
    """

    model: str
    kernel_class: str


@dataclass(frozen=True, slots=True)
class ActorReport:
    """An expert actor's answer to a heartbeat.

    Counters start with the actor. ``weight_bytes`` is the size of the weights of ``experts`` in the
    device's memory. ``tokens`` counts the computed token rows of each expert. ``queued_rows`` wait
    now. ``steps`` counts the computed batches: a hung compute thread makes no progress here.
    ``frames`` counts the frames in these batches, ``waited_s`` sums up the frames' waits before
    their batch, and ``busy_s`` the batches' durations. ``fetched_bytes`` of the weights came from
    another node, in ``fetched_s`` seconds. ``free_bytes`` are free now in the device's memory,
    which other actors of the node may share. ``kernels`` has the kernel class of each model with
    an expert here; mixtures have none. ``failed_batches`` counts the batches that raised.
    ``failed_tests`` counts the self-tests that failed in a row, 0 for a healthy actor, and
    ``failure`` says how the last one failed (:mod:`experts.self_test`).
    """

    actor_id: str
    generation: int
    digest: str
    epoch: int
    pid: int
    node: str
    device: str
    experts: tuple[ExpertKey, ...]
    weight_bytes: int
    tokens: dict[ExpertKey, int]
    queued_rows: int
    steps: int
    frames: int = 0
    busy_s: float = 0.0
    waited_s: float = 0.0
    fetched_bytes: int = 0
    fetched_s: float = 0.0
    free_bytes: int = 0
    kernels: tuple[ModelKernel, ...] = ()
    failed_batches: int = 0
    failed_tests: int = 0
    failure: str = ""

    def fetched(self) -> str:
        """Return the end of a log line about bytes from another node, or an empty text."""
        if not self.fetched_bytes:
            return ""
        return f", {self.fetched_bytes / 1e6:.1f} MB in {self.fetched_s:.1f} s from another node"


def app_part(app: str) -> str:
    """Return an application's name as a part of longer names: without ":" and "/", and unique.

    So no name of one application begins as those of another.
    """
    return quote(app, safe="")


def actor_name(app: str, actor_id: str, generation: int) -> str:
    """Return the Ray name of one generation of an expert actor."""
    return f"expertmesh:{app_part(app)}:{actor_id}:g{generation}"


def parse_actor_name(name: str, app: str) -> tuple[str, int] | None:
    """Return (actor_id, generation) of an actor of ``app``, or ``None`` for any other name."""
    prefix = f"expertmesh:{app_part(app)}:"
    actor_id, separator, generation = name.removeprefix(prefix).rpartition(":g")
    if not name.startswith(prefix) or not separator or not generation.isdecimal():
        return None
    return actor_id, int(generation)


class ExpertKey(NamedTuple):
    """A logical expert: the key of its model, its layer, and its number in that layer."""

    model: str
    layer_id: int
    expert_id: int


@dataclass(frozen=True, slots=True)
class ModelExperts:
    """The experts of one model as placement sees them: layers, experts of a layer, bytes of one.

    ``model`` is the model's key (:func:`model_key`).
    """

    model: str
    layers: tuple[int, ...]
    num_experts: int
    expert_bytes: int

    def expert_keys(self) -> list[ExpertKey]:
        """Return every logical expert of the model, layer by layer."""
        return [
            ExpertKey(self.model, layer_id, expert_id)
            for layer_id in self.layers
            for expert_id in range(self.num_experts)
        ]


OnExpertLoss = Literal["strict", "next_expert", "drop"]
"""The treatment of tokens whose expert is missing; see ``router/moe/missing.py``.

``strict`` waits for the expert: the answer is exact or an error. ``next_expert`` gives the token to
the live expert with the next highest score. ``drop`` leaves the expert's output out.
"""
ON_EXPERT_LOSS: tuple[str, ...] = get_args(OnExpertLoss)


TransportKind = Literal["auto", "ray", "stream"]
"""The transport of frames from routers to expert actors; see :mod:`cluster.transport.open`."""

EXACT_KEY = "expertmesh-exact"
EXACT_HEADER = f"x-{EXACT_KEY}"
"""The key of the trailing metadata (gRPC) with ``true`` for an exact answer and ``false`` for any
other; HTTP's header has the prefix ``x-``."""
