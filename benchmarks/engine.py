"""One router's engine over real expert actors on Ray, without Serve and gateway.

Runs in a process of its own, which :func:`measure` starts with the environment that the product
gives a router replica: threads obey it only when it is there before torch is imported.

``benchmarks.pair_side`` runs this module of other commits too: ``measure``, ``run_module``,
``main`` and ``Bench.round`` keep their names and arguments.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks.actors import TIMEOUT_S, start_actors
from benchmarks.common import (
    MODEL,
    SIZES,
    Sizes,
    dense_mb,
    expert_mb,
    long_prompt,
    mapped_mb,
    memory_of,
    prompts,
    summary_ms,
)
from benchmarks.processor_time import per_token

if TYPE_CHECKING:
    import torch

APP = "bench-decode"
MODULE_TIMEOUT_S = 600.0


def measure(
    folder: Path,
    transport: str,
    actors: int,
    streams: Sequence[str],
    tokens: int,
    rounds: int,
    *,
    sizes: Sizes = SIZES,
    dtype: str = "bfloat16",
    prefill: Sequence[int] = (),
) -> dict[str, Any]:
    """Generate in a fresh process; see :func:`run` for what comes back.

    ``sizes`` are those of the checkpoint. ``prefill`` has lengths of prompts.
    """
    options = {
        "folder": str(folder),
        "transport": transport,
        "actors": actors,
        "streams": list(streams),
        "tokens": tokens,
        "rounds": rounds,
        "sizes": dict(sizes),
        "dtype": dtype,
        "prefill": list(prefill),
    }
    return run_module("benchmarks.engine", [json.dumps(options)], router_variables())


def router_variables() -> dict[str, str]:
    """Return the environment that the product gives a router replica, with a Ray of its own."""
    from cluster.environment import router_environment
    from router.config.deployment import RouterConfig

    return {**router_environment(RouterConfig().threads), "RAY_ADDRESS": "local"}


def run_module(module: str, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a benchmark's module in a process; returns the JSON of the last line it prints.

    Raises ``RuntimeError`` with the end of its stderr when it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=MODULE_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run(options: SimpleNamespace) -> dict[str, Any]:
    """Measure in this process.

    Returns the figures of each number of streams, the memory of router and actors after them, the
    prefills' durations by length.
    """
    import ray
    import torch

    ray.init(address="local", include_dashboard=False, logging_level="warning", namespace="serve")
    try:
        bench = Bench(
            Path(options.folder),
            options.transport,
            options.actors,
            sizes=options.sizes,
            dtype=getattr(torch, options.dtype),
        )
        try:
            result: dict[str, Any] = {
                "streams": {
                    n: bench.measure(int(n), options.tokens, options.rounds)
                    for n in options.streams
                }
            }
            result["memory"] = bench.memory()
            result["prefill_s"] = {
                str(length): bench.prefill(length, options.rounds) for length in options.prefill
            }
            return result
        finally:
            bench.close()
    finally:
        ray.shutdown()


class Bench:
    """An engine and its actors."""

    def __init__(
        self,
        folder: Path,
        transport: str,
        actors: int,
        *,
        app: str = APP,
        device: torch.device | None = None,
        actor_class: type | None = None,
        actor_gpus: float = 0.0,
        sizes: Sizes = SIZES,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Start the actors, load their experts, and start the engine with the product's limits.

        The router's part computes on ``device``, by default the CPU. Each actor has ``actor_gpus``
        of a GPU. ``actor_class`` takes the place of the product's. ``sizes`` are the checkpoint's;
        ``dtype`` is by default bf16.
        """
        import torch

        from benchmarks import timed_engine
        from cluster.transport.open import open_transport
        from experts.checkpoint.checkpoint import open_checkpoint
        from experts.remote import RemoteExpertActor
        from router.config.deployment import RouterConfig

        torch.set_num_threads(RouterConfig().threads)
        checkpoint = open_checkpoint(folder)
        self._folder = folder
        self._sizes = sizes
        self._dtype = dtype = dtype or torch.bfloat16
        actor_class = actor_class or RemoteExpertActor
        stored = str(dtype).removeprefix("torch.")
        self.actors = start_actors(
            folder, checkpoint.shape, actors, actor_class, app, actor_gpus, stored
        )
        self._transport: Any = open_transport(app, transport)  # type: ignore[arg-type]
        layers = timed_engine.layers_of(self.actors.view, self._transport)
        where = device or torch.device("cpu")
        self._model = timed_engine.model_of(checkpoint, dtype, layers, where)
        self._scheduler = timed_engine.scheduler_of(self._model, layers)
        self._collector = timed_engine.Collector()
        self._engine = timed_engine.TimedEngine(
            self._model, layers, self._scheduler, self._collector
        )
        self._engine.start()

    @property
    def attention(self) -> str:
        """The name of the router's attention."""
        return self._model.attention.name

    def round(self, streams: int, tokens: int) -> float:
        """Generate for all streams at once; returns the seconds that it took."""
        return self._generate(prompts(streams, self._sizes["vocab_size"]), tokens)

    def prefill(self, length: int, rounds: int) -> list[float]:
        """Return each round's seconds from a prompt of ``length`` tokens to its first new token."""
        prompt = long_prompt(length, self._sizes["vocab_size"])
        return [self._generate([prompt], 1, f"{length}/{i}") for i in range(rounds + 1)][1:]

    def _generate(self, given: Sequence[Sequence[int]], tokens: int, salt: str = "") -> float:
        """Generate for all prompts at once; the cache has only those of the same ``salt``."""
        from router.messages.request import GenerationRequest, SamplingParams

        self.actors.renew()
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        requests = [
            GenerationRequest(
                str(i),
                MODEL,
                tuple(ids),
                sampling,
                time.monotonic() + TIMEOUT_S,
                cache_salt=salt,
            )
            for i, ids in enumerate(given)
        ]
        self._collector.expect([request.request_id for request in requests])
        self._scheduler.all_there.clear()
        started_s = time.perf_counter()
        for request in requests:
            self._engine.submit(request)
        self._scheduler.all_there.set()
        self._collector.wait()
        return time.perf_counter() - started_s

    def measure(self, streams: int, tokens: int, rounds: int) -> dict[str, Any]:
        """Return median tokens per second, times of decode steps and layers, calls, and tokens."""
        for _ in range(2):  # connections come in the background
            self.round(streams, tokens)
        steps = self._engine.begin_steps()
        before = Counter(self._transport.calls)
        with per_token(streams * tokens * rounds, "router") as processor_us:
            rates = [streams * tokens / self.round(streams, tokens) for _ in range(rounds)]
        return {
            "tokens_per_s": statistics.median(rates),
            "rates": rates,
            "processor_us": processor_us,
            "step": summary_ms(steps.decode_s),
            "prefill": summary_ms(steps.prefill_s),
            "layer": summary_ms(steps.layer_s),
            "calls": dict(Counter(self._transport.calls) - before),
            "tokens": list(self._collector.tokens.values()),
        }

    def memory(self) -> dict[str, dict[str, float]]:
        """Return the memory of this process (it is Ray's driver too) and of the actors."""
        value_bytes = self._dtype.itemsize
        held_mb = dense_mb(self._folder, self._sizes, value_bytes)
        # Pages stay in the cache for prompts that begin alike; the next round takes others.
        cache = self._model.decoder._cache
        held_mb += sum(mapped_mb(tensor) for tensor in (*cache.keys, *cache.values))
        memory = {"router": memory_of(os.getpid(), held_mb)}
        for actor_id, report in self.actors.call("describe").items():
            experts_mb = expert_mb(len(report.experts), self._sizes, value_bytes)
            memory[actor_id] = memory_of(report.pid, experts_mb)
        return memory

    def close(self) -> None:
        """End engine, connections and actors."""
        self._engine.close()
        self._transport.close()
        self.actors.kill()


def main() -> None:
    """Measure with the options of the command line, as :func:`measure` gives them; prints JSON."""
    print(json.dumps(run(SimpleNamespace(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
