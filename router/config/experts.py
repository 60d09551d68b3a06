"""The ``experts:`` section of a deployment file: pools of actors, their scaling, their transport.

Part of :mod:`router.config.deployment`, which reads the whole of ``args:``.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cluster.spec import Emulation, ScalingTargets, TransportKind
from cluster.tls import TlsFiles
from router.section import Section

DEFAULT_POOL = "expert"
SINGLE_POOL_KEYS = (
    "actors",
    "num_cpus",
    "num_gpus",
    "threads",
    "memory_budget_bytes",
    "emulate",
    "autoscaling",
)
RAY_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")


class TlsConfig(Section):
    """Encrypts streams and links between hosts.

    Each key is a PEM file at the same path on every node. Ray's calls must have Ray's own TLS then:
    ``RAY_USE_TLS=1`` in the environment of all its processes. Changed files come into use with the
    next connection, without a restart.
    """

    certificate: str = Field(min_length=1, description="The node's own certificate.")
    key: str = Field(min_length=1, description="The private key of that certificate.")
    authority: str = Field(
        min_length=1, description="The authority that signed the certificates of all nodes."
    )

    def files(self) -> TlsFiles:
        """Return the paths for :mod:`cluster.tls`."""
        return TlsFiles(self.certificate, self.key, self.authority)


class EmulateConfig(Section):
    """For measurements only: an actor sleeps instead of computing, and answers zeros.

    No reply is ``exact`` then, and ``expertmesh status`` says so. At least one of the two is above
    0.
    """

    batch_s: float = Field(
        default=0.0, ge=0, le=10, description="Seconds that one expert's product takes."
    )
    row_s: float = Field(
        default=0.0, ge=0, le=1, description="Seconds that each row of the product adds."
    )

    @model_validator(mode="after")
    def _takes_time(self) -> EmulateConfig:
        if self.batch_s + self.row_s == 0:
            raise ValueError("needs batch_s or row_s above 0")
        return self

    def emulation(self) -> Emulation:
        """Return the emulation for an actor."""
        return Emulation(self.batch_s, self.row_s)


def _without_gpu(emulate: EmulateConfig | None, info: ValidationInfo) -> EmulateConfig | None:
    if emulate is not None and info.data.get("num_gpus"):
        raise ValueError("an emulated device computes nothing; leave out num_gpus")
    return emulate


class ActorScalingConfig(Section):
    """Lets the number of actors of a pool follow its load."""

    min_actors: int = Field(ge=1, le=1000, description="Fewest actors.")
    max_actors: int = Field(ge=1, le=1000, description="Most actors, standby actors included.")
    target_busy: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="Share of the time in which devices may compute. Above it an actor is added.",
    )
    target_queue_s: float = Field(
        default=0.02,
        gt=0,
        le=60,
        description="How long messages may wait in an actor. Above it an actor is added.",
    )
    upscale_delay_s: float = Field(
        default=5.0,
        ge=0,
        le=86_400,
        description="How long a target must be exceeded before an actor is added.",
    )
    downscale_delay_s: float = Field(
        default=120.0,
        ge=0,
        le=86_400,
        description="Within this time, from about 4 s on, unneeded actors are gone if others hold "
        "their experts. Where those must be loaded first, it takes longer. Unneeded copies go "
        "within it too.",
    )
    standby_actors: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Idle actors kept warm, so that scaling up skips process start. They count "
        "towards `max_actors` and keep their devices.",
    )
    dry_run: bool = Field(default=False, description="Only logs and shows what would change.")

    @field_validator("max_actors")
    @classmethod
    def _bounds_are_ordered(cls, max_actors: int, info: ValidationInfo) -> int:
        least = info.data.get("min_actors")  # absent when wrong
        if least is not None and max_actors < least:
            raise ValueError(f"must be at least min_actors, {least}")
        return max_actors

    def targets(self) -> ScalingTargets:
        """Return the targets for the controller."""
        return ScalingTargets(**self.model_dump())


def starts_within_bounds(key: str) -> AfterValidator:
    """Check that the bounds of ``autoscaling`` contain ``key``, the number at the start."""

    def check(autoscaling: Section | None, info: ValidationInfo) -> Section | None:
        number = info.data.get(key)  # absent when wrong, and may be a word
        if autoscaling is not None and isinstance(number, int):
            least, most = getattr(autoscaling, f"min_{key}"), getattr(autoscaling, f"max_{key}")
            if not least <= number <= most:
                raise ValueError(f"{key}, {number}, must be from min_{key} to max_{key}")
        return autoscaling

    return AfterValidator(check)


def _fewest(actors: int, autoscaling: ActorScalingConfig | None) -> int:
    return actors if autoscaling is None else autoscaling.min_actors


# The keys of a pool stand in each entry of ``pools``, or in ``experts`` where there is one pool.
Actors = Annotated[
    int,
    Field(
        ge=1,
        le=1000,
        description="Expert actors, one per device. With `autoscaling`, their number at the start.",
    ),
]
NumCpus = Annotated[
    float,
    Field(
        ge=0,
        description="CPUs that one actor reserves in Ray. Reservations decide which machines an "
        "actor can be on.",
    ),
]
NumGpus = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="GPUs that one actor reserves. Above 0 it computes on the GPU that Ray gives "
        "it, by any accelerator of torch. This was never run on a GPU; `benchmarks/gpu.sh` would "
        "prove it.",
    ),
]
Threads = Annotated[int, Field(ge=1, le=256, description="Compute threads of one actor.")]
MemoryBudgetBytes = Annotated[
    int | None,
    Field(
        gt=0,
        description="Most bytes of expert weights in one actor; an actor's share of the experts is "
        "in proportion to it. Without it there is no bound, and rebalancing moves experts but adds "
        "no copies.",
    ),
]
Emulate = Annotated[
    EmulateConfig | None,
    AfterValidator(_without_gpu),
    Field(description="Emulates devices, for measurements only."),
]
ActorScaling = Annotated[
    ActorScalingConfig | None,
    starts_within_bounds("actors"),
    Field(description="Lets the number of actors follow the load."),
]


class PoolConfig(Section):
    """Alike expert actors, each on a device of its own."""

    name: str = Field(
        pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$",
        max_length=32,
        description="Name of the pool. Its actors are called `NAME-0`, `NAME-1` and so on.",
    )
    actors: Actors
    num_cpus: NumCpus = 0.1
    num_gpus: NumGpus = 0.0
    resources: dict[str, float] = Field(
        default={},
        max_length=16,
        description="Other resources that one actor reserves, by the names given to "
        "`ray start --resources`.",
    )
    threads: Threads = 1
    memory_budget_bytes: MemoryBudgetBytes = None
    emulate: Emulate = None
    autoscaling: ActorScaling = None

    @field_validator("resources")
    @classmethod
    def _resources_are_valid(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if not name or name in RAY_RESOURCES:
                raise ValueError(f"{name!r} is Ray's own; use num_cpus or num_gpus")
            if amount <= 0 or (amount > 1 and amount % 1):
                raise ValueError(f"{name} must be a whole number, or between 0 and 1")
        return resources


class ExpertsConfig(Section):
    """The expert actors, one per device."""

    pools: tuple[PoolConfig, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=32,
        description="Kinds of actors, such as GPUs and CPUs. The keys from `actors` to "
        "`autoscaling` then stand in each pool. All pools have a `memory_budget_bytes`, or none "
        "has.",
    )
    actors: Actors = 2
    num_cpus: NumCpus = 0.1
    num_gpus: NumGpus = 0.0
    threads: Threads = 1
    memory_budget_bytes: MemoryBudgetBytes = None
    emulate: Emulate = None
    autoscaling: ActorScaling = None
    min_copies: int = Field(
        default=1,
        ge=1,
        description="Actors that hold each expert, on different nodes where there are several. "
        "With 2 or more, the loss of one actor makes no token wait.",
    )
    max_queue_rows: int = Field(
        default=65_536,
        ge=1,
        description="Token rows that may wait in one actor. A message beyond it is refused and "
        "sent again.",
    )
    redeploy_drain_s: float = Field(
        default=600.0,
        ge=0,
        le=86_400,
        description="After a redeploy with other weights, how long the earlier experts stay in "
        "memory for requests that run, once the new ones serve. Requests that run longer end with "
        "UNAVAILABLE. Without memory for both, the earlier experts go at once.",
    )
    call_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="How long a router waits for one answer before it reports the actor and tries "
        "again.",
    )
    transport: TransportKind = Field(
        default="auto",
        description="How messages reach actors. `stream`: over a connection held open. `ray`: by "
        "one Ray call each. `auto`: over streams, and by Ray calls while there is none.",
    )
    tls: TlsConfig | None = Field(
        default=None, description="Encrypts streams and links between hosts."
    )
    rebalance_period_s: float | None = Field(
        default=None,
        ge=0.1,
        le=86_400,
        description="How often copies move to follow the load. Without it they move only on "
        "`expertmesh rebalance`, because a move reads weights while requests run. A copy that is "
        "hardly used goes at the first rebalancing after nine tenths of the shortest "
        "`downscale_delay_s`, taken as 10 s at least and as 120 s without autoscaling.",
    )

    @field_validator("pools")
    @classmethod
    def _pools_agree(cls, pools: tuple[PoolConfig, ...] | None) -> tuple[PoolConfig, ...] | None:
        names = [pool.name for pool in pools or ()]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"names must differ; given more than once: {', '.join(doubled)}")
        budgets = [pool.memory_budget_bytes for pool in pools or ()]
        if None in budgets and any(budget is not None for budget in budgets):
            raise ValueError("all pools must have memory_budget_bytes, or none")
        return pools

    @field_validator(*SINGLE_POOL_KEYS)
    @classmethod
    def _stands_in_one_place(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic does not call this for defaults, so the key was given.
        if info.data.get("pools") is not None:
            raise ValueError("belongs in each pool when pools are listed")
        return value

    @field_validator("min_copies")
    @classmethod
    def _copies_need_actors(cls, min_copies: int, info: ValidationInfo) -> int:
        pools, actors = info.data.get("pools"), info.data.get("actors")  # absent when wrong
        if pools is not None:
            actors = sum(_fewest(pool.actors, pool.autoscaling) for pool in pools)
        elif actors is not None:
            actors = _fewest(actors, info.data.get("autoscaling"))
        if actors is not None and min_copies > actors:
            raise ValueError(f"must be at most the number of actors, {actors}")
        return min_copies

    def all_pools(self) -> tuple[PoolConfig, ...]:
        """Return the listed pools, or the single pool where none is listed."""
        if self.pools is not None:
            return self.pools
        values = {key: getattr(self, key) for key in SINGLE_POOL_KEYS}
        return (PoolConfig(name=DEFAULT_POOL, **values),)

    @property
    def emulated_pools(self) -> tuple[str, ...]:
        """The names of the pools with emulated devices."""
        return tuple(pool.name for pool in self.all_pools() if pool.emulate is not None)

    @property
    def num_actors(self) -> int:
        """The number of actors in all pools."""
        return sum(pool.actors for pool in self.all_pools())
