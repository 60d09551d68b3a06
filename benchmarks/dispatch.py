"""Time of one layer's dispatch and combine, with experts that return their input.

    python -m benchmarks.dispatch [--json FILE] [--compare OLD.json]

Real expert actors on a local Ray, the router's own dispatcher, frames and combine; only the
experts' products are replaced, so that what is left is what serving experts apart costs. Prints
p50 and p99 for one token's row (1 KB), 16 KB, 128 KB and 1 MB of rows, to one actor and to four,
over streams and over Ray calls, beside bare Ray calls of as many bytes in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.common import (
    MODEL,
    Figure,
    finish,
    latency_figures,
    machine,
    output_options,
    progress,
    show,
    summary_ms,
)
from cluster.placement.placement import assign_experts, empty_placement
from cluster.spec import ActorSpec, ExpertKey, ModelExperts, ModelSource, TransportKind
from cluster.transport.open import open_transport
from cluster.wire.arrays import DTYPES
from cluster.wire.frames import Buffer
from experts.actor import ExpertActor
from experts.bank import GatedFfnExpert
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.remote import sealed_answer
from router.control.placement_view import PlacementView

APP = "bench-dispatch"
HIDDEN, NUM_EXPERTS, TOP_K = 512, 8, 2
TURN = 50
SIZES_BYTES = (1024, 16_384, 131_072, 1_048_576)
TRANSPORTS: tuple[TransportKind, ...] = ("stream", "ray")


_RUNS = itertools.count()  # actor names must differ from run to run


class IdentityExpert:
    """An expert that returns its input, as bytes where real ones get theirs as bytes."""

    kernel_class = ""
    num_bytes = 0
    row_shape: tuple[int, ...] = (HIDDEN,)
    dtype = "bfloat16"

    def __init__(self, like: GatedFfnExpert) -> None:
        """``like`` is a real one of the same rows."""
        self.grouped = None if like.grouped is None else _same_bytes
        self.takes = like.takes

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows."""
        return rows


def _same_bytes(
    experts: Sequence[IdentityExpert], counts: tuple[int, ...], rows: Buffer
) -> memoryview:
    return memoryview(rows)


class IdentityActor(ExpertActor):
    """The expert actor with identity experts; everything else is the product's."""

    def _load(self, epoch: int, keys: Sequence[ExpertKey]) -> None:
        dtype = DTYPES[IdentityExpert.dtype]
        weights = GatedFfnWeights(
            np.zeros((2 * HIDDEN, HIDDEN), dtype), np.zeros((HIDDEN, HIDDEN), dtype)
        )
        real = GatedFfnExpert(weights, "silu", 1)
        for key in keys:
            self._bank.hold(ExpertKey(*key), IdentityExpert(real))

    def compute(self, data: bytes) -> bytes:  # type: ignore[override]
        """As :class:`RemoteExpertActor` does."""
        return sealed_answer(super().compute, data)

    def echo(self, data: bytes) -> bytes:
        """Return the bytes; what a bare Ray call takes is the least that one of ours can."""
        return data


def start(num_actors: int) -> tuple[PlacementView, dict[Any, list[int]]]:
    """Start actors that share one layer's experts; returns the placement, and who has which."""
    import ray

    from cluster.controller.pool import CONTROL_CALLS, actor_options

    experts = ModelExperts(MODEL, (0,), NUM_EXPERTS, 1)
    spec = ActorSpec(APP, (ModelSource("", "bfloat16", experts, ""),), 0.1, 0, 1, 65_536)
    actor_ids = [f"bench-{next(_RUNS)}-{i}" for i in range(num_actors)]
    remote = ray.remote(concurrency_groups={"control": CONTROL_CALLS})(IdentityActor)
    placement = empty_placement(1, [experts])
    experts_of = {}
    for actor_id, keys in assign_experts([experts], actor_ids, None).items():
        options = actor_options(spec, f"expertmesh:{APP}:{actor_id}:g1")
        handle = remote.options(**options).remote(spec, actor_id, 1, 1)
        ray.get(handle.load.remote(1, spec, keys), timeout=60)
        placement = placement.with_actor(actor_id, 1, keys)
        experts_of[handle] = [key.expert_id for key in keys]
    view = PlacementView()
    view.publish(placement)
    return view, experts_of


