"""Plans the memory and the devices of a model from sizes alone: pure functions.

A router holds the key/value cache and all weights but the routed experts', and takes memory for a
step. Each device has one expert actor, which takes memory for a batch of rows.
:func:`cluster.placement.placement.assign_experts` spreads the copies over the actors of the plan,
as it does in a deployment.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.errors import ConfigError
from cluster.placement.placement import assign_experts
from cluster.spec import ModelExperts
from cluster.wire.frames import DTYPE_BYTES
from router.config.deployment import RouterConfig
from router.model.memory import StepLimits
from router.ops.plan.shape import ModelShape
from router.ops.plan.sizes import format_size

ROUTER_PROCESS_BYTES = 553_000_000
ACTOR_PROCESS_BYTES = 346_000_000
"""The memory of a process with torch, without weights and cache, measured by ``benchmarks.serve``
on a CPU in November 2026. On an accelerator they stand for the driver's context and code, which
torch's users report as 0.3 to 0.5 GB a process. An actor on a CPU has no torch and takes a third;
a plan does not know whether a device is one."""
ACTOR_BATCH_ROWS = 1024
"""The most rows of several frames in one batch of an actor; a larger frame has its own batch."""
USUAL_DEVICES_BYTES = (24 * 10**9, 48 * 10**9, 80 * 10**9, 141 * 10**9)
"""The memory of usual GPUs; a plan without a given device memory covers each of them."""
MAX_DEVICES = 1000
"""The most expert actors of a deployment."""
_EXACT_UP_TO = 128


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model to plan for.

    ``source`` names the origin of its shape. ``note`` is a remark for the user, or empty.
    """

    name: str
    shape: ModelShape
    dtype: str
    source: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Wish:
    """The user's wishes for a plan; ``None`` leaves a value open.

    Without ``devices`` the plan finds the fewest that hold the experts. The cache holds
    ``concurrency`` sequences of ``context`` tokens. Without both, it has a router's default size.
    """

    copies: int = 1
    device_memory_bytes: int | None = None
    devices: int | None = None
    context: int | None = None
    concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class DevicesPlan:
    """The fit of the experts and of the router on devices of one memory size.

    ``num_devices`` is the given number, or the fewest devices that hold all copies (``None``: more
    than :data:`MAX_DEVICES`). ``experts_on_fullest`` and ``bytes_on_fullest`` describe the device
    with the most experts; the bytes include the actor's process and a batch. ``most_copies`` is the
    number of copies of each expert that fit on a given number of devices. ``free_for_cache_bytes``
    is the room for the cache of a router on a device of its own; it is negative where the router
    without a cache does not fit. ``cache_tokens`` is the number of tokens in that room, and
    ``cache_tokens_beside_actor`` in the room of a router that shares the fullest device.
    """

    device_memory_bytes: int
    num_devices: int | None
    experts_on_fullest: int
    bytes_on_fullest: int
    experts_fit: bool
    most_copies: int | None
    free_for_cache_bytes: int
    cache_tokens: int
    cache_tokens_beside_actor: int
    cache_fits: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """The needs of a model, part by part, and the devices that hold it; sizes in bytes."""

    model: PlannedModel
    copies: int
    router_weight_bytes: int
    router_process_bytes: int
    expert_bytes: int
    all_experts_bytes: int
    """One copy of each expert."""
    actor_process_bytes: int
    actor_batch_bytes: int
    """Rows of a batch and the values between an expert's products."""
    cache_token_bytes: int
    wanted_cache_tokens: int
    wanted_cache_bytes: int
    router_step_bytes: int
    """What a router's largest step takes beside weights and cache."""
    longest_tokens: int
    """The tokens of the longest sequence in that step."""
    devices: tuple[DevicesPlan, ...]
    num_devices: int | None
    """The given number."""
    needed_device_bytes: int | None
    """The memory that each of ``num_devices`` needs for its experts, a batch and its process."""

    @property
    def actor_bytes_without_experts(self) -> int:
        """Memory of one actor's process and batch."""
        return self.actor_process_bytes + self.actor_batch_bytes

    @property
    def router_bytes_without_cache(self) -> int:
        """Memory of one router's weights, process and step."""
        return self.router_weight_bytes + self.router_process_bytes + self.router_step_bytes

    @property
    def router_bytes(self) -> int:
        """Memory of one router with the wanted cache."""
        return self.router_bytes_without_cache + self.wanted_cache_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        shape = self.model.shape
        plan = asdict(self) | {"router_bytes": self.router_bytes}
        plan["model"] |= {
            "total_parameters": shape.total_parameters,
            "active_parameters": shape.active_parameters,
        }
        plan["model"]["shape"] |= {
            "router_parameters": shape.router_parameters,
            "cache_values_per_token": shape.cache_values_per_token,
        }
        return plan


