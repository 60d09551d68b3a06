"""What a deployment does at its edges: overload, clients that leave or stall, checking requests.

    python -m benchmarks.edges [PART ...] [--seconds 60] [--cancels 1000] [--readers 100]
        [--seed N] [--json FILE]

Serves the bundled model (gateway, router, two expert actors, fp32). ``overload``: four times as
many requests as it can answer, in an open loop; they may be answered or told to come back later,
and nothing else. ``cancels``: clients that leave must leave nothing behind. ``stalls``: readers
that stop reading must not be felt by others. ``validation``: what checking a request costs, without
a deployment. Prints a verdict for each figure; the exit status is 1 when one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import cancels, overload, stalls, validation
from benchmarks.common import (
    CACHE_TOKENS,
    MODEL,
    Verdict,
    machine,
    progress,
    show,
    show_verdicts,
)
from benchmarks.held import METRICS, RAYS, above
from benchmarks.open_loop import ANSWERED, SHED

MODEL_PATH = "models/mesh-tiny"
ACTORS = 2
FACTOR = 4.0
QUEUE = 64
"""Requests that may wait: two batches. What waits when the load ends is what delays the next."""
PARTS = ("overload", "cancels", "stalls", "validation")
STEPS = {"overload": 3, "cancels": 2, "stalls": 2 * stalls.ROUNDS, "validation": 1}
"""Of the progress."""
RECOVERED_S = 5.0
SAME_SHARE = 0.10
VALIDATION_US = 50.0
"""Of processor time a request, whatever it has in it."""
GROWTH_SHARE, GROWTH_MB, GROWTH_FDS = 0.05, 16.0, 16.0
"""A process may hold so much more after clients have left; as :mod:`benchmarks.soak` judges."""


def overload_verdicts(result: Mapping[str, Any]) -> list[Verdict]:
    """Judge answers, recovery and memory."""
    others = {
        f"{surface} {kind}": count
        for surface, some in result["kinds"].items()
        for kind, count in some.items()
        if kind not in (ANSWERED[surface], SHED[surface])
    }
    growing = [one for one in _serving(result["processes"]) if not one["is_memory_flat"]]
    files = result["descriptors"]
    open_files = grown(files["before"], files["after"], lambda before: GROWTH_FDS)
    recovered_s = result["recovered_s"]
    return [
        Verdict("statuses", _counted(others) or "no other", "only OK or come back", not others),
        Verdict(
            "normal latency again",
            "never" if recovered_s is None else f"after {recovered_s:.1f} s",
            f"within {RECOVERED_S:g} s",
            recovered_s is not None and recovered_s <= RECOVERED_S,
        ),
        Verdict(
            "memory of the serving processes",
            ", ".join(f"{one['name']} {one['mb_per_min']:+.1f} MB a minute" for one in growing)
            or f"flat, all {len(_serving(result['processes']))}",
            "flat",
            not growing and bool(_serving(result["processes"])),
        ),
        Verdict("descriptors", _counted(open_files) or "as before", "as before", not open_files),
    ]


def _serving(processes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [one for one in processes if one["name"] != "clients"]


def cancel_verdicts(result: Mapping[str, Any]) -> list[Verdict]:
    """Judge what is held after clients have left."""
    failed = {how: count for how, count in result["left"].items() if ": " in how}
    files = result["descriptors"]
    memory = result["memory_mb"]
    open_files = grown(files["before"], files["after"], lambda before: GROWTH_FDS)
    bigger = grown(
        memory["before"], memory["after"], lambda before: max(GROWTH_SHARE * before, GROWTH_MB)
    )
    return [
        Verdict("clients left as they meant to", _counted(failed) or "all", "all", not failed),
        *(
            _back(result, figure, names)
            for figure, names in (("slots and places", METRICS), ("Ray's tasks and objects", RAYS))
        ),
        Verdict("descriptors", _counted(open_files) or "as before", "as before", not open_files),
        Verdict("memory, MB", _counted(bigger) or "as before", "as before", not bigger),
    ]


def _back(result: Mapping[str, Any], figure: str, names: Collection[str]) -> Verdict:
    more = [name for name in above(result["after"], result["before"]) if name in names]
    back_s = max(result["back_s"][name] for name in names)
    told = ", ".join(f"{name} {result['after'][name]:g}" for name in more)
    return Verdict(figure, told or f"as before after {back_s:.1f} s", "as before", not more)


def grown(
    before: Mapping[str, float], after: Mapping[str, float], most: Callable[[float], float]
) -> dict[str, float]:
    """Return by how much processes have grown that did so by more than ``most(before)``."""
    return {
        name: value - before.get(name, 0.0)
        for name, value in after.items()
        if value - before.get(name, 0.0) >= most(before.get(name, 0.0))
    }


def stall_verdicts(result: Mapping[str, Any]) -> list[Verdict]:
    """Judge what others felt."""
    verdicts = []
    for times in ("first_token", "between_tokens"):
        without, beside = (result[which][times]["p99_ms"] for which in ("without", "with"))
        alone = [one[times]["p99_ms"] for one in result["stretches"]["without"]]
        verdicts.append(
            Verdict(
                f"others' p99, {times.replace('_', ' ')}",
                f"{beside:.1f} beside {without:.1f} ms, {beside / without - 1:+.1%} "
                f"(stretches without: {min(alone):.1f} to {max(alone):.1f})",
                f"at most +{SAME_SHARE:.0%}",
                beside <= (1 + SAME_SHARE) * without,
            )
        )
    return verdicts


def validation_verdicts(result: Mapping[str, float]) -> list[Verdict]:
    """Judge what checking costs."""
    verdicts = []
    for kind, us in result.items():
        is_kept = us <= VALIDATION_US
        verdicts.append(
            Verdict(f"checking {kind}", f"{us:.1f} µs", f"{VALIDATION_US:g} µs", is_kept)
        )
    return verdicts


def _counted(some: Mapping[str, float]) -> str:
    return ", ".join(f"{count:g} {name}" for name, count in some.items())


JUDGES: dict[str, Callable[[Any], list[Verdict]]] = {
    "overload": overload_verdicts,
    "cancels": cancel_verdicts,
    "stalls": stall_verdicts,
    "validation": validation_verdicts,
}


def judge(result: Mapping[str, Any]) -> list[Verdict]:
    """Judge every part that was run."""
    return [verdict for part in PARTS if part in result for verdict in JUDGES[part](result[part])]


@contextmanager
def _deployed() -> Any:
    from benchmarks.serve import served
    from router.app import build

    args = {
        "models": [{"id": MODEL, "path": MODEL_PATH}],
        "experts": {"actors": ACTORS},
        "router": {"cache_tokens": CACHE_TOKENS, "max_queue_requests": QUEUE},
    }
    with served(build, args) as ports:
        yield ports


def run(
    parts: Sequence[str], seconds: float, num_cancels: int, readers: int, seed: int
) -> dict[str, Any]:
    """Run the parts, each on a deployment of its own; returns what ``--json`` writes."""
    import deploy

    result: dict[str, Any] = {"benchmark": "edges", "machine": machine(), "seed": seed}
    deployments = sum(part != "validation" for part in parts)
    with progress("edges", deployments + sum(STEPS[part] for part in parts)) as begin:
        runs: dict[str, Callable[[Any], Any]] = {
            "overload": lambda ports: overload.run(ports, FACTOR, seconds, seed, begin),
            "cancels": lambda ports: cancels.run(ports, num_cancels, seed, begin),
            "stalls": lambda ports: stalls.run(ports, readers, begin),
        }
        for part in parts:
            if part == "validation":
                begin(part)
                result[part] = validation.run(Path(deploy.__file__).parent / MODEL_PATH)
                continue
            begin("deployment")
            with _deployed() as ports:
                result[part] = runs[part](ports)
    return result


def report(result: Mapping[str, Any]) -> None:
    """Print the tables and the verdicts."""
    if "overload" in result:
        _report_overload(result["overload"])
    if "cancels" in result:
        _report_cancels(result["cancels"])
    if "stalls" in result:
        memory = result["stalls"]["memory_mb"]
        rows = [
            (name, f"{memory['without'].get(name, 0):.0f}", f"{value:.0f}")
            for name, value in memory["with"].items()
        ]
        show("memory, MB", rows, ["process", "nobody stalls", f"{result['stalls']['readers']} do"])
    show_verdicts("edges", judge(result))


def _report_overload(result: Mapping[str, Any]) -> None:
    rows = [
        ("capacity, requests/s", f"{result['capacity_per_s']:.1f}"),
        ("offered, requests/s", f"{result['offered_per_s']:.1f}"),
        ("answered meanwhile, requests/s", f"{result['answered_per_s']:.1f}"),
        *(
            (f"{surface} {kind}", str(count))
            for surface, some in result["kinds"].items()
            for kind, count in sorted(some.items())
        ),
    ]
    for name in ("sent_late", "normal", "answered", "refused"):
        if result[name] is not None:
            told = f"{result[name]['p50_ms']:.0f}, {result[name]['p99_ms']:.0f}"
            rows.append((f"{name.replace('_', ' ')}, ms p50, p99", told))
    show("overload", rows, ["", ""])
    memory = [
        (
            f"{one['name']} {one['pid']}",
            *(f"{one[end]['rss_mb']:.0f}" for end in ("first", "last")),
            f"{one['mb_per_min']:.1f}",
        )
        for one in result["processes"]
    ]
    show("memory under overload, MB", memory, ["process", "at first", "at last", "a minute"])


def _report_cancels(result: Mapping[str, Any]) -> None:
    rows: list[tuple[str, ...]] = [
        (how, "", str(count)) for how, count in sorted(result["left"].items())
    ]
    rows += [
        (name, f"{result['before'][name]:g}", f"{value:g}")
        for name, value in result["after"].items()
    ]
    for what in ("descriptors", "memory_mb"):
        before, after = result[what]["before"], result[what]["after"]
        unit = "MB" if what == "memory_mb" else what
        rows += [
            (f"{name}, {unit}", f"{before.get(name, 0):.0f}", f"{value:.0f}")
            for name, value in after.items()
        ]
    show("clients that leave", rows, ["", "before", "after"])


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--cancels", type=int, default=1000, help="clients that leave")
    parser.add_argument("--readers", type=int, default=100, help="readers that stall")
    parser.add_argument("--seed", type=int, default=0, help="the same seed has the same arrivals")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {unknown[0]}; known: {', '.join(PARTS)}")
    parts = options.parts or PARTS
    result = run(parts, options.seconds, options.cancels, options.readers, options.seed)
    report(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(not all(one.is_kept for one in judge(result)))


if __name__ == "__main__":
    sys.exit(main())
