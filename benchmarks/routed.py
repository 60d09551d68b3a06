"""What the experts of tokens cost: asked for, and forced, beside requests without them.

    python -m benchmarks.routed [--streams 32] [--tokens 64] [--rounds 7] [--json FILE]

One router's engine over real expert actors on Ray, as in ``benchmarks.decode``, on a random
checkpoint. ``plain`` requests ask for nothing, ``asked`` ones for the experts of each token, and
``forced`` ones name drawn experts for all tokens. The three come by turns. The exit status is 1
where a decode step of ``asked`` takes more than :data:`MOST_RATIO` of one of ``plain``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.baseline import run_module
from benchmarks.common import MODEL, SIZES, machine, make_checkpoint, progress, prompts, show

ACTORS = 2
MOST_RATIO = 1.1
WAYS = ("plain", "asked", "forced")


def measure(folder: Path, streams: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Return each way's medians of decode steps in ms, in a process with a router's environment."""
    from cluster.environment import router_environment
    from router.config import RouterConfig

    environment = {**router_environment(RouterConfig().threads), "RAY_ADDRESS": "local"}
    arguments = ["--side", str(folder), "--streams", str(streams)]
    arguments += ["--tokens", str(tokens), "--rounds", str(rounds)]
    found: dict[str, list[float]] = run_module("benchmarks.routed", arguments, environment)
    return found


def run(folder: Path, streams: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Measure in this process."""
    import ray

    from benchmarks.engine import Bench

    ray.init(address="local", include_dashboard=False, logging_level="warning", namespace="serve")
    try:
        bench = Bench(folder, "stream", ACTORS, False)
        try:
            ways = _ways(folder, streams, tokens)
            found: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way in WAYS:
                    bench.more = [{"routed": asked} for asked in ways[way]]
                    found[way].append(bench.measure(streams, tokens, 1)["step"]["p50_ms"])
            return found
        finally:
            bench.close()
    finally:
        ray.shutdown()


def _ways(folder: Path, streams: int, tokens: int) -> dict[str, Sequence[Any]]:
    """Return what the requests of each way ask of their tokens' experts, by stream."""
    import numpy as np

    from experts.checkpoint.checkpoint import open_checkpoint
    from router.messages.routed import LITTLE_ENDIAN, RoutedExperts, dtype_of

    shape = open_checkpoint(folder).shape
    asked = len(shape.layers), shape.num_experts_per_tok
    dtype = dtype_of(shape.num_experts)
    longest = max(map(len, prompts(streams, SIZES["vocab_size"])))
    sizes = longest + tokens, len(shape.layers), shape.num_experts
    forced = []
    for seed in range(streams):
        drawn = np.random.default_rng(seed).random(sizes).argsort(axis=2)[:, :, : asked[1]]
        rows = drawn.astype(LITTLE_ENDIAN[dtype]).tobytes()
        forced.append(RoutedExperts(asked, shape.num_experts, False, rows))
    return {
        "plain": (),
        "asked": [RoutedExperts(asked, shape.num_experts, True)] * streams,
        "forced": forced,
    }


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = options.streams, options.tokens, options.rounds
    if options.side is not None:
        print(json.dumps(run(options.side, *sizes)))
        return 0
    with tempfile.TemporaryDirectory() as scratch, progress("routed", 1) as begin:
        begin(MODEL)
        make_checkpoint(Path(scratch))
        steps_ms = measure(Path(scratch), *sizes)
    medians = {way: statistics.median(own) for way, own in steps_ms.items()}
    rows = [(way, f"{ms:.2f}", f"{ms / medians['plain']:.3f}") for way, ms in medians.items()]
    title = f"{options.streams} streams of {options.tokens} tokens, medians of {options.rounds}"
    show(title, rows, ["requests", "decode step, ms", "/ plain"])
    if options.json is not None:
        result = {"machine": machine(), "streams": options.streams, "steps_ms": steps_ms}
        options.json.write_text(json.dumps(result, indent=2))
    return int(medians["asked"] > MOST_RATIO * medians["plain"])


if __name__ == "__main__":
    sys.exit(main())
