"""What ``benchmarks.decode`` makes of its measurements: medians, ratios, tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import show, show_memory

OURS = "ExpertMesh"
REFERENCE = "float32"
"""The dtype of ours whose tokens the others' are compared with."""
PREFILL_PEER = "transformers"

Side = Mapping[str, Any]
"""A program's figures with one format of the weights."""


def merged(passes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one side's figures: medians over the rounds of all passes, the rest of the last."""
    last = passes[-1]
    streams = {}
    for n, of_last in last["streams"].items():
        rates = [rate for one in passes for rate in one["streams"][n]["rates"]]
        streams[n] = {**of_last, "rates": rates, "tokens_per_s": statistics.median(rates)}
    prefill_s = {
        length: statistics.median(time_s for one in passes for time_s in one["prefill_s"][length])
        for length in last["prefill_s"]
    }
    return {**last, "streams": streams, "prefill_s": prefill_s}


def same_tokens(tokens: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Return the share of tokens that equal the reference's at the same place.

    Raises ``ValueError`` where there are not as many of them.
    """
    pairs = [
        (ours, theirs)
        for one, other in zip(tokens, reference, strict=True)
        for ours, theirs in zip(one, other, strict=True)
    ]
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def best_peer(sides: Sequence[Side], bits: int, streams: str) -> tuple[str, float] | None:
    """Return the fastest peer's name and tokens per second, of those with weights of ``bits``."""
    rates = [
        (one["streams"][streams]["tokens_per_s"], f"{one['program']} {one['format']}")
        for one in sides
        if one["bits"] == bits and not _is_ours(one)
    ]
    return max(rates)[::-1] if rates else None


def _is_ours(side: Side) -> bool:
    return bool(side["program"].startswith(OURS))


def with_ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Add the best peers and ratios to them; tokens become their share of equal ones."""
    sides = result["sides"]
    ours = [one for one in sides if _is_ours(one)]
    first = next(one for one in ours if one["format"] == REFERENCE)
    reference = {n: figures["tokens"] for n, figures in first["streams"].items()}
    prefills = [one["prefill_s"] for one in sides if one["program"] == PREFILL_PEER]
    for one in sides:
        for n, figures in one["streams"].items():
            figures["same_tokens"] = same_tokens(figures.pop("tokens"), reference[n])
    for one in ours:
        for n, figures in one["streams"].items():
            if (best := best_peer(sides, one["bits"], n)) is not None:
                figures["best_peer"], rate = best
                figures["ratio"] = figures["tokens_per_s"] / rate
        one["prefill_ratio"] = {
            length: min(prefill_s[length] for prefill_s in prefills) / time_s
            for length, time_s in one["prefill_s"].items()
            if prefills
        }
    return result


def report(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    sides = sorted(result["sides"], key=lambda side: -side["bits"])
    ours = [one for one in sides if _is_ours(one)]
    _report_speed(result, sides)
    _report_streams(result, ours)
    if result["prefill"]:
        _report_prefill(result["prefill"], sides)
    show_memory(
        {
            f"{process}, {one['format']}, {one['program']}": memory
            for one in ours
            for process, memory in one["memory"].items()
        }
    )
    for name, requirement in result["missing"].items():
        print(f"Not installed: {name} (pip install {requirement}).")
    for name, problem in result["failed"].items():
        print(f"FAILED: {name}: {problem}")


def _report_speed(result: Mapping[str, Any], sides: Sequence[Side]) -> None:
    streams = result["streams"]
    rows = [
        (
            *(one[key] for key in ("program", "format", "bits")),
            *(one["streams"][n]["tokens_per_s"] for n in streams),
            *(one["streams"][n]["same_tokens"] for n in streams),
            one["version"],
        )
        for one in sides
    ]
    columns = ["", "weights", "bits", *(f"tok/s, {n} streams|,.0f" for n in streams)]
    columns += [*(f"same tokens, {n}|.1%" for n in streams), "version"]
    title = f"{result['size']}, {result['processor']}: tokens/s with prefill; {REFERENCE}'s tokens"
    show(title, rows, columns)


def _report_streams(result: Mapping[str, Any], ours: Sequence[Side]) -> None:
    """Print the ratios to the best peers, and the times of the decoding steps."""
    named = [
        (f"{n} streams, {one['format']}, {one['program']}", figures)
        for one in ours
        for n, figures in one["streams"].items()
    ]
    keys = ("tokens_per_s", "ratio", "best_peer")
    rows = [(name, *(figures.get(key) for key in keys)) for name, figures in named]
    columns = ["", "tok/s|,.0f", "/ best peer|.2f", "best peer in as many bits"]
    show(f"{OURS}: router's engine and {result['actors']} actors", rows, columns)
    times = [
        (
            name,
            figures["step"]["p50_ms"],
            figures["layer"]["p50_ms"],
            figures["layer"]["p99_ms"],
            ", ".join(f"{kind} {count}" for kind, count in sorted(figures["calls"].items())),
        )
        for name, figures in named
    ]
    columns = ["", "step p50 ms|.2f", "layer p50|.2f", "p99|.2f", "calls"]
    show("decoding steps", times, columns)


def _report_prefill(lengths: Sequence[str], sides: Sequence[Side]) -> None:
    rows = [
        (
            f"{one['program']}, {one['format']}",
            *(one["prefill_s"][n] for n in lengths),
            *(one.get("prefill_ratio", {}).get(n) for n in lengths),
        )
        for one in sides
        if one["prefill_s"]
    ]
    columns = ["", *(f"{n} tokens, s|.3f" for n in lengths), *(f"ratio, {n}|.2f" for n in lengths)]
    show(f"prefill of one prompt; ratio: speed / {PREFILL_PEER}'s best", rows, columns)
