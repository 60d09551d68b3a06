"""Load time, peak memory of each actor and tokens per second, by family.

    python -m benchmarks.load [--families NAME ...] [--actors N] [--streams N] [--rounds N]
        [--json FILE] [--compare OLD.json]

Makes a random bf16 checkpoint of each family (:mod:`benchmarks.families`; shapes and sizes are
alike), loads it in expert actors at the same time, then generates through them with a router's
engine, as ``benchmarks.decode`` does. The checkpoint has just been written, so it is read from the
system's file cache and not from a disk. The exit status is 1 when an actor took more memory at its
peak than ``MAX_PEAK_RATIO`` times its share.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import engine
from benchmarks.common import SIZES, Figure, finish, machine, output_options, progress, show
from benchmarks.families import CONFIGS, make_family

MAX_PEAK_RATIO = 1.2
"""What an actor may take at its peak, in shares of its own."""


def run(
    families: Sequence[str], actors: int, streams: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes."""
    result: dict[str, Any] = {
        "benchmark": "load",
        "machine": machine(),
        "sizes": SIZES,
        "tokens": tokens,
        "actors": actors,
        "clients": streams,
        "families": {},
    }
    with progress("load", len(families)) as begin:
        for family in families:
            begin(family)
            with tempfile.TemporaryDirectory() as name:
                whole_bytes = make_family(Path(name), family)
                measured = engine.measure(
                    Path(name), "auto", actors, [str(streams)], tokens, rounds
                )
            result["families"][family] = {
                "checkpoint_mb": whole_bytes / 1e6,
                **summary(measured["loading"]),
                "tokens_per_s": measured["streams"][str(streams)]["tokens_per_s"],
            }
    return result


def summary(loading: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return of all actors' loading: the time of the last, bytes a second, and the worst peak.

    ``peak_ratio`` is the largest peak of an actor in shares of its own; ``code_mb``, what the first
    expert brought along besides itself and any number more does not, is not in it.
    """
    load_s = max(one["load_s"] for one in loading.values())
    return {
        "experts_mb": sum(one["weights_mb"] for one in loading.values()),
        "load_s": load_s,
        "mb_per_s": sum(one["weights_mb"] for one in loading.values()) / load_s,
        "peak_mb": max(one["peak_mb"] for one in loading.values()),
        "share_mb": max(one["weights_mb"] for one in loading.values()),
        "code_mb": max(one["code_mb"] for one in loading.values()),
        "peak_ratio": max(one["peak_mb"] / one["weights_mb"] for one in loading.values()),
    }


def comparable(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures that runs are compared by."""
    figures: dict[str, Figure] = {}
    for family, one in result["families"].items():
        figures[f"{family}, load s"] = Figure(one["load_s"], "lower")
        figures[f"{family}, peak of an actor MB"] = Figure(one["peak_mb"], "lower")
        figures[f"{family}, tokens/s"] = Figure(one["tokens_per_s"], "higher")
    return figures


def missed(result: Mapping[str, Any]) -> list[str]:
    """Return the families of which an actor took more than it may."""
    families = result["families"]
    return [name for name, one in families.items() if one["peak_ratio"] > MAX_PEAK_RATIO]


def report(result: Mapping[str, Any]) -> None:
    """Print the table."""
    rows = [
        (
            family,
            f"{one['checkpoint_mb']:.0f}",
            f"{one['experts_mb']:.0f}",
            f"{one['load_s']:.2f}",
            f"{one['mb_per_s']:.0f}",
            f"{one['code_mb']:.0f}",
            f"{one['share_mb']:.0f}",
            f"{one['peak_mb']:.0f}",
            f"{one['peak_ratio']:.2f}",
            "[red]missed[/red]" if family in missed(result) else "kept",
            f"{one['tokens_per_s']:.0f}",
        )
        for family, one in result["families"].items()
    ]
    columns = [
        "family",
        "checkpoint MB",
        "experts MB",
        "load s",
        "MB/s",
        "code MB",
        "an actor's share MB",
        "its peak MB",
        "peak / share",
        f"≤ {MAX_PEAK_RATIO}",
        f"tok/s, {result['clients']} streams",
    ]
    show(f"loading, {result['actors']} actors at the same time", rows, columns)


def main() -> int:
    """Run the benchmark from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="per stream")
    parser.add_argument("--rounds", type=int, default=3)
    output_options(parser)
    options = parser.parse_args()
    result = run(options.families, options.actors, options.streams, options.tokens, options.rounds)
    report(result)
    slower = finish(result, comparable(result), options)
    return int(slower or bool(missed(result)))


if __name__ == "__main__":
    sys.exit(main())