def bare_calls(experts_of: dict[Any, list[int]], topk_ids: np.ndarray) -> list[tuple[Any, bytes]]:
    """Return the actors that a layer asks, and as many bytes as the rows that it sends them."""
    rows = {handle: int(np.isin(topk_ids, ids).sum()) for handle, ids in experts_of.items()}
    return [(handle, bytes(count * HIDDEN * 2)) for handle, count in rows.items() if count]


def measure(num_actors: int, payload_bytes: int, calls: int) -> dict[str, Any]:
    """Measure bare calls and layers over each transport, by turns, so that all see one machine."""
    import ray

    from router.moe.combine import WeightedSums
    from router.moe.dispatch import Dispatcher
    from router.moe.gate import Choice
    from router.moe.layer import MoELayers, StepContext

    view, experts_of = start(num_actors)
    layers_of = {}
    for kind in TRANSPORTS:
        dispatcher = Dispatcher(MODEL, view, open_transport(APP, kind), lambda a, g: None, 10.0)
        layers_of[kind] = MoELayers(dispatcher, WeightedSums())
    contexts = {kind: StepContext(time.monotonic() + 600, (), ()) for kind in layers_of}
    tokens = payload_bytes // (HIDDEN * 2)
    rows = torch.randn(tokens, HIDDEN).bfloat16()
    pairs = list(itertools.combinations(range(NUM_EXPERTS), TOP_K))
    topk_ids = torch.from_numpy(np.array([pairs[t % len(pairs)] for t in range(tokens)]))
    topk_weights = torch.full((tokens, TOP_K), 0.5)
    choice = Choice(topk_ids.numpy(), topk_weights)
    bare = bare_calls(experts_of, topk_ids.numpy())
    bare_s = []
    for _ in range(calls // TURN + 1):
        for _ in range(TURN):
            started_s = time.perf_counter()
            ray.get([handle.echo.remote(data) for handle, data in bare], timeout=10)
            bare_s.append(time.perf_counter() - started_s)
        for kind, layers in layers_of.items():
            for _ in range(TURN):
                combined = layers.finish(layers.begin(contexts[kind], 0, rows, choice))
            assert torch.equal(combined, rows), "identity experts with weights that sum to 1"
    for handle in experts_of:
        ray.kill(handle)
    figures = {"bare_call": summary_ms(bare_s[TURN:])}  # the first turn warms up
    for kind, context in contexts.items():
        figures[kind] = summary_ms(context.layer_times_s[TURN:])
    return figures


def become_a_router() -> None:
    """Start anew with a router's environment, which the C library reads when a process starts."""
    from cluster.environment import router_environment

    environment = router_environment(1)
    if not environment.items() <= os.environ.items():
        again = [sys.executable, "-m", "benchmarks.dispatch", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **environment})


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    rows = []
    columns = ["rows"]
    for name in ("bare_call", *TRANSPORTS):
        columns += [f"{name.replace('_', ' ')} p50", "p99"]
    for case, figures in result["figures"].items():
        values = [figures[name][p] for name in figures for p in ("p50_ms", "p99_ms")]
        rows.append((case, *(f"{value:.2f}" for value in values)))
    show("dispatch and combine of one layer, ms", rows, columns)


def comparable(result: dict[str, Any]) -> dict[str, Figure]:
    """Return the figures that runs are compared by; a bare call is Ray's own speed."""
    figures: dict[str, Figure] = {}
    for case, by_name in result["figures"].items():
        figures[f"{case}, bare call p50 ms"] = Figure(by_name["bare_call"]["p50_ms"], "context")
        for kind in TRANSPORTS:
            figures |= latency_figures(f"{case}, {kind}", by_name[kind])
    return figures


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=500)
    output_options(parser)
    options = parser.parse_args()
    become_a_router()
    torch.set_num_threads(1)  # as a router has it
    ray.init(address="local", include_dashboard=False, logging_level="warning", namespace="serve")
    result: dict[str, Any] = {"benchmark": "dispatch", "machine": machine(), "figures": {}}
    cases = [(size, n) for size in SIZES_BYTES for n in (1, 4)]
    with progress("dispatch", len(cases)) as begin:
        for size, n in cases:
            case = f"{size // 1024} KB, {n} actors"
            begin(case)
            result["figures"][case] = measure(n, size, options.calls)
    ray.shutdown()
    report(result)
    return finish(result, comparable(result), options)


if __name__ == "__main__":
    sys.exit(main())
