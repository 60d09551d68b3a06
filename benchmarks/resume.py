"""The time until requests that go on after a failure have all had their first new token.

    python -m benchmarks.resume [--rounds 7] [--json FILE]

One router's engine over real expert actors on Ray, as in ``benchmarks.decode``, on a random
checkpoint. Requests bring tokens that their clients have, as after the death of another router. The
engine computes these in chunks, like a prompt's (``at once``), or one to a step (``one to a
step``), as it does where torch computes experts; the two ways come by turns. The exit status is 1
where ``at once`` takes longer.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.baseline import run_module
from benchmarks.common import SIZES, machine, make_checkpoint, progress, show

ACTORS = 2
WAYS = {"at once": frozenset(), "one to a step": frozenset({"torch-as-if"})}
"""The kernel classes of experts by which the engine takes each way."""
LOADS = ((1, 100), (1, 1000), (32, 150))
"""Streams, and the tokens that each has received."""


def measure(folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return each load's seconds by way, in a process with a router's environment."""
    from cluster.environment import router_environment
    from router.config import RouterConfig

    environment = {**router_environment(RouterConfig().threads), "RAY_ADDRESS": "local"}
    arguments = ["--side", str(folder), "--rounds", str(rounds)]
    found: dict[str, dict[str, list[float]]] = run_module(
        "benchmarks.resume", arguments, environment
    )
    return found


def run(folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Measure in this process."""
    import ray

    from benchmarks.engine import Bench

    ray.init(address="local", include_dashboard=False, logging_level="warning", namespace="serve")
    try:
        bench = Bench(folder, "stream", ACTORS, False)
        try:
            return {
                name_of(streams, received): _rounds(bench, streams, received, rounds)
                for streams, received in LOADS
            }
        finally:
            bench.close()
    finally:
        ray.shutdown()


def name_of(streams: int, received: int) -> str:
    """Return the name of a load."""
    return f"{streams} x {received:,}"


def _rounds(bench: Any, streams: int, received: int, rounds: int) -> dict[str, list[float]]:
    from router.messages.request import Received

    source = random.Random(received)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):  # connections come in the background
        drawn = [
            tuple(source.randrange(1, SIZES["vocab_size"]) for _ in range(received))
            for _ in range(streams)
        ]
        bench.more = [{"received": (Received(ids),)} for ids in drawn]
        for way, classes in WAYS.items():
            bench.actors.view.expert_classes = classes
            took_s = bench.round(streams, received + 1)
            if number:
                found[way].append(took_s)
    return found


def summary(times_s: dict[str, list[float]]) -> dict[str, float]:
    """Return the medians of the ways, and their ratio."""
    medians_s = {way: statistics.median(own) for way, own in times_s.items()}
    at_once_s, each_s = medians_s.values()
    return {**{f"{way}, s": value for way, value in medians_s.items()}, "ratio": at_once_s / each_s}


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(run(options.side, options.rounds)))
        return 0
    with tempfile.TemporaryDirectory() as scratch, progress("resume", 1) as begin:
        begin("random")
        make_checkpoint(Path(scratch))
        loads = {name: summary(own) for name, own in measure(Path(scratch), options.rounds).items()}
    names = list(next(iter(loads.values())))
    rows = [(name, *[f"{own[key]:.3f}" for key in names]) for name, own in loads.items()]
    title = f"until the last resumed stream's first new token, medians of {options.rounds} rounds"
    show(title, rows, ["streams x tokens that each has", *names])
    if options.json is not None:
        result = {"machine": machine(), "loads": loads}
        options.json.write_text(json.dumps(result, indent=2))
    return int(any(own["ratio"] > 1 for own in loads.values()))


if __name__ == "__main__":
    sys.exit(main())
