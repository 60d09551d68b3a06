"""Expert actors for the benchmarks that run an engine without Serve and controller."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, begin_peak, peak_mb, resident_mb

EPOCH, GENERATION = 1, 1
TIMEOUT_S = 120.0


@dataclass(slots=True)
class Actors:
    """Actors that hold a model's experts: the placement's view, the handles, and the loading.

    ``loading`` has figures by actor: ``load_s``, how long the actor loaded; ``weights_mb``, the
    weights that it then held; of actors on the host also ``peak_mb``, the most that was resident
    for these, and ``code_mb``, the memory that the first expert brought along besides itself.
    """

    view: Any
    handles: dict[str, Any]
    loading: dict[str, dict[str, float]] = field(default_factory=dict)

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

    from cluster.controller.pool import CONTROL_CALLS, actor_options
    from cluster.placement.placement import assign_experts, empty_placement
    from cluster.spec import ActorSpec, ModelExperts, ModelSource, actor_name
    from experts.checkpoint.checkpoint import open_checkpoint
    from experts.checkpoint.identity import identity_of
    from router.config import ExpertsConfig
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
    reports = actors.call("describe")
    peaks = None if num_gpus else _HostPeaks({a: r.pid for a, r in reports.items()})
    started_s = time.perf_counter()
    if peaks is not None:
        firsts = [handle.load.remote(EPOCH, spec, shares[a][:1]) for a, handle in handles.items()]
        peaks.begin(ray.get(firsts, timeout=TIMEOUT_S))
    kernels = []
    for actor_id, report in _loaded(handles, shares, spec):
        kernels += report.kernels
        actors.loading[actor_id] = {
            "load_s": time.perf_counter() - started_s,
            "weights_mb": report.weight_bytes / 1e6,
            **({} if peaks is None else peaks.of(actor_id)),
        }
        placement = placement.with_actor(actor_id, GENERATION, shares[actor_id])
    actors.view.expert_classes = frozenset(kernel.kernel_class for kernel in kernels)
    actors.view.publish(placement)
    return actors


def _loaded(
    handles: Mapping[str, Any], shares: Mapping[str, Sequence[Any]], spec: Any
) -> Iterator[tuple[str, Any]]:
    """Have each actor load its share; yields (actor_id, report) as they are done."""
    import ray

    loads = {handles[a].load.remote(EPOCH, spec, keys): a for a, keys in shares.items()}
    waiting = list(loads)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=TIMEOUT_S)
        if not done:
            raise TimeoutError(f"actors did not load within {TIMEOUT_S} s")
        yield loads[done[0]], ray.get(done[0])


class _HostPeaks:
    """The resident memory of actors while they load, by actor."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids
        self._before_mb = {actor_id: resident_mb(pid) for actor_id, pid in pids.items()}
        self._code_mb: dict[str, float] = {}

    def begin(self, reports: Sequence[Any]) -> None:
        """Begin to count, once each actor has its first expert."""
        for report in reports:
            first_mb = begin_peak(report.pid) - report.weight_bytes / 1e6
            self._code_mb[report.actor_id] = first_mb - self._before_mb[report.actor_id]

    def of(self, actor_id: str) -> dict[str, float]:
        """Return an actor's figures."""
        code_mb = self._code_mb[actor_id]
        resident = peak_mb(self._pids[actor_id]) - self._before_mb[actor_id]
        return {"peak_mb": resident - code_mb, "code_mb": code_mb}
