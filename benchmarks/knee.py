"""Latency by offered load, and the knee: where more load costs more than it brings.

    python -m benchmarks.knee [--rates R ...] [--seconds 20] [--quick] [--seed N] [--json FILE]
        [--compare OLD.json] [--plot FILE.svg]

Serves the bundled model (gateway, router, two expert actors, fp32) and asks for streams in an open
loop, over gRPC and HTTP by turns: requests arrive by chance (Poisson) at a rate that rises from run
to run, whatever became of those before. By default the rates are shares of what 32 clients get that
each wait for their answer. The knee is the rate with the most answers a second for each second that
one takes (Kleinrock's power).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Figure,
    finish,
    latency_figures,
    machine,
    output_options,
    progress,
    show,
    summary_ms,
)
from benchmarks.open_loop import (
    SHED,
    Answer,
    Asker,
    arrivals_s,
    asker,
    capacity_per_s,
    late_ms,
    offer,
)

MODEL_PATH = "models/mesh-tiny"
ACTORS = 2
CLIENTS, TOKENS = 32, 32
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)
QUICK_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
SECONDS, QUICK_SECONDS = 20.0, 8.0
CLOSED_SETTLE_S, CLOSED_S = 5.0, 10.0
SETTLE_SHARE = 0.2
"""The first part of each run, which is not counted."""
LATENCIES = ("first_token", "between_tokens", "request")


def knee(points: Sequence[tuple[float, float]]) -> int:
    """Return which of the points (answers a second, mean seconds for one) is the knee.

    The one with the most power, answers a second over seconds for one; of equals the first. From
    Kleinrock, "Power and Deterministic Rules of Thumb for Probabilistic Problems in Computer
    Communications" (1979): below it load could rise with little loss, beyond it latency rises
    faster than what is answered.
    """
    powers = [rate / took_s for rate, took_s in points]
    return powers.index(max(powers))


def summarize(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Return what one rate came to, without its first part.

    Answers count that ended in the rest of the time, latencies are of the requests that came in it.
    """
    settle_s = SETTLE_SHARE * seconds
    counted = [one for one in answers if one.due_s >= settle_s]
    answered = [one for one in counted if one.is_answered]
    refused = sum(one.kind == SHED[one.surface] for one in counted)
    if not answered:
        raise RuntimeError(f"none of {len(counted)} requests was answered")
    ended = sum(one.is_answered and settle_s <= one.ended_s < seconds for one in answers)
    return {
        "offered_per_s": len(counted) / (seconds - settle_s),
        "answered_per_s": ended / (seconds - settle_s),
        "refused": refused,
        "failed": len(counted) - len(answered) - refused,
        "mean_s": statistics.fmean(one.took_s for one in answered),
        "first_token": summary_ms([one.first_token_s for one in answered]),
        "between_tokens": summary_ms([gap for one in answered for gap in one.between_s()]),
        "request": summary_ms([one.took_s for one in answered]),
        "sent_late": late_ms(counted),
    }


async def _measure(
    asks: Asker,
    rates: Sequence[float],
    seconds: float,
    seed: int,
    begin: Callable[[str], None],
) -> list[dict[str, Any]]:
    points = []
    for rate in rates:
        begin(f"{rate:.1f} requests/s")
        due_s = arrivals_s(rate, seconds, seed)

        async def ask(number: int, start_s: float, due_s: Sequence[float] = due_s) -> Answer:
            return await asks.ask(number, due_s[number], start_s, stream=True)

        points.append({"rate": rate, **summarize(await offer(due_s, ask), seconds)})
    return points


async def _run(
    ports: Any,
    rates: Sequence[float] | None,
    shares: Sequence[float],
    seconds: float,
    seed: int,
    begin: Callable[[str], None],
) -> dict[str, Any]:
    async with asker(ports, TOKENS) as asks:
        begin(f"{CLIENTS} clients that wait")
        closed = await capacity_per_s(asks, CLIENTS, CLOSED_SETTLE_S, CLOSED_S, stream=True)
        rates = rates or [share * closed for share in shares]
        return {
            "closed_loop_per_s": closed,
            "points": await _measure(asks, rates, seconds, seed, begin),
        }


