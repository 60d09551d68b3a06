"""Plans the devices of a deployment: what lies on each, and whether it fits: pure functions.

Ray places a process only by its ``num_gpus`` and knows nothing of memory. Of the devices with
enough left it takes the one that is used most. Routers start first: the expert actors wait for
their controller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.placement.placement import assign_experts
from cluster.spec import PoolSpec, budgets_of
from cluster.wire.frames import DTYPE_BYTES
from router.config.deployment import AppConfig
from router.config.experts import DEFAULT_POOL
from router.model.memory import StepLimits
from router.ops.plan.plan import (
    ACTOR_PROCESS_BYTES,
    ROUTER_PROCESS_BYTES,
    PlannedModel,
    actor_batch_bytes,
)
from router.ops.plan.sizes import format_size
from router.served import Served, ServedModel, language_models, pool_specs

SHARES = 10_000
"""The parts of a device that Ray counts."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """A process on a device: a router, or an expert actor; sizes in bytes.

    ``setting`` names the key that makes it smaller: ``router.cache_tokens``, or a pool's
    ``memory_budget_bytes``. Weights and cache are held from the start. ``working_bytes`` are those
    of a router's step or an actor's batch. ``spare_bytes`` are those that an actor's budget leaves
    for copies of further experts. A token of a router's cache has ``cache_token_bytes``, which are
    0 for an actor.
    """

    name: str
    setting: str
    num_gpus: float
    weight_bytes: int
    working_bytes: int
    process_bytes: int
    cache_bytes: int = 0
    cache_token_bytes: int = 0
    spare_bytes: int = 0

    @property
    def shares(self) -> int:
        """The parts of a device that it reserves."""
        return round(self.num_gpus * SHARES)

    @property
    def held_bytes(self) -> int:
        """The bytes that it has from its start to its end."""
        return self.weight_bytes + self.cache_bytes

    @property
    def most_bytes(self) -> int:
        """The most bytes that it may take."""
        return self.held_bytes + self.spare_bytes + self.working_bytes + self.process_bytes


@dataclass(frozen=True, slots=True)
class Device:
    """A device and the processes on it."""

    tenants: tuple[Tenant, ...]

    @property
    def held_bytes(self) -> int:
        """The bytes that are taken on it from the start."""
        return sum(tenant.held_bytes for tenant in self.tenants)

    @property
    def most_bytes(self) -> int:
        """The most bytes that may be taken on it."""
        return sum(tenant.most_bytes for tenant in self.tenants)

    def lacks_at_start(self, memory_bytes: int) -> bool:
        """Return whether not even weights and caches fit."""
        return self.held_bytes > memory_bytes

    def shortage(self, name: str, memory_bytes: int) -> tuple[str, str]:
        """Say which bytes the device of this memory lacks, and what to change; empty where none."""
        lacking = self.most_bytes - memory_bytes
        if lacking <= 0:
            return "", ""
        parts = ", ".join(f"{t.name} {format_size(t.most_bytes)}" for t in self.tenants)
        size = format_size(memory_bytes)
        return f"{name} of {size} lacks {lacking:,} bytes for {parts}", self._advice(lacking)

    def _advice(self, lacking: int) -> str:
        spare = sum(tenant.spare_bytes for tenant in self.tenants)
        if lacking <= spare:
            return f"Lower {_listed(self._lower_budgets(lacking, spare))}."
        cached = sum(tenant.cache_bytes for tenant in self.tenants)
        if lacking <= cached // 2:
            lower = _listed(self._smaller_caches(lacking, cached))
            return f"Lower {lower}."
        more = "actors on more GPUs"
        if len(self.tenants) > 1:
            more = "more GPUs, and a larger num_gpus, so that fewer processes share one"
        return f"Use {more}; or lower max_model_len and router.max_batch_size."

    def _lower_budgets(self, lacking: int, spare: int) -> list[tuple[str, int]]:
        """Return settings by which the actors leave ``lacking`` bytes of their ``spare`` ones."""
        return [
            (t.setting, t.weight_bytes + t.spare_bytes * (spare - lacking) // spare)
            for t in self.tenants
            if t.spare_bytes
        ]

    def _smaller_caches(self, lacking: int, cached: int) -> list[tuple[str, int]]:
        """Return settings by which the caches leave ``lacking`` bytes of the ``cached`` ones."""
        return [
            (t.setting, t.cache_bytes * (cached - lacking) // cached // t.cache_token_bytes)
            for t in self.tenants
            if t.cache_bytes
        ]


def _listed(settings: Iterable[tuple[str, int]]) -> str:
    lowest: dict[str, int] = {}
    for setting, number in settings:
        lowest[setting] = min(number, lowest.get(setting, number))
    return " and ".join(f"{setting} to {number:,}" for setting, number in lowest.items())


@dataclass(frozen=True, slots=True)
class DevicesOfFile:
    """The devices in use; ``unplaced`` are the processes for which ``num_devices`` are too few."""

    devices: tuple[Device, ...]
    unplaced: tuple[Tenant, ...] = ()
    num_devices: int | None = None

    def unplaced_line(self) -> str:
        """Say which processes wait for ever, and for what; empty where none does."""
        if not self.unplaced:
            return ""
        first, others = self.unplaced[0], len(self.unplaced) - 1
        more = f" and {others} more" if others else ""
        in_use = "; ".join(
            f"{', '.join(f'{t.name} {t.num_gpus:g}' for t in device.tenants)}"
            for device in self.devices
        )
        needs = f"{first.name}{more} would wait for ever: it needs {first.num_gpus:g} of a GPU, and"
        if not self.devices:
            return f"{needs} there is none"
        return f"{needs} the {self.num_devices} that there are have {in_use}"

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return {
            "devices": [
                {
                    "tenants": [_json_of(tenant) for tenant in device.tenants],
                    "held_bytes": device.held_bytes,
                    "most_bytes": device.most_bytes,
                }
                for device in self.devices
            ],
            "unplaced": [_json_of(tenant) for tenant in self.unplaced],
        }


def _json_of(tenant: Tenant) -> dict[str, Any]:
    return asdict(tenant) | {"held_bytes": tenant.held_bytes, "most_bytes": tenant.most_bytes}


def place(tenants: Iterable[Tenant], num_devices: int | None = None) -> DevicesOfFile:
    """Place processes as Ray does, in their order, on ``num_devices`` or on as many as it takes.

    A process that reserves nothing is on the first device, which torch takes.
    """
    devices: list[list[Tenant]] = []
    free: list[int] = []
    unplaced = []
    for tenant in tenants:
        if tenant.shares == 0 and devices:
            devices[0].append(tenant)
            continue
        fitting = [i for i, left in enumerate(free) if left >= tenant.shares]
        if fitting:
            chosen = min(fitting, key=lambda i: free[i])
        elif num_devices is None or len(devices) < num_devices:
            chosen = len(devices)
            devices.append([])
            free.append(SHARES)
        else:
            unplaced.append(tenant)
            continue
        devices[chosen].append(tenant)
        free[chosen] -= tenant.shares
    return DevicesOfFile(
        tuple(Device(tuple(here)) for here in devices), tuple(unplaced), num_devices
    )


def shortages(planned: DevicesOfFile, memory_bytes: int) -> list[str]:
    """Return a sentence for each device of this memory on which its processes do not fit."""
    found = [
        device.shortage(f"Device {number}", memory_bytes)
        for number, device in enumerate(planned.devices)
    ]
    return [f"{line}. {advice}" for line, advice in found if line]


def wants_devices(config: AppConfig) -> bool:
    """Return whether any process of an application is to be on a device."""
    on_gpus = [pool.num_gpus for pool in config.experts.all_pools()] + [config.router.num_gpus]
    return any(on_gpus) or config.router.device == "accelerator"


def tenants_of(
    config: AppConfig, served: Sequence[Served], models: Mapping[str, PlannedModel]
) -> tuple[Tenant, ...]:
    """Return an application's processes on devices, the routers first.

    ``models`` are the shapes of its language models by id. The experts of mixtures and their
    routers are on the host.
    """
    router = config.router
    on_device = router.num_gpus > 0 or router.device == "accelerator"
    routers = [
        _router_of(config, model, models[model.id])
        for model in language_models(served)
        for _ in range(router.replicas if on_device else 0)
    ]
    return (*routers, *_actors_of(config, served, models))


def _router_of(config: AppConfig, model: ServedModel, planned: PlannedModel) -> Tenant:
    router, value_bytes = config.router, DTYPE_BYTES[planned.dtype]
    sizes = planned.shape.router
    num_tokens = router.cache_tokens_for(model.max_model_len)
    limits = StepLimits.of(router, model.max_model_len)
    num_slots = sizes.cache_slots(num_tokens, value_bytes)
    return Tenant(
        name=f"router of {model.id}",
        setting="router.cache_tokens",
        num_gpus=router.num_gpus,
        weight_bytes=sizes.weight_bytes(value_bytes),
        working_bytes=sizes.step_bytes(limits, value_bytes),
        process_bytes=ROUTER_PROCESS_BYTES,
        cache_bytes=sizes.cache_bytes(num_slots, value_bytes),
        cache_token_bytes=sizes.cache_bytes(1, value_bytes),
    )


def _actors_of(
    config: AppConfig, served: Sequence[Served], models: Mapping[str, PlannedModel]
) -> list[Tenant]:
    pools = pool_specs(config.experts, served)
    shares = assign_experts(
        [model.source.experts for model in served],
        [actor_id for pool in pools for actor_id in pool.actor_ids()],
        budgets_of(pools),
        config.experts.min_copies,
    )
    on_device = {model.key: model.source.experts for model in language_models(served)}
    all_bytes = sum(len(one.expert_keys()) * one.expert_bytes for one in on_device.values())
    max_tokens = config.router.max_batch_tokens
    batches = [
        actor_batch_bytes(model.shape, DTYPE_BYTES[model.dtype], max_tokens)
        for model in models.values()
    ]

    def actor(pool: PoolSpec, actor_id: str) -> Tenant:
        held = [on_device[key.model] for key in shares[actor_id] if key.model in on_device]
        weight_bytes = sum(experts.expert_bytes for experts in held)
        # Without a budget no copies are added, and an actor never has two of one expert.
        most_bytes = min(pool.memory_budget_bytes or 0, all_bytes)
        return Tenant(
            name=actor_id,
            setting=_budget_setting(pool.name),
            num_gpus=pool.actor.num_gpus,
            weight_bytes=weight_bytes,
            working_bytes=max(batches, default=0),
            process_bytes=ACTOR_PROCESS_BYTES if on_device else 0,
            spare_bytes=max(0, most_bytes - weight_bytes),
        )

    return [
        actor(pool, actor_id)
        for pool in pools
        if pool.actor.num_gpus > 0
        for actor_id in pool.actor_ids()
    ]


def _budget_setting(pool: str) -> str:
    if pool == DEFAULT_POOL:
        return "experts.memory_budget_bytes"
    return f"memory_budget_bytes of the pool {pool}"
