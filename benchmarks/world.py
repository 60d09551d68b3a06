"""Random faults and operations against the whole cluster, simulated in one process.

    python -m benchmarks.world [--seeds 0:1000] [--minutes 10] [--processes N]
        [--svg FOLDER] [--json FILE]
    python -m benchmarks.world --replay SEED|FILE.json [--verbose] [--svg FOLDER]

Each seed is a world of ``tests/world/``; ``benchmarks/README.md`` has the laws. A failing seed
prints the line that replays it, and a smaller scenario that breaks the same law. The exit status is
1 when a law was broken, and on ``--replay`` also when a second run differs from the first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import command, progress, show, write_json

if TYPE_CHECKING:
    from tests.world.many import Found
    from tests.world.weather import Scenario

MAX_SHRUNK = 3
"""Only the first seeds that fail are made smaller, one for each law."""
SHRINK_S = 240.0
SAID_EVERY_S = 60.0
"""How often a line tells of the progress where no bar can be drawn, as in a file."""


class Tally:
    """What all seeds so far have come to."""

    def __init__(self) -> None:
        from tests.world.coverage import Coverage
        from tests.world.weather import FAULTS, OF_COPIES, OPERATIONS

        self.coverage = Coverage(list(FAULTS), [*OPERATIONS, *OF_COPIES])
        self.counts: Counter[str] = Counter()
        self.failed: dict[int, Found] = {}
        self.cpu_s = 0.0

    def add(self, found: Found) -> None:
        """Count a seed."""
        self.coverage.add(found.hit)
        self.cpu_s += found.cpu_s
        self.counts["seeds"] += 1
        self.counts["events hit"] += len(found.hit)
        self.counts["requests"] += found.num_requests
        self.counts["tokens"] += found.num_tokens
        self.counts["callbacks"] += found.num_callbacks
        if found.breaches:
            self.failed[found.seed] = found

    def laws(self) -> dict[str, list[int]]:
        """Return the seeds that broke each law."""
        broken: dict[str, list[int]] = {}
        for seed in sorted(self.failed):
            for law in sorted(self.failed[seed].laws()):
                broken.setdefault(law, []).append(seed)
        return broken

    def to_shrink(self) -> list[tuple[int, str]]:
        """Return a seed for each law, the first one of it, and no seed twice."""
        chosen: dict[int, str] = {}
        for law, seeds in self.laws().items():
            chosen.setdefault(seeds[0], law)
        return list(chosen.items())[:MAX_SHRUNK]


def run(seeds: range, minutes: float, processes: int) -> dict[str, Any]:
    """Run seeds until they or the minutes are over; returns what ``--json`` writes."""
    from tests.world.many import all_of, workers
    from tests.world.shrinking import shrunk_seed

    tally = Tally()
    has_bar = sys.stderr.isatty()
    with workers(processes) as pool, progress("world", len(seeds)) as begin:
        begin("imports")
        started_s = time.perf_counter()
        until_s, said_s = started_s + 60 * minutes, started_s
        for found in all_of(pool, processes, iter(seeds), until_s):
            tally.add(found)
            now_s = time.perf_counter()
            rate = tally.counts["seeds"] / (now_s - started_s)
            said = f"{rate:.2f} seeds/s, {len(tally.failed)} failed"
            begin(said)
            if not has_bar and now_s - said_s >= SAID_EVERY_S:
                said_s = now_s
                print(f"world: {tally.counts['seeds']} of {len(seeds)}, {said}", file=sys.stderr)
            if found.breaches:
                print(failure_line(found.seed, found.laws()), file=sys.stderr)
        took_s = time.perf_counter() - started_s
        begin("shrinks what failed")
        smaller = [pool.submit(shrunk_seed, seed, law, SHRINK_S) for seed, law in tally.to_shrink()]
        shrunk = [one.result() for one in smaller]
    return {
        "seeds": [seeds.start, seeds.stop],
        "processes": processes,
        "took_s": took_s,
        "cpu_s": tally.cpu_s,
        "counts": dict(tally.counts),
        "laws": tally.laws(),
        "failed": {str(seed): found.breaches for seed, found in sorted(tally.failed.items())},
        "pairs_met": [tally.coverage.num_met(), tally.coverage.num_pairs()],
        "coverage": tally.coverage.table(),
        "shrunk": shrunk,
    }


def failure_line(seed: int | str, laws: Iterable[str]) -> str:
    """Return the line that a failing seed prints: how it is replayed, and what it broke."""
    return f"python -m benchmarks.world --replay {seed}  # {'; '.join(sorted(laws))}"


def report(result: Mapping[str, Any]) -> None:
    """Print the tables, and the smaller scenarios."""
    counts, took_s = result["counts"], result["took_s"]
    num_seeds = counts.get("seeds", 0)
    rows = [
        *counts.items(),
        ("seconds", f"{took_s:.0f}"),
        ("seeds/s", f"{num_seeds / took_s:.2f}"),
        ("processor seconds a seed", f"{result['cpu_s'] / max(1, num_seeds):.2f}"),
        ("pairs of a fault and an operation that met", "{} of {}".format(*result["pairs_met"])),
        ("seeds that broke a law", len(result["failed"])),
    ]
    show(f"world, {result['processes']} processes", rows, ["", "count|,"])
    print("seeds in which a fault and an operation hit\n\n" + result["coverage"] + "\n")
    if laws := [(law, len(seeds), seeds[0]) for law, seeds in result["laws"].items()]:
        show("laws broken", laws, ["law", "seeds", "first seed"])
    for seed, breaches in result["failed"].items():
        print(failure_line(seed, {law for law, _, _ in breaches}))


def keep(shrunk: Mapping[str, Any], folder: Path) -> None:
    """Write a smaller scenario and its picture, and print its timeline."""
    file = folder / f"world-{shrunk['seed']}.json"
    file.write_text(json.dumps(shrunk["scenario"], indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".svg").write_text(shrunk["svg"], encoding="utf-8")
    print(f"\nseed {shrunk['seed']}, shrunk, breaks: {shrunk['law']}\n{shrunk['timeline']}")
    print(f"python -m benchmarks.world --replay {file}  # {file.with_suffix('.svg')}")


def replay(scenario: Scenario, is_verbose: bool, folder: Path | None, name: str) -> int:
    """Run a scenario twice and print its timeline; returns the exit status."""
    import logging

    from tests.world import picture, timeline
    from tests.world.world import run as run_world

    sys.unraisablehook = lambda raised: None
    warnings.simplefilter("ignore")  # the end of a world awaits no coroutine of it
    with timeline.recorded(logging.INFO if is_verbose else logging.WARNING) as records:
        outcome = run_world(scenario)
    logging.disable(logging.CRITICAL)
    again = run_world(scenario)
    print(timeline.text(outcome, records.lines))
    if folder is not None:
        file = folder / f"{name}.svg"
        file.write_text(picture.svg(outcome), encoding="utf-8")
        print(f"\n{file}")
    is_same = (again.digest, again.trace) == (outcome.digest, outcome.trace)
    print(
        f"\n{len(scenario.plans)} requests, {len(outcome.hit)} of {len(scenario.events)} events "
        f"hit, {len(outcome.breaches)} breaches; {outcome.num_callbacks:,} callbacks, digest "
        f"{outcome.digest:08x}: a second run {'is the same' if is_same else 'DIFFERS'}"
    )
    for breach in outcome.breaches:
        print(f"  {breach.law}: {breach.text}")
    return int(bool(outcome.breaches) or not is_same)


def seeds_of(words: str) -> range:
    """Read ``A:B``, or one seed."""
    first, is_range, end = words.partition(":")
    try:
        return range(int(first), int(end) if is_range else int(first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{words!r} is neither A:B nor a seed") from None


def scenario_of(words: str) -> tuple[Scenario, str]:
    """Read a seed or a file of a scenario; returns its scenario and its name."""
    from tests.world.weather import Scenario, draw

    if words.isdecimal():
        return draw(int(words)), f"world-{words}"
    file = Path(words)
    return Scenario.from_json(json.loads(file.read_text(encoding="utf-8"))), file.stem


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = command("world", __doc__)
    parser.add_argument("--seeds", type=seeds_of, default=range(1000), metavar="A:B")
    parser.add_argument("--minutes", type=float, default=10.0, help="no seed begins later")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--replay", metavar="SEED|FILE", help="run one, and print its timeline")
    parser.add_argument("--verbose", action="store_true", help="with --replay: the product's log")
    parser.add_argument("--svg", type=Path, metavar="FOLDER", help="draw timelines here")
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of strings have an order of their own
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if options.svg is not None:
        options.svg.mkdir(parents=True, exist_ok=True)
    if options.replay is not None:
        scenario, name = scenario_of(options.replay)
        return replay(scenario, options.verbose, options.svg, name)
    result = run(options.seeds, options.minutes, options.processes)
    report(result)
    for shrunk in result["shrunk"]:
        keep(shrunk, options.svg or Path())
    write_json("world", result, options.json)
    return int(bool(result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
