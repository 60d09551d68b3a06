"""The memory that a deployment takes, as a sum of sizes: pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.wire.frames import DTYPE_BYTES
from router.config.deployment import AppConfig, ExpertsConfig
from router.ops.plan.plan import PlannedModel

ACTOR_BYTES = 190_000_000
ROUTER_BYTES = 310_000_000
GATEWAY_BYTES = 240_000_000
RAY_AND_SERVE_BYTES = 1_000_000_000
"""The memory of each process at its start, without weights and cache; memory that processes share
counts once (proportional set size on Linux, after ``serve run deploy/cluster.yaml``).
:mod:`router.ops.plan.plan` has the sizes that the processes grow to."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of host memory by their user; experts on GPUs take none."""

    experts_bytes: int
    routers_bytes: int
    processes_bytes: int

    @property
    def total_bytes(self) -> int:
        """The whole need."""
        return self.experts_bytes + self.routers_bytes + self.processes_bytes


Size = PlannedModel | int
"""A language model in its served dtype, or the bytes of a mixture's files."""


def needs_of(applications: Iterable[tuple[AppConfig, Mapping[str, Size]]]) -> Needs:
    """Sum up the memory of applications that run on one machine.

    Each application comes with its models by id.
    """
    experts = routers = 0
    processes = RAY_AND_SERVE_BYTES
    for config, models in applications:
        copies = config.experts.min_copies * _share_on_host(config.experts)
        for served in config.models:
            size = models[served.id]
            if isinstance(size, int):
                experts += math.ceil(size * copies)
                continue
            shape, value_bytes = size.shape, DTYPE_BYTES[size.dtype]
            tokens = config.router.cache_tokens_for(
                served.max_model_len or shape.max_position_embeddings
            )
            routers += shape.router.held_bytes(tokens, value_bytes) * config.router.replicas
            one_copy = shape.num_all_experts * shape.expert_parameters * value_bytes
            experts += math.ceil(one_copy * copies)
        processes += config.experts.num_actors * ACTOR_BYTES
        processes += config.router.replicas * len(config.models) * ROUTER_BYTES
        processes += config.gateway.on_one_node * GATEWAY_BYTES
    return Needs(experts, routers, processes)


def _share_on_host(experts: ExpertsConfig) -> float:
    """Return the share of the experts that actors without a GPU hold.

    A pool's share is in proportion to its budgets, as in
    :func:`cluster.placement.placement.assign_experts`.
    """
    on_host = total = 0
    for pool in experts.all_pools():
        weight = pool.actors * (pool.memory_budget_bytes or 1)
        total += weight
        on_host += weight * (pool.num_gpus == 0)
    return on_host / total