def run(
    rates: Sequence[float] | None, shares: Sequence[float], seconds: float, seed: int
) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes.

    ``rates`` ascend, in requests a second; without them they are ``shares`` of the closed loop's.
    """
    from benchmarks.serve import deployed

    with progress("knee", 2 + len(rates or shares)) as begin:
        begin("deployment")
        with deployed(Path(MODEL_PATH), ACTORS) as ports:
            measured = asyncio.run(_run(ports, rates, shares, seconds, seed, begin))
    points = measured["points"]
    return {
        "benchmark": "knee",
        "machine": machine(),
        "clients": CLIENTS,
        "tokens": TOKENS,
        "actors": ACTORS,
        "seconds": seconds,
        "seed": seed,
        **measured,
        "knee": knee([(one["answered_per_s"], one["mean_s"]) for one in points]),
    }


def comparable(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures that runs are compared by."""
    at_knee = result["points"][result["knee"]]
    figures = {
        "closed loop, requests/s": Figure(result["closed_loop_per_s"], "higher"),
        "at the knee, requests/s": Figure(at_knee["answered_per_s"], "context"),
        "most answered, requests/s": Figure(
            max(one["answered_per_s"] for one in result["points"]), "higher"
        ),
    }
    for latency in LATENCIES:
        lowest = result["points"][0]
        figures |= latency_figures(f"lowest load, {latency.replace('_', ' ')}", lowest[latency])
    return figures


def report(result: Mapping[str, Any]) -> None:
    """Print the table; the knee has a mark."""
    rows = []
    for number, one in enumerate(result["points"]):
        cells = [f"{one['offered_per_s']:.1f}", f"{one['answered_per_s']:.1f}"]
        cells += [str(one["refused"]), str(one["failed"])]
        cells += [f"{one[name][p]:.0f}" for name in LATENCIES for p in ("p50_ms", "p99_ms")]
        cells.append(f"{one['answered_per_s'] / one['mean_s']:.0f}")
        rows.append((f"{one['rate']:.1f}", *cells, "knee" if number == result["knee"] else ""))
    columns = ["requests/s", "came", "answered", "refused", "failed", "first token p50 ms", "p99"]
    columns += ["between p50 ms", "p99", "request p50 ms", "p99", "power", ""]
    title = f"open loop, {result['tokens']} tokens a request"
    show(
        f"{title}; {CLIENTS} clients that wait: {result['closed_loop_per_s']:.1f}/s", rows, columns
    )


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw what is answered, and latencies, by what is offered."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Picture

    points = result["points"]
    offered = [one["offered_per_s"] for one in points]
    at_knee = offered[result["knee"]]
    picture = Picture(figsize=(9, 3.6), layout="constrained")
    FigureCanvasSVG(picture)
    left, right = picture.subplots(1, 2)
    left.plot(offered, offered, color="tab:gray", linewidth=1, linestyle=":", label="offered")
    answered = [one["answered_per_s"] for one in points]
    left.plot(offered, answered, color="tab:blue", marker="o", markersize=4, label="answered")
    left.set_ylabel("requests/s")
    for name, color in (("request", "tab:orange"), ("first_token", "tab:green")):
        for p, style in (("p50", "-"), ("p99", "--")):
            values = [one[name][f"{p}_ms"] for one in points]
            label = f"{name.replace('_', ' ')}, {p}"
            right.plot(offered, values, style, color=color, marker="o", markersize=3, label=label)
    right.set_yscale("log")
    right.set_ylabel("ms")
    for axis in (left, right):
        axis.axvline(at_knee, color="tab:red", linewidth=1)
        axis.set_xlabel("offered, requests/s")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    picture.suptitle(f"The knee at {at_knee:.0f} requests/s")
    picture.savefig(path, metadata={"Date": None})


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rates", type=float, nargs="+", metavar="R", help="requests a second")
    parser.add_argument("--seconds", type=float, help="how long each rate lasts")
    parser.add_argument("--quick", action="store_true", help="six rates, 8 seconds each")
    parser.add_argument("--seed", type=int, default=0, help="the same seed has the same arrivals")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="write the picture here")
    output_options(parser)
    options = parser.parse_args()
    if options.plot is not None:
        import matplotlib  # noqa: F401  # missing, it is told before the long run

    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    shares = QUICK_SHARES if options.quick else SHARES
    rates = sorted(options.rates) if options.rates else None
    result = run(rates, shares, seconds, options.seed)
    report(result)
    if options.plot is not None:
        plot(result, options.plot)
    return finish(result, comparable(result), options)


if __name__ == "__main__":
    sys.exit(main())
