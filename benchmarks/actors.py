"""Expert actors for the benchmarks that run an engine without Serve and controller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL

EPOCH, GENERATION = 1, 1
TIMEOUT_S = 120.0


@dataclass(slots=True)
class Actors:
    """Actors that hold a model's experts: the placement's view, and the handles."""

    view: Any
    handles: dict[str, Any]

    def call(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Call a method of all actors at the same time; returns the results by actor."""
        import ray

        calls = [getattr(handle, method).remote(*arguments) for handle in self.handles.values()]
        return dict(zip(self.handles, ray.get(calls, timeout=TIMEOUT_S), strict=True))

    def renew(self) -> None:
        """Renew the leases: without a controller nobody else does."""
        self.call("heartbeat", EPOCH)

    def kill(self) -> None:
        """End the actors."""
        import ray

        for handle in self.handles.values():
            ray.kill(handle)


def start_actors(
    folder: Path,
    shape: Any,
    count: int,
    actor_class: type,
    app: str,
    num_gpus: float = 0.0,
    dtype: str = "bfloat16",
) -> Actors:
    """Start actors as the product does, each with ``num_gpus``, and have all load at once."""
    import ray

    from cluster.controller.records.pool import CONTROL_CALLS, actor_options
    from cluster.placement.placement import assign_experts, empty_placement
    from cluster.spec import ActorSpec, ModelExperts, ModelSource, actor_name
    from experts.checkpoint.checkpoint import open_checkpoint
    from experts.checkpoint.identity import identity_of
    from router.config.deployment import ExpertsConfig
    from router.control.placement_view import PlacementView

    config = ExpertsConfig()
    experts = ModelExperts(MODEL, shape.layers, shape.num_experts, 1)
    identity = identity_of(open_checkpoint(folder))
    sources = (ModelSource(str(folder), dtype, experts, identity),)
    spec = ActorSpec(app, sources, config.num_cpus, num_gpus, config.threads, config.max_queue_rows)
    remote = ray.remote(concurrency_groups={"control": CONTROL_CALLS})(actor_class)
    placement = empty_placement(EPOCH, [experts])
    handles: dict[str, Any] = {}
    shares = assign_experts([experts], [f"actor-{i}" for i in range(count)], None)
    for actor_id in shares:
        options = actor_options(spec, actor_name(app, actor_id, GENERATION))
        handles[actor_id] = remote.options(**options).remote(spec, actor_id, GENERATION, EPOCH)
    actors = Actors(PlacementView(), handles)
    loads = [handle.load.remote(EPOCH, spec, shares[a]) for a, handle in handles.items()]
    kernels = []
    for actor_id, report in zip(handles, ray.get(loads, timeout=TIMEOUT_S), strict=True):
        kernels += report.kernels
        placement = placement.with_actor(actor_id, GENERATION, shares[actor_id])
    actors.view.expert_classes = frozenset(kernel.kernel_class for kernel in kernels)
    actors.view.publish(placement)
    return actors
