"""One router's engine over real expert actors on Ray, without Serve and gateway.

Runs in a process of its own, which :func:`measure` starts with the environment that the product
gives a router replica: threads obey it only when it is there before torch is imported.

``benchmarks.pair_side`` runs this module of other commits too: ``measure``, ``run_module``,
``main`` and ``Bench.round`` keep their names and arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.baseline import run_module
from benchmarks.common import (
    CACHE_TOKENS,
    MODEL,
    PROMPT_TOKENS,
    begin_peak,
    cache_mb,
    dense_mb,
    expert_mb,
    memory_of,
    peak_mb,
    prompts,
    resident_mb,
    summary_ms,
)

APP = "bench-decode"
EPOCH, GENERATION = 1, 1
TIMEOUT_S = 120.0


def measure(
    folder: Path,
    transport: str,
    actors: int,
    streams: Sequence[str],
    tokens: int,
    rounds: int,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Generate in a fresh process; see :func:`run` for what comes back."""
    from cluster.environment import router_environment
    from router.config import RouterConfig

    arguments = [str(folder), transport, str(actors), str(tokens), str(rounds), *streams]
    if trace is not None:
        arguments += ["--trace", str(trace)]
    environment = {**router_environment(RouterConfig().threads), "RAY_ADDRESS": "local"}
    return run_module("benchmarks.engine", arguments, environment)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, or with ``--trace`` trace one round, in this process.

    Returns the figures of each number of streams, the memory of router and actors at the end, and
    what loading took of each actor.
    """
    import ray

    ray.init(address="local", include_dashboard=False, logging_level="warning", namespace="serve")
    try:
        bench = Bench(options.folder, options.transport, options.actors, options.trace is not None)
        try:
            if options.trace is not None:
                bench.trace(int(options.streams[0]), options.tokens, options.trace)
                return {}
            result: dict[str, Any] = {
                "streams": {
                    n: bench.measure(int(n), options.tokens, options.rounds)
                    for n in options.streams
                }
            }
            return {**result, "memory": bench.memory(), "loading": bench.loading}
        finally:
            bench.close()
    finally:
        ray.shutdown()


class Collector:
    """Takes what the engine emits, and wakes who waits when every stream has ended."""

    def __init__(self) -> None:
        """Wait for nothing yet."""
        self._ended = threading.Event()
        self._open: set[str] = set()
        self._error: Exception | None = None
        self.tokens: dict[str, list[int]] = {}

    def expect(self, request_ids: Sequence[str]) -> None:
        """Begin a round of these requests."""
        self.tokens = {request_id: [] for request_id in request_ids}
        self._open = set(request_ids)
        self._ended.clear()

    def __call__(self, emissions: Sequence[Any]) -> None:
        """Take a step's emissions, on the engine's thread."""
        for emission in emissions:
            if isinstance(emission.outcome, Exception):
                self._error = emission.outcome
                self._ended.set()
                return
            self.tokens[emission.request_id] += emission.outcome.token_ids
            if emission.outcome.finish_reason is not None:
                self._open.discard(emission.request_id)
        if not self._open:
            self._ended.set()

    def wait(self) -> None:
        """Wait for the round's end; raises what a request was answered with."""
        ended = self._ended.wait(TIMEOUT_S)
        if self._error is not None:
            raise self._error
        if not ended:
            raise TimeoutError(f"the streams did not end within {TIMEOUT_S} s")