def make_plan(model: PlannedModel, wish: Wish) -> Plan:
    """Plan a model.

    Raises :class:`ConfigError` naming the option when the wish contradicts itself or the model:
    more copies than devices, a context that is longer than the model's.
    """
    _check(model, wish)
    shape = model.shape
    value_bytes = DTYPE_BYTES[model.dtype]
    expert_bytes = shape.expert_parameters * value_bytes
    router, tokens = shape.router, _cache_tokens(shape, wish)
    limits = _step_limits(shape, wish, tokens)
    batch_bytes = actor_batch_bytes(shape, value_bytes, limits.max_batch_tokens)
    needed_device_bytes = None
    if wish.devices is not None:
        share = largest_share(shape, wish.devices, wish.copies)
        needed_device_bytes = share * expert_bytes + ACTOR_PROCESS_BYTES + batch_bytes
    plan = Plan(
        model=model,
        copies=wish.copies,
        router_weight_bytes=router.weight_bytes(value_bytes),
        router_process_bytes=ROUTER_PROCESS_BYTES,
        expert_bytes=expert_bytes,
        all_experts_bytes=shape.num_all_experts * expert_bytes,
        actor_process_bytes=ACTOR_PROCESS_BYTES,
        actor_batch_bytes=batch_bytes,
        cache_token_bytes=router.cache_bytes(1, value_bytes),
        wanted_cache_tokens=tokens,
        wanted_cache_bytes=router.cache_bytes(tokens, value_bytes),
        router_step_bytes=router.step_bytes(limits, value_bytes),
        longest_tokens=limits.longest,
        devices=(),
        num_devices=wish.devices,
        needed_device_bytes=needed_device_bytes,
    )
    sizes: tuple[int, ...] = () if wish.devices else USUAL_DEVICES_BYTES
    if wish.device_memory_bytes is not None:
        sizes = (wish.device_memory_bytes,)
    return replace(plan, devices=tuple(_devices(plan, size, wish) for size in sizes))


def _check(model: PlannedModel, wish: Wish) -> None:
    if wish.devices is not None and wish.devices > MAX_DEVICES:
        raise ConfigError(f"must be at most {MAX_DEVICES}; got {wish.devices}", "--devices")
    if wish.devices is not None and wish.copies > wish.devices:
        raise ConfigError(
            f"must be at most the number of devices, {wish.devices}, since each copy of an expert "
            f"is on another device; got {wish.copies}",
            "--copies",
        )
    longest = model.shape.max_position_embeddings
    if wish.context is not None and wish.context > longest:
        raise ConfigError(
            f"must be at most the model's own, {longest} tokens; got {wish.context}",
            "--context",
        )


def _cache_tokens(shape: ModelShape, wish: Wish) -> int:
    """Return how many tokens the wished cache holds."""
    router, context = RouterConfig(), wish.context or shape.max_position_embeddings
    if wish.context is None and wish.concurrency is None:
        return router.cache_tokens_for(context)
    return context * (wish.concurrency or router.max_batch_size)


def _step_limits(shape: ModelShape, wish: Wish, cache_tokens: int) -> StepLimits:
    """Return the limits of a router for the wished sequences, by default those of its settings."""
    router = RouterConfig()
    batch_size = wish.concurrency or router.max_batch_size
    longest = min(wish.context or shape.max_position_embeddings, cache_tokens)
    return StepLimits(batch_size, max(router.max_batch_tokens, batch_size), longest)


def actor_batch_bytes(shape: ModelShape, value_bytes: int, max_batch_tokens: int) -> int:
    """Return the most bytes that an actor's batch takes beside the weights.

    A frame has at most the rows of a router's step, one for each token and chosen expert. Rows come
    in, are put in order, and leave in two pieces of memory. An expert has two products of its inner
    size, with biases and clamped where its family does so, their activation and their product.
    """
    num_rows = max(ACTOR_BATCH_ROWS, max_batch_tokens * shape.num_experts_per_tok)
    values_per_row = 4 * shape.router.hidden_size + 6 * shape.intermediate_size
    return num_rows * values_per_row * value_bytes


