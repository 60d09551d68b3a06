"""Requests made from the gateway's OpenAPI document, for as long as is wanted.

    python -m benchmarks.api_fuzz [--minutes 1] [--seed N] [--examples 100] [--json FILE]

schemathesis makes good and bad requests for each route of ``/openapi.json`` and checks the answers:
no error of the server's, statuses, types and bodies as the document has them, bad bodies refused by
the name of a field, streams that come to their end. A tiny model and the mixtures of the tests
answer in this process. The first round has the bounds of each field too; each round has another
seed. The exit status is 1 when an answer was wrong; the request is printed as a command of curl.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import machine, progress, show
from benchmarks.fuzzing import api


def run(minutes: float, seed: int, examples: int) -> dict[str, Any]:
    """Run rounds until the time is over; returns what ``--json`` writes."""
    found, rounds, end_s = api.Found(), 0, time.monotonic() + 60 * minutes
    # One app for all rounds: schemathesis keeps each that it has seen.
    with progress("api_fuzz", None) as begin, api.gateway() as app:
        while time.monotonic() < end_s:
            begin(f"{found.total:,} requests, {len(found.failures)} failures")
            found.add(api.fuzz(app, seed + rounds, examples, has_bounds=rounds == 0))
            rounds += 1
    return {
        "benchmark": "api_fuzz",
        "machine": machine(),
        "minutes": minutes,
        "seed": seed,
        "rounds": rounds,
        "requests": found.total,
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "routes": {
            route: {
                "well": found.count(route, 200, 299),
                "refused": found.count(route, 400, 499),
                "late": found.count(route, 504, 504),
            }
            for route in found.routes
        },
        "failures": found.failures,
    }


def report(result: Mapping[str, Any]) -> None:
    """Print the table, and what was wrong."""
    rows = [
        (route, f"{one['well']:,}", f"{one['refused']:,}", f"{one['late']:,}")
        for route, one in result["routes"].items()
    ]
    title = (
        f"api_fuzz for {result['minutes']:g} minutes, {result['requests']:,} requests in "
        f"{result['rounds']} rounds from seed {result['seed']}, {result['peak_mb']} MB"
    )
    show(title, rows, ["route", "answered", "refused", "own deadline passed"])
    print(f"{len(result['failures'])} failures")
    for told, request in result["failures"].items():
        print(f"{told}\n  {request}")


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--examples", type=int, default=100, help="of each route in a round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    options = parser.parse_args()
    result = run(options.minutes, options.seed, options.examples)
    report(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return bool(result["failures"])


if __name__ == "__main__":
    sys.exit(main())