class Bench:
    """An engine and its actors; with ``traced`` both record what they do."""

    def __init__(self, folder: Path, transport: str, actors: int, traced: bool) -> None:
        """Start the actors, load their experts, and start the engine with the product's limits."""
        import torch

        from benchmarks.tracing import Recorder, TracingLayers, TracingTransport
        from cluster.transport.open import open_transport
        from experts.checkpoint.checkpoint import open_checkpoint
        from router.config import ExpertsConfig, RouterConfig
        from router.engine.engine import Engine
        from router.engine.scheduler import Limits, Scheduler
        from router.model.model import MoEModel
        from router.moe.combine import WeightedSums
        from router.moe.dispatch import Dispatcher
        from router.moe.layer import MoELayers

        config, experts = RouterConfig(), ExpertsConfig()
        torch.set_num_threads(config.threads)
        checkpoint = open_checkpoint(folder)
        self._folder = folder
        self._cached_tokens = 0
        view, self._handles, self.loading = start_actors(folder, checkpoint.shape, actors, traced)
        self._transport: Any = open_transport(APP, transport)  # type: ignore[arg-type]
        self._recorder = recorder = Recorder()
        carrier = TracingTransport(self._transport, recorder) if traced else self._transport
        dispatcher = Dispatcher(MODEL, view, carrier, _ignore, experts.call_timeout_s)
        plain = MoELayers(dispatcher, WeightedSums())
        layers = TracingLayers(dispatcher, recorder) if traced else plain
        steps = self._steps = Steps()
        all_there = self._all_there = threading.Event()

        class HeldScheduler(Scheduler):
            """Takes no request of a round before all are there, so that rounds have one course."""

            def add(self, request: Any) -> Any:
                all_there.wait(TIMEOUT_S)
                return super().add(request)

        class TimedEngine(Engine):
            """Notes what each step took, and its layers."""

            def step(self, work: Any, trace: Any = None) -> None:
                self.tally.latest_layers_s.clear()
                started_s = time.perf_counter()
                if traced:
                    recorder.step(lambda: super(TimedEngine, self).step(work, trace))
                else:
                    super().step(work, trace)
                took_s = time.perf_counter() - started_s
                if all(item.end - item.start == 1 for item in work):
                    steps.decode_s.append(took_s)
                    steps.layer_s.extend(self.tally.latest_layers_s)
                else:
                    steps.prefill_s.append(took_s)

        model = MoEModel(checkpoint, torch.bfloat16, CACHE_TOKENS, layers)
        limits = Limits(config.max_batch_size, config.max_batch_tokens, config.max_queue_requests)
        self._collector = Collector()
        self._engine = TimedEngine(
            model,
            layers,
            HeldScheduler(limits, model.num_pages, model.attention.page_size),
            frozenset(),
            self._collector,
        )
        self._engine.start()

    def round(self, streams: int, tokens: int) -> float:
        """Generate for all streams at once; returns the seconds that it took."""
        import ray

        from router.messages.request import GenerationRequest, SamplingParams

        # Without a controller nobody else renews their leases.
        ray.get([h.heartbeat.remote(EPOCH) for h in self._handles.values()], timeout=TIMEOUT_S)
        self._cached_tokens = max(self._cached_tokens, streams * (PROMPT_TOKENS + tokens))
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        requests = [
            GenerationRequest(str(i), MODEL, tuple(ids), sampling, time.monotonic() + TIMEOUT_S)
            for i, ids in enumerate(prompts(streams))
        ]
        self._collector.expect([request.request_id for request in requests])
        self._all_there.clear()
        started_s = time.perf_counter()
        for request in requests:
            self._engine.submit(request)
        self._all_there.set()
        self._collector.wait()
        return time.perf_counter() - started_s

    def measure(self, streams: int, tokens: int, rounds: int) -> dict[str, Any]:
        """Return median tokens per second, times of decode steps and layers, calls, and tokens."""
        for _ in range(2):  # connections come in the background
            self.round(streams, tokens)
        self._steps.clear()
        before = Counter(self._transport.calls)
        rates = [streams * tokens / self.round(streams, tokens) for _ in range(rounds)]
        return {
            "tokens_per_s": statistics.median(rates),
            "step": summary_ms(self._steps.decode_s),
            "prefill": summary_ms(self._steps.prefill_s),
            "layer": summary_ms(self._steps.layer_s),
            "calls": dict(Counter(self._transport.calls) - before),
            "tokens": list(self._collector.tokens.values()),
        }

    def trace(self, streams: int, tokens: int, file: Path) -> None:
        """Write the trace of one round to ``file``, and beside it the picture of some layers."""
        import ray

        from benchmarks.timeline import ROUTER, Span, chrome_trace, clip, svg, typical_window

        for _ in range(2):
            self.round(streams, tokens)
        self._recorder.spans.clear()
        self.round(streams, tokens)
        recorded = {ROUTER: list(self._recorder.spans)}
        for actor_id, handle in self._handles.items():
            recorded[actor_id] = ray.get(handle.recorded.remote(), timeout=TIMEOUT_S)
        spans = [Span(process, *one) for process, some in recorded.items() for one in some]
        started_s = min(s.start_s for s in spans if s.process == ROUTER)
        ended_s = max(s.end_s for s in spans if s.process == ROUTER)
        spans = clip(spans, started_s, ended_s)
        file.write_text(json.dumps(chrome_trace(spans)) + "\n", encoding="utf-8")
        picture = svg(spans, *typical_window(spans))
        file.with_suffix(".svg").write_text(picture, encoding="utf-8")

    def memory(self) -> dict[str, dict[str, float]]:
        """Return the memory of this process (it is Ray's driver too) and of the actors."""
        import ray

        held_mb = dense_mb(self._folder) + cache_mb(self._cached_tokens)
        memory = {"router": memory_of(os.getpid(), held_mb)}
        for actor_id, handle in self._handles.items():
            report = ray.get(handle.describe.remote(), timeout=TIMEOUT_S)
            memory[actor_id] = memory_of(report.pid, expert_mb(len(report.experts)))
        return memory

    def close(self) -> None:
        """End engine, connections and actors."""
        import ray

        self._engine.close()
        self._transport.close()
        for handle in self._handles.values():
            ray.kill(handle)


