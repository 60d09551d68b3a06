"""Decode speed of one model on a device: this project beside one process of transformers.

The router's engine runs in a process of its own, with the environment that the product gives a
router; its actors are Ray's. All of them are on the device. Of the largest model there are also the
memory against the plan.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import baseline, engine
from benchmarks.common import CACHE_TOKENS
from benchmarks.gpu.models import fitted, name_of, room
from benchmarks.gpu.settings import Settings
from benchmarks.synthetic import write_checkpoint

APP = "bench-gpu"
OBJECT_STORE_BYTES = 256 << 20
"""Of the host's shared memory, which may have the checkpoint."""


def run(settings: Settings, number: int, results: Path) -> dict[str, Any]:
    """Measure the model of this number; the folder ``results`` has the settings."""
    config = settings.models[number]
    fit = fitted(config, room(settings.device_bytes))
    with tempfile.TemporaryDirectory(prefix=settings.label, dir=fit.folder) as name:
        folder = Path(name)
        say(f"writing {fit.num_bytes / 1e9:.1f} GB to {fit.folder}")
        write_checkpoint(folder, fit.config)
        say("transformers")
        streams = [int(n) for n in settings.streams]
        measured = baseline.measure(
            folder, streams, settings.tokens, settings.rounds, settings.device
        )
        say("router and actors")
        words = [name, str(results)]
        ours = engine.run_module("benchmarks.gpu.speed", words, engine.router_variables())
    ratios = {
        count: {
            n: one["streams"][n]["tokens_per_s"] / measured[n]["tokens_per_s"]
            for n in settings.streams
        }
        for count, one in ours["actors"].items()
    }
    return {
        "model": name_of(fit.config),
        "config": fit.config,
        "parameters": fit.parameters,
        "size": fit.reason,
        "is_largest": number == len(settings.models) - 1,
        "transformers": measured,
        "ratio": ratios,
        **ours,
    }


def say(what: str) -> None:
    """Print a line of progress."""
    print(what, flush=True)


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Measure the project's part in this process, on a Ray of its own."""
    import ray

    ray.init(
        address="local",
        num_gpus=int(settings.has_device),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        logging_level="warning",
        namespace="serve",
    )
    try:
        return {"actors": {str(n): _with_actors(settings, folder, n) for n in settings.actors}}
    finally:
        ray.shutdown()


def _with_actors(settings: Settings, folder: Path, count: int) -> dict[str, Any]:
    """Measure the engine with so many actors: its streams, and the memory on the device."""
    import torch

    from benchmarks.engine import Bench
    from benchmarks.gpu.memory import MeasuredActor, compared, most_bytes, planned
    from cluster.device import device_of

    device = device_of(settings.device, 0, "--device")
    before_bytes = 0
    if settings.has_device:
        torch.empty(1, device=device)  # else torch counts nothing yet, and has no peak to forget
        torch.accelerator.reset_peak_memory_stats()
        before_bytes = torch.accelerator.memory_allocated()
    bench = Bench(
        folder,
        "auto",
        count,
        app=f"{APP}-{count}",
        device=device,
        actor_class=MeasuredActor,
        actor_gpus=settings.actor_gpus(count),
    )
    try:
        streams = {
            n: bench.measure(int(n), settings.tokens, settings.rounds) for n in settings.streams
        }
        classes = bench.actors.call("kernel_classes").values()
        ways = {
            "attention": bench.attention,
            "kernel_classes": sorted({name for names in classes for name in names}),
        }
        if not settings.has_device:
            return {"streams": streams, "memory": {}, **ways}
        allocated, reserved = most_bytes()
        measured = {"router": (allocated - before_bytes, reserved)}
        measured |= bench.actors.call("device_bytes")
        memory = compared(planned(folder, count, CACHE_TOKENS), measured)
        return {"streams": streams, "memory": memory, **ways}
    finally:
        bench.close()
        del bench
        gc.collect()  # the router's memory on the device goes with it


def main() -> None:
    """Measure in this process; prints a line of JSON."""
    folder, results = map(Path, sys.argv[1:])
    print(json.dumps(measure(Settings.load(results), folder)))


if __name__ == "__main__":
    main()
