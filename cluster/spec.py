"""What an expert actor is told at its start, and what it reports: the actor's contract.

``cluster`` creates and watches expert actors but does not know their class, which
``router/serve/controller.py`` injects; this file is what both sides agree on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple, get_args

from cluster.tls import TlsFiles

ACTOR_NAMESPACE = "serve"
"""Serve's own namespace, so that every replica finds the actors without naming another."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where one model's experts come from and how placement sees them.

    ``identity`` tells the checkpoint from others under the same path
    (:mod:`experts.checkpoint.identity`).
    """

    path: str
    dtype: str
    experts: ModelExperts
    identity: str


@dataclass(frozen=True, slots=True)
class Emulation:
    """How long an emulated device takes for one product, that is for one expert in one batch.

    ``batch_s`` whatever its rows, as for reading the expert's weights, and ``row_s`` for each row.
    """

    batch_s: float
    row_s: float

    def product_s(self, num_rows: int) -> float:
        """Return the time of one expert's product for ``num_rows`` rows."""
        return self.batch_s + num_rows * self.row_s


EMULATED = "emulated"
"""The device of an actor that computes nothing, as reports and ``status`` show it."""


@dataclass(frozen=True, slots=True)
class ActorSpec:
    """What an expert actor is made of; two actors with equal digests are interchangeable.

    With ``emulation`` it loads and computes nothing, and answers zeros in an accelerator's time.
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
        """A short hash of the specification; an actor with another one is not adopted."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ScalingTargets:
    """How a pool follows its load, and its bounds.

    ``target_busy`` is the share of its time in which a device is to compute, ``target_queue_s`` how
    long a frame may wait in the actor where it waits longest. ``standby_actors`` are started beyond
    those that hold experts, within ``max_actors``, and wait for a load that needs them. With
    ``dry_run`` decisions are told, and nothing is done.
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
        """Return the number within the bounds that is nearest."""
        return min(max(num_actors, self.min_actors), self.max_actors)


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Alike expert actors: how many, how much each may hold, what each is made of.

    With ``autoscaling`` that is the number to begin with.
    """

    name: str
    num_actors: int
    memory_budget_bytes: int | None
    actor: ActorSpec
    autoscaling: ScalingTargets | None = None

    def actor_ids(self) -> list[str]:
        """Return the actors' ids, unique in the application as the pools' names are."""
        return [f"{self.name}-{i}" for i in range(self.num_actors)]


def budgets_of(pools: Sequence[PoolSpec]) -> dict[str, int] | None:
    """Return the budget of each actor, or ``None`` where they have none."""
    return {
        actor_id: pool.memory_budget_bytes
        for pool in pools
        if pool.memory_budget_bytes is not None
        for actor_id in pool.actor_ids()
    } or None


@dataclass(frozen=True, slots=True)
class ActorReport:
    """An expert actor's answer to a heartbeat.

    ``weight_bytes`` are what the weights of ``experts`` take in the device's memory; ``tokens``
    counts the token rows computed per expert since the actor's start; ``queued_rows`` wait now;
    ``steps`` counts batches computed, so that a hung compute thread shows as no progress; of the
    ``frames`` in them, ``waited_s`` is how long all waited before, and ``busy_s`` how long all
    batches took; both since the actor's start.
    ``fetched_bytes`` of its weights came from another node, in ``fetched_s`` seconds.
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

    def fetched(self) -> str:
        """Return what came from another node as the end of a line for people; may be empty."""
        if not self.fetched_bytes:
            return ""
        return f", {self.fetched_bytes / 1e6:.1f} MB in {self.fetched_s:.1f} s from another node"


def actor_name(app: str, actor_id: str, generation: int) -> str:
    """Return the Ray name of one generation of an expert actor."""
    return f"expertmesh:{app}:{actor_id}:g{generation}"


def parse_actor_name(name: str, app: str) -> tuple[str, int] | None:
    """Return (actor_id, generation) of an actor of ``app``, or ``None`` for any other name."""
    prefix = f"expertmesh:{app}:"
    actor_id, separator, generation = name.removeprefix(prefix).rpartition(":g")
    if not name.startswith(prefix) or not separator or not generation.isdecimal():
        return None
    return actor_id, int(generation)


class ExpertKey(NamedTuple):
    """A logical expert: which model, which layer of it, which expert of that layer."""

    model: str
    layer_id: int
    expert_id: int


@dataclass(frozen=True, slots=True)
class ModelExperts:
    """The experts of one model as placement sees them: how many, where, how large."""

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
"""``strict`` waits for the expert: the answer is exact or an error. ``next_expert`` has the next
live expert in line take the token. ``drop`` leaves the expert's share out. See
``router/moe/missing.py``.
"""


ON_EXPERT_LOSS: tuple[str, ...] = get_args(OnExpertLoss)


TransportKind = Literal["auto", "ray", "stream"]
"""How frames travel from routers to expert actors; see :func:`cluster.transport.open`."""


EXACT_KEY = "expertmesh-exact"
"""gRPC's trailing metadata that says ``true`` or ``false`` of a whole answer; HTTP's header has an
``x-`` before it."""