class Steps:
    """Times of steps that only decode, of those that prefill, and of the former's layers."""

    def __init__(self) -> None:
        """Start empty."""
        self.decode_s: list[float] = []
        self.prefill_s: list[float] = []
        self.layer_s: list[float] = []

    def clear(self) -> None:
        """Forget all."""
        for times_s in (self.decode_s, self.prefill_s, self.layer_s):
            times_s.clear()


def _ignore(actor_id: str, generation: int) -> None:
    """Nobody is told of a suspicion here: a call that fails is tried again."""


def start_actors(
    folder: Path, shape: Any, count: int, traced: bool
) -> tuple[Any, dict[str, Any], dict[str, dict[str, float]]]:
    """Start expert actors as the product does, and have all of them load at the same time.

    Returns the placement's view, the handles, and of each actor how long it loaded, the weights
    that it then held, what was resident at the peak for them, and what the first expert brought
    along besides itself: code, and oneDNN's trial of ways to compute
    (:func:`experts.compute.ffn.ffn_of`).
    """
    import ray

    from benchmarks.tracing import TracingActor
    from cluster.controller.pool import CONTROL_CALLS, actor_options
    from cluster.placement.placement import assign_experts, empty_placement
    from cluster.spec import ActorSpec, ModelExperts, ModelSource, actor_name
    from experts.checkpoint.checkpoint import open_checkpoint
    from experts.checkpoint.identity import identity_of
    from experts.remote import RemoteExpertActor
    from router.config import ExpertsConfig
    from router.control.placement_view import PlacementView

    config = ExpertsConfig()
    experts = ModelExperts(MODEL, shape.layers, shape.num_experts, 1)
    identity = identity_of(open_checkpoint(folder))
    sources = (ModelSource(str(folder), "bfloat16", experts, identity),)
    spec = ActorSpec(APP, sources, config.num_cpus, 0, config.threads, config.max_queue_rows)
    actor_class = TracingActor if traced else RemoteExpertActor
    remote = ray.remote(concurrency_groups={"control": CONTROL_CALLS})(actor_class)
    placement = empty_placement(EPOCH, [experts])
    handles: dict[str, Any] = {}
    shares = assign_experts([experts], [f"actor-{i}" for i in range(count)], None)
    for actor_id in shares:
        options = actor_options(spec, actor_name(APP, actor_id, GENERATION))
        handles[actor_id] = remote.options(**options).remote(spec, actor_id, GENERATION, EPOCH)
    reports = ray.get([h.describe.remote() for h in handles.values()], timeout=TIMEOUT_S)
    before_mb = {report.actor_id: resident_mb(report.pid) for report in reports}
    started_s = time.perf_counter()
    firsts = [handle.load.remote(EPOCH, spec, shares[a][:1]) for a, handle in handles.items()]
    code_mb = {}
    for report in ray.get(firsts, timeout=TIMEOUT_S):
        first_mb = begin_peak(report.pid) - report.weight_bytes / 1e6
        code_mb[report.actor_id] = first_mb - before_mb[report.actor_id]
    loads = {handles[a].load.remote(EPOCH, spec, keys): a for a, keys in shares.items()}
    loading: dict[str, dict[str, float]] = {}
    waiting = list(loads)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=TIMEOUT_S)
        if not done:
            raise TimeoutError(f"actors did not load within {TIMEOUT_S} s")
        report, actor_id = ray.get(done[0]), loads[done[0]]
        loading[actor_id] = {
            "load_s": time.perf_counter() - started_s,
            "weights_mb": report.weight_bytes / 1e6,
            "peak_mb": peak_mb(report.pid) - before_mb[actor_id] - code_mb[actor_id],
            "code_mb": code_mb[actor_id],
        }
        placement = placement.with_actor(actor_id, GENERATION, shares[actor_id])
    view = PlacementView()
    view.publish(placement)
    return view, handles, loading


def main() -> None:
    """Measure in this process; prints a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("transport")
    for number in ("actors", "tokens", "rounds"):
        parser.add_argument(number, type=int)
    parser.add_argument("streams", nargs="+")
    parser.add_argument("--trace", type=Path)
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
