"""The memory of router and actors on a device against what ``expertmesh plan`` says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from cluster.wire.frames import DTYPE_BYTES
from experts.remote import RemoteExpertActor
from router.config.deployment import RouterConfig
from router.model.memory import StepLimits
from router.ops.plan.plan import Wish, make_plan
from router.ops.plan.source import find_model

DTYPE = "bfloat16"
"""That of the measured models."""


@dataclass(frozen=True, slots=True)
class Planned:
    """The bytes that a plan gives a process on a device: held ones, and those of its work."""

    held_bytes: int
    working_bytes: int

    @property
    def most_bytes(self) -> int:
        """The most bytes at one time."""
        return self.held_bytes + self.working_bytes


def planned(folder: Path, actors: int, cache_tokens: int) -> tuple[Planned, Planned]:
    """Return the plan for a router of a checkpoint, and for the fullest of so many actors.

    The router has the product's limits of a step and a cache of so many tokens in whole pages. The
    processes' own memory is the host's.
    """
    plan = make_plan(find_model(str(folder), DTYPE), Wish(devices=actors))
    assert plan.needed_device_bytes is not None
    sizes, value_bytes, config = plan.model.shape.router, DTYPE_BYTES[DTYPE], RouterConfig()
    longest = min(plan.model.shape.max_position_embeddings, cache_tokens)
    limits = StepLimits(config.max_batch_size, config.max_batch_tokens, longest)
    slots = sizes.cache_slots(cache_tokens, value_bytes)
    router = Planned(sizes.held_bytes(slots, value_bytes), sizes.step_bytes(limits, value_bytes))
    held_bytes = plan.needed_device_bytes - plan.actor_bytes_without_experts
    return router, Planned(held_bytes, plan.actor_batch_bytes)


def most_bytes() -> tuple[int, int]:
    """Return the most bytes on this process's device at once: of tensors, and of torch.

    torch keeps some of the memory of tensors that are gone, which no other process can have.
    """
    return torch.accelerator.max_memory_allocated(), torch.accelerator.max_memory_reserved()


def compared(
    plan: tuple[Planned, Planned], measured: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, Any]]:
    """Return of each process the bytes that it had, those of the plan, and their ratio.

    ``measured`` are those of :func:`most_bytes`.
    """
    found = {}
    for process, (num_bytes, reserved_bytes) in measured.items():
        of_plan = plan[0] if process == "router" else plan[1]
        found[process] = {
            "peak_bytes": num_bytes,
            "reserved_bytes": reserved_bytes,
            "held_bytes": of_plan.held_bytes,
            "planned_bytes": of_plan.most_bytes,
            "ratio": num_bytes / of_plan.most_bytes,
        }
    return found


class MeasuredActor(RemoteExpertActor):
    """The product's actor, which tells its kernels and the memory that torch had on its device.

    A subclass: the product has no hook.
    """

    @ray.method(concurrency_group="control")
    def device_bytes(self) -> tuple[int, int]:
        """Return the most bytes at once of tensors, and of torch; 0 without a device."""
        return most_bytes() if torch.accelerator.is_available() else (0, 0)

    @ray.method(concurrency_group="control")
    def kernel_classes(self) -> list[str]:
        """Return the classes of the kernels that compute its experts."""
        return [kernel.kernel_class for kernel in self.describe().kernels]