def _devices(plan: Plan, memory_bytes: int, wish: Wish) -> DevicesPlan:
    shape = plan.model.shape
    room = max(0, memory_bytes - plan.actor_bytes_without_experts) // plan.expert_bytes
    num_devices = wish.devices or fewest_devices(shape, wish.copies, room)
    most = largest_share(shape, num_devices, wish.copies) if num_devices else 0
    actor_bytes = most * plan.expert_bytes + (plan.actor_bytes_without_experts if most else 0)
    free_bytes = memory_bytes - plan.router_bytes_without_cache
    cache_tokens = max(0, free_bytes) // plan.cache_token_bytes
    return DevicesPlan(
        device_memory_bytes=memory_bytes,
        num_devices=num_devices,
        experts_on_fullest=most,
        bytes_on_fullest=actor_bytes,
        experts_fit=0 < most <= room,
        most_copies=None if wish.devices is None else _most_copies(shape, wish.devices, room),
        free_for_cache_bytes=free_bytes,
        cache_tokens=cache_tokens,
        cache_tokens_beside_actor=max(0, free_bytes - actor_bytes) // plan.cache_token_bytes,
        cache_fits=cache_tokens >= plan.wanted_cache_tokens,
    )


def largest_share(shape: ModelShape, num_devices: int, copies: int) -> int:
    """Return how many experts the fullest device holds when all copies are placed."""
    actor_ids = [str(i) for i in range(num_devices)]
    layer = ModelExperts("", (0,), shape.num_experts, 1)
    shares = assign_experts([layer], actor_ids, None, copies)
    counts = [len(shares[actor_id]) for actor_id in actor_ids]
    # Each layer is spread as the layer before it, from the next device on.
    return max(
        sum(counts[(device - layer_id) % num_devices] for layer_id in range(shape.num_moe_layers))
        for device in range(num_devices)
    )


def fewest_devices(shape: ModelShape, copies: int, experts_per_device: int) -> int | None:
    """Return the fewest devices that hold ``copies`` of each expert, each copy on another device.

    The number is exact up to :data:`_EXACT_UP_TO` devices, and at most a hundredth too high above.
    ``None`` when :data:`MAX_DEVICES` are too few.
    """
    if experts_per_device < 1:
        return None
    needed = shape.num_all_experts * copies
    count = max(copies, -(-needed // experts_per_device))
    # With this many devices the layers no longer wrap around to the first device, so more devices
    # make no share smaller.
    limit = min(MAX_DEVICES, max(count, shape.num_experts * copies + shape.num_moe_layers))
    while count <= limit:
        if largest_share(shape, count, copies) <= experts_per_device:
            return count
        count += max(1, count // _EXACT_UP_TO)
    return None


def _most_copies(shape: ModelShape, num_devices: int, experts_per_device: int) -> int:
    """Return how many copies of each expert fit on the devices; 0 where no copy does."""
    bound = min(num_devices, num_devices * experts_per_device // shape.num_all_experts)
    for copies in range(bound, 0, -1):
        if largest_share(shape, num_devices, copies) <= experts_per_device:
            return copies
    return 0


def problems(plan: Plan) -> list[str]:
    """Return a sentence for each part that does not fit on the devices of a plan."""
    return [sentence for devices in plan.devices for sentence in _problems(plan, devices)]


def _problems(plan: Plan, devices: DevicesPlan) -> list[str]:
    size, sentences = format_size(devices.device_memory_bytes), []
    room = devices.device_memory_bytes - plan.actor_bytes_without_experts
    if plan.expert_bytes > room:
        sentences.append(
            f"One expert of {format_size(plan.expert_bytes)} and an actor's process and batch of "
            f"{format_size(plan.actor_bytes_without_experts)} do not fit on a device of {size}."
        )
    elif devices.num_devices is None:
        sentences.append(
            f"{_copies(plan.copies)} of the experts needs more than {MAX_DEVICES} devices of "
            f"{size}."
        )
    elif not devices.experts_fit:
        sentences.append(
            f"{_copies(plan.copies)} of the experts need {format_size(devices.bytes_on_fullest)} "
            f"on each of {devices.num_devices} devices of {size}, which hold "
            f"{_copies(devices.most_copies or 0).lower()}."
        )
    if devices.free_for_cache_bytes <= 0:
        sentences.append(
            f"A router's weights, process and step need "
            f"{format_size(plan.router_bytes_without_cache)}, more than a device of {size} has."
        )
    elif not devices.cache_fits:
        sentences.append(
            f"A cache of {plan.wanted_cache_tokens:,} tokens needs "
            f"{format_size(plan.wanted_cache_bytes)}; beside the router, a device of {size} has "
            f"room for {devices.cache_tokens:,} tokens."
        )
    return sentences


def _copies(count: int) -> str:
    return "One copy" if count == 1 else f"{count or 'No'} copies"
