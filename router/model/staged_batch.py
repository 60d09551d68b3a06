"""A step's inputs on the router's device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

from cluster.staging import Staging
from router.moe.routed import StepRouted

Batch = TypeVar("Batch")


def batch_to_device(
    staging: Staging, batch: Batch, routed: StepRouted | None, *others: torch.Tensor
) -> tuple[Batch, list[torch.Tensor]]:
    """Return a step's batch and other tensors on the device, by one copy.

    ``batch`` is a dataclass with tensors, or a tuple of these. The experts that requests force, if
    any, come in the same copy and stay in ``routed``.
    """
    forced = None if routed is None else routed.forced
    distinct: dict[int, torch.Tensor] = {}  # layers with and without a window may share a mask

    def note(tensor: torch.Tensor) -> torch.Tensor:
        return distinct.setdefault(id(tensor), tensor)

    with_tensors((batch, others, forced), note)
    moved = dict(zip(distinct, staging.to_device(*distinct.values()), strict=True))
    staged, placed = with_tensors((batch, others), lambda tensor: moved[id(tensor)])
    if routed is not None and forced is not None:
        routed.forced = moved[id(forced)]
    return staged, list(placed)


def with_tensors(value: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a dataclass or tuple with all tensors in it replaced by what ``move`` returns."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, tuple):
        return tuple(with_tensors(item, move) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        found = {f.name: with_tensors(getattr(value, f.name), move) for f in fields(value)}
        return replace(value, **found)
    return value
