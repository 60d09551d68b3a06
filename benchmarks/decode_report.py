"""What ``benchmarks.decode`` makes of its measurements: medians, ratios, tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import PROMISED_MB, show, show_memory

OURS = "ExpertMesh"
REFERENCE = "float32"
"""The dtype of ours whose tokens the others' are compared with."""
PREFILL_PEER = "transformers"

Streams = Mapping[str, Mapping[str, Any]]


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


def best_peer(
    peers: Mapping[str, Mapping[str, Any]], bits: int, streams: str
) -> tuple[str, float] | None:
    """Return the fastest peer's name and tokens per second, of those with weights of ``bits``."""
    rates = [
        (one["streams"][streams]["tokens_per_s"], f"{name} {number_format}")
        for name, formats in peers.items()
        for number_format, one in formats.items()
        if one["bits"] == bits
    ]
    if not rates:
        return None
    rate, name = max(rates)
    return name, rate


def best_prefill_s(peers: Mapping[str, Mapping[str, Any]], length: str) -> float | None:
    """Return the shortest time of transformers for a prompt, over its formats."""
    formats = peers.get(PREFILL_PEER, {}).values()
    return min((one["prefill_s"][length] for one in formats), default=None)


def with_ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Add the best peers and ratios to them; tokens become their share of equal ones."""
    cluster, peers = result["cluster"], result["peers"]
    first = next(iter(cluster[REFERENCE].values()))["streams"]
    reference = {n: figures["tokens"] for n, figures in first.items()}
    everything = [one for formats in peers.values() for one in formats.values()]
    everything += [one for by_transport in cluster.values() for one in by_transport.values()]
    for one in everything:
        for n, figures in one["streams"].items():
            figures["same_tokens"] = same_tokens(figures.pop("tokens"), reference[n])
    for by_transport in cluster.values():
        for one in by_transport.values():
            for n, figures in one["streams"].items():
                best = best_peer(peers, one["bits"], n)
                if best is not None:
                    figures["best_peer"], rate = best
                    figures["ratio"] = figures["tokens_per_s"] / rate
            one["prefill_ratio"] = {
                length: best_s / time_s
                for length, time_s in one["prefill_s"].items()
                if (best_s := best_prefill_s(peers, length)) is not None
            }
    return result


def report(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    _report_speed(result)
    _report_ratios(result)
    _report_steps(result)
    if result["prefill"]:
        _report_prefill(result)
    show_memory(
        {
            f"{process}, {dtype}, {transport}": memory
            for dtype, by_transport in result["cluster"].items()
            for transport, one in by_transport.items()
            for process, memory in one["memory"].items()
        }
    )
    bounds = ", ".join(f"{part} <= {most:.0f} MB" for part, most in PROMISED_MB.items())
    print(f"Promised beyond weights and cache: {bounds}.")
    for name, requirement in result["missing"].items():
        print(f"Not installed: {name} (pip install {requirement}).")
    for name, problem in result["failed"].items():
        print(f"FAILED: {name}: {problem}")


def _sides(result: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return (program, format, figures) of all sides, by bits, and ours last of these."""
    sides = [
        (name, number_format, one)
        for name, formats in result["peers"].items()
        for number_format, one in formats.items()
    ]
    sides += [
        (f"{OURS}, {transport}", dtype, one)
        for dtype, by_transport in result["cluster"].items()
        for transport, one in by_transport.items()
    ]
    return sorted(sides, key=lambda side: -side[2]["bits"])


def _report_speed(result: Mapping[str, Any]) -> None:
    streams = result["streams"]
    rows = [
        (
            name,
            number_format,
            str(one["bits"]),
            *(f"{one['streams'][n]['tokens_per_s']:,.0f}" for n in streams),
            *(f"{one['streams'][n]['same_tokens']:.1%}" for n in streams),
            one["version"],
        )
        for name, number_format, one in _sides(result)
    ]
    columns = ["", "weights", "bits", *(f"tok/s, {n} streams" for n in streams)]
    columns += [*(f"same tokens, {n}" for n in streams), "version"]
    title = f"{result['size']}, {result['processor']}: tokens/s with prefill; {REFERENCE}'s tokens"
    show(title, rows, columns)


def _report_ratios(result: Mapping[str, Any]) -> None:
    rows = []
    for dtype, by_transport in result["cluster"].items():
        for transport, one in by_transport.items():
            for n, figures in one["streams"].items():
                ratio = figures.get("ratio")
                rows.append(
                    (
                        f"{n} streams, {dtype}, {transport}",
                        f"{figures['tokens_per_s']:,.0f}",
                        "" if ratio is None else f"{ratio:.2f}",
                        figures.get("best_peer", ""),
                    )
                )
    columns = ["", "tok/s", "/ best peer", "best peer in as many bits"]
    show(f"{OURS}: router's engine and {result['actors']} actors", rows, columns)


def _report_steps(result: Mapping[str, Any]) -> None:
    rows = []
    for dtype, by_transport in result["cluster"].items():
        for transport, one in by_transport.items():
            for n, figures in one["streams"].items():
                calls = figures["calls"].items()
                rows.append(
                    (
                        f"{n} streams, {dtype}, {transport}",
                        f"{figures['step']['p50_ms']:.2f}",
                        f"{figures['layer']['p50_ms']:.2f}",
                        f"{figures['layer']['p99_ms']:.2f}",
                        ", ".join(f"{kind} {count}" for kind, count in sorted(calls)),
                    )
                )
    show("decoding steps", rows, ["", "step p50 ms", "layer p50", "p99", "calls"])


def _report_prefill(result: Mapping[str, Any]) -> None:
    rows = []
    for name, number_format, one in _sides(result):
        if one["prefill_s"]:
            ratios = one.get("prefill_ratio", {})
            rows.append(
                (
                    f"{name}, {number_format}",
                    *(f"{one['prefill_s'][n]:.3f}" for n in result["prefill"]),
                    *(f"{ratios[n]:.2f}" if n in ratios else "" for n in result["prefill"]),
                )
            )
    columns = ["", *(f"{n} tokens, s" for n in result["prefill"])]
    columns += [f"ratio, {n}" for n in result["prefill"]]
    show(f"prefill of one prompt; ratio: speed / {PREFILL_PEER}'s best", rows, columns)
