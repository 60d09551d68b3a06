"""Decode speed of one router's engine and its actors against one process, in one run.

    python -m benchmarks.decode [--json FILE] [--compare OLD.json] [--actors N]
        [--transport auto|ray|stream ...] [--trace FILE.json]

Makes a random bf16 Mixtral checkpoint and generates greedily, 32 streams and one: with one-process
transformers on all cores (``grouped_mm`` experts, and ``eager`` ones, which are faster on
processors without bf16 instructions; with vLLM too where it is installed), then with a router's
engine on one thread and its expert actors, without Serve and gateway (``benchmarks.serve`` has
those). Ratios are what to keep: absolute figures move with the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import baseline, engine
from benchmarks.common import (
    SIZES,
    Figure,
    finish,
    latency_figures,
    machine,
    make_checkpoint,
    output_options,
    progress,
    show,
    show_memory,
)

STREAMS = ("32", "1")
TRANSPORTS = ("auto", "ray", "stream")


def run(
    tokens: int, rounds: int, actors: int, transports: Sequence[str], trace: Path | None
) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes."""
    kinds = baseline.kinds()
    result: dict[str, Any] = {
        "benchmark": "decode",
        "machine": machine(),
        "sizes": SIZES,
        "tokens": tokens,
        "actors": actors,
        "one_process": {kind: {} for kind in kinds},
        "cluster": {},
    }
    total = 1 + len(kinds) * len(STREAMS) + len(transports) + (trace is not None)
    with tempfile.TemporaryDirectory() as name, progress("decode", total) as begin:
        folder = Path(name)
        begin("checkpoint")
        make_checkpoint(folder)
        for kind in kinds:
            for n in STREAMS:
                begin(f"one process, {kind}, {n} streams")
                measured = baseline.measure(folder, kind, int(n), tokens, rounds)
                result["one_process"][kind][n] = measured
        for transport in transports:
            begin(f"cluster, {transport}")
            result["cluster"][transport] = engine.measure(
                folder, transport, actors, STREAMS, tokens, rounds
            )
        if trace is not None:
            begin("trace")
            engine.measure(folder, transports[0], actors, STREAMS[:1], tokens, 1, trace)
    result["ratio"] = ratios(result)
    result["same_tokens"] = same_tokens(result["cluster"])
    return result


def ratios(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cluster's speed over each one-process speed: by transport, kind, streams."""
    return {
        transport: {
            kind: {
                n: measured["streams"][n]["tokens_per_s"] / by_n[n]["tokens_per_s"] for n in by_n
            }
            for kind, by_n in result["one_process"].items()
        }
        for transport, measured in result["cluster"].items()
    }


def same_tokens(cluster: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return how many streams have the tokens of the first transport: by transport, streams."""
    first = next(iter(cluster.values()))["streams"]
    return {
        transport: {
            n: sum(a == b for a, b in zip(one["tokens"], first[n]["tokens"], strict=True))
            for n, one in measured["streams"].items()
        }
        for transport, measured in cluster.items()
    }


def comparable(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures that runs are compared by; the one-process speeds are context."""
    figures: dict[str, Figure] = {}
    for kind, by_n in result["one_process"].items():
        for n, measured in by_n.items():
            name = f"one process {kind}, {n} streams, tokens/s"
            figures[name] = Figure(measured["tokens_per_s"], "context")
    for transport, measured in result["cluster"].items():
        for n, one in measured["streams"].items():
            case = f"{transport}, {n} streams"
            figures[f"{case}, tokens/s"] = Figure(one["tokens_per_s"], "higher")
            for kind, by_n in result["ratio"][transport].items():
                figures[f"{case}, ratio to {kind}"] = Figure(by_n[n], "higher")
            figures[f"{case}, decode step p50 ms"] = Figure(one["step"]["p50_ms"], "lower")
            figures |= latency_figures(f"{case}, layer", one["layer"])
        for process, memory in measured["memory"].items():
            figures[f"{transport}, {process} MB"] = Figure(memory["rss_mb"], "lower")
    return figures


def report(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    rows: list[tuple[str, ...]] = [
        (f"{n} streams, {kind}", f"{measured['tokens_per_s']:.0f}", f"{measured['rss_mb']:.0f}")
        for kind, by_n in result["one_process"].items()
        for n, measured in by_n.items()
    ]
    show("one process, all cores", rows, ["", "tok/s", "resident MB"])
    kinds = list(result["one_process"])
    rows = []
    for transport, measured in result["cluster"].items():
        for n, one in measured["streams"].items():
            calls = ", ".join(f"{kind} {count}" for kind, count in sorted(one["calls"].items()))
            rows.append(
                (
                    f"{n} streams, {transport}",
                    f"{one['tokens_per_s']:.0f}",
                    *(f"{result['ratio'][transport][kind][n]:.2f}" for kind in kinds),
                    f"{one['step']['p50_ms']:.2f}",
                    f"{one['layer']['p50_ms']:.2f}",
                    f"{one['layer']['p99_ms']:.2f}",
                    calls,
                    f"{result['same_tokens'][transport][n]}/{n}",
                )
            )
    columns = ["", "tok/s", *(f"/ {kind}" for kind in kinds)]
    columns += ["step p50 ms", "layer p50", "p99", "calls", "same tokens"]
    show(f"router's engine and {result['actors']} actors", rows, columns)
    show_memory(
        {
            f"{process}, {transport}": memory
            for transport, measured in result["cluster"].items()
            for process, memory in measured["memory"].items()
        }
    )


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--transport", nargs="+", choices=TRANSPORTS, default=["auto"])
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.json",
        help="write a Chrome trace of one more round, of 32 streams, and a picture FILE.svg",
    )
    output_options(parser)
    options = parser.parse_args()
    transports = list(dict.fromkeys(options.transport))
    result = run(options.tokens, options.rounds, options.actors, transports, options.trace)
    report(result)
    return finish(result, comparable(result), options)


if __name__ == "__main__":
    sys.exit(main())
