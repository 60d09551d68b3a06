"""The number of routers and gateways, by Serve's own autoscaler: their use, or the nodes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ray
from ray.serve.config import AutoscalingContext

from cluster.ray_private import draining_nodes
from router.config.deployment import MAX_GATEWAYS, GatewayConfig, ReplicaScalingConfig

BARE_S = 10.0
NODE_GONE_S = 5.0
"""A node that comes back so soon finds its gateway."""
USE = "use"
"""The name under which a replica reports to Serve the share of it that is in use."""


def replica_options(replicas: int, scaling: ReplicaScalingConfig | None) -> dict[str, Any]:
    """Return the options of ``serve.deployment`` for a deployment's number of replicas."""
    if scaling is None:
        return {"num_replicas": replicas}
    return {
        "num_replicas": "auto",
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "initial_replicas": replicas,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "policy": {
                "policy_function": "router.serve.autoscaling:FollowUse",
                "policy_kwargs": {"target_use": scaling.target_use},
            },
        },
    }


def gateway_options(gateway: GatewayConfig, nodes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the options of ``serve.deployment`` for the number of gateways.

    ``nodes`` are ``ray.nodes()`` at the start.
    """
    if isinstance(gateway.replicas, int):
        return replica_options(gateway.replicas, gateway.autoscaling)
    return {
        "num_replicas": "auto",
        "max_replicas_per_node": 1,  # else Serve puts two on one node
        "autoscaling_config": {
            "min_replicas": 1,
            "initial_replicas": max(1, len(able_nodes(nodes, gateway.num_cpus))),
            "max_replicas": MAX_GATEWAYS,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": NODE_GONE_S,
            "policy": {
                "policy_function": "router.serve.autoscaling:EachNode",
                "policy_kwargs": {"num_cpus": gateway.num_cpus},
            },
        },
    }


class EachNode:
    """Serve's autoscaling policy: as many replicas as there are nodes that can hold one.

    A node that Ray drains counts no more. Otherwise Serve would look for another place for its
    gateway, which no node has, and would keep the gateway until then.
    """

    def __init__(self, num_cpus: float) -> None:
        self._num_cpus = num_cpus

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, and no state of its own."""
        return max(1, len(able_nodes(ray.nodes(), self._num_cpus, draining_nodes()))), {}


def able_nodes(
    nodes: Iterable[Mapping[str, Any]], num_cpus: float, draining: Collection[str] = ()
) -> list[str]:
    """Return the ids of those of ``ray.nodes()`` that live, stay and have CPUs for a gateway."""
    return [
        node["NodeID"]
        for node in nodes
        if node["Alive"]
        and node["NodeID"] not in draining
        and node["Resources"].get("CPU", 0.0) >= max(num_cpus, 1e-4)
    ]


class BareNodes:
    """The nodes that have been without a gateway for :data:`BARE_S`, though each is to have one."""

    def __init__(self) -> None:
        self.ids: tuple[str, ...] = ()
        self._since_s: dict[str, float] = {}

    def look(self, able: Iterable[str], with_gateway: Collection[str], now_s: float) -> None:
        """Take which nodes can have a gateway now, and which have one."""
        bare = [node for node in able if node not in with_gateway]
        self._since_s = {node: self._since_s.get(node, now_s) for node in bare}
        self.ids = tuple(node for node in bare if now_s - self._since_s[node] >= BARE_S)


class FollowUse:
    """Serve's autoscaling policy: so many replicas that ``target_use`` of each is in use.

    Serve makes one instance for each deployment, and adds delays and bounds. A replica that has not
    reported yet counts with the mean of the others. Where none has reported, the number stays.
    """

    def __init__(self, target_use: float) -> None:
        self._target_use = target_use

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, and no state of its own."""
        uses = (context.aggregated_metrics or {}).get(USE, {})
        if not uses:
            return context.target_num_replicas, {}
        mean = sum(uses.values()) / len(uses)
        return math.ceil(mean * context.current_num_replicas / self._target_use - 1e-9), {}
