"""The time to the first token after a prefix that a router has computed before.

    python -m benchmarks.prefix [--tokens 512] [--rounds 15] [--json FILE]

One router's engine over real expert actors on Ray, as in ``benchmarks.decode``, on the bundled
model and on a random checkpoint. A ``cold`` prompt is a new prefix and a token more, a ``hot`` one
the same prefix and another token. ``whole`` is the prefix alone, whose last page is computed again,
since a prompt's last logits are wanted. The three come by turns. The exit status is 1 where a hot
prompt takes more than :data:`MOST_RATIO` of a cold one.
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
BUNDLED = Path(__file__).resolve().parents[1] / "deploy/models/mesh-tiny"
MOST_RATIO = 0.2
WAYS = ("cold", "hot", "whole")


def measure(folder: Path, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Return each way's seconds to the first token, in a process with a router's environment."""
    from cluster.environment import router_environment
    from router.config import RouterConfig

    environment = {**router_environment(RouterConfig().threads), "RAY_ADDRESS": "local"}
    arguments = ["--side", str(folder), "--tokens", str(tokens), "--rounds", str(rounds)]
    found: dict[str, list[float]] = run_module("benchmarks.prefix", arguments, environment)
    return found


def run(folder: Path, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Measure in this process."""
    import ray

    from benchmarks.engine import Bench
    from experts.checkpoint.checkpoint import open_checkpoint

    ray.init(address="local", include_dashboard=False, logging_level="warning", namespace="serve")
    try:
        sizes = {**SIZES, "vocab_size": open_checkpoint(folder).vocab_size}
        bench = Bench(folder, "stream", ACTORS, False, sizes=sizes)
        try:
            return _rounds(bench, sizes["vocab_size"], tokens, rounds)
        finally:
            bench.close()
    finally:
        ray.shutdown()


def _rounds(bench: Any, vocab_size: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    source = random.Random(tokens)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 2):  # connections come in the background
        prefix = [source.randrange(1, vocab_size) for _ in range(tokens)]
        for way, ids in zip(WAYS, ([*prefix, 1], [*prefix, 2], prefix), strict=True):
            took_s = bench.first_token_s(ids)
            if number >= 2:
                found[way].append(took_s)
    return found


def summary(times_s: dict[str, list[float]]) -> dict[str, float]:
    """Return the medians of the ways in ms, and their ratios to the cold one."""
    medians_ms = {way: 1e3 * statistics.median(own) for way, own in times_s.items()}
    ratios = {f"{way} / cold": medians_ms[way] / medians_ms["cold"] for way in WAYS[1:]}
    return {**{f"{way}, ms": value for way, value in medians_ms.items()}, **ratios}


def _measured(tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    results = {}
    with tempfile.TemporaryDirectory() as scratch, progress("prefix", 2) as begin:
        for name, folder in (("mesh-tiny", BUNDLED), ("random", Path(scratch))):
            begin(name)
            if folder != BUNDLED:
                make_checkpoint(folder)
            results[name] = summary(measure(folder, tokens, rounds))
    return results


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a prefix")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(run(options.side, options.tokens, options.rounds)))
        return 0
    results = _measured(options.tokens, options.rounds)
    result = {"machine": machine(), "tokens": options.tokens, "models": results}
    names = list(results["random"])
    rows = [
        (name, *[f"{own[key]:.3f}" if "/" in key else f"{own[key]:.1f}" for key in names])
        for name, own in results.items()
    ]
    title = f"first token after {options.tokens}, medians of {options.rounds} rounds"
    show(title, rows, ["model", *names])
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2))
    return int(any(own["hot / cold"] > MOST_RATIO for own in results.values()))


if __name__ == "__main__":
    sys.exit(main())
