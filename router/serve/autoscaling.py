"""The number of routers and gateways, by Serve's own autoscaler and their use."""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

from router.config import ReplicaScalingConfig

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
