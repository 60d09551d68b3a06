"""Several times as many requests as can be answered: what they are told, and what is left of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.common import summary_ms
from benchmarks.held import descriptors
from benchmarks.open_loop import Answer, arrivals_s, asker, capacity_per_s, kinds, late_ms, offer

if TYPE_CHECKING:
    from benchmarks.serve_clients import Ports

CLIENTS = 32
TOKENS = 32
SETTLE_S, CAPACITY_S = 5.0, 15.0
BEFORE_S, AFTER_S = 10.0, 15.0
CLOSE_S = 30.0
"""How long gateways are given to close connections that nobody uses any more."""
PROBES_PER_S = 4.0
"""Before and after the overload: few enough to be normal."""
NORMAL_FACTOR = 1.25
"""A latency is normal again when it is at most so many times the longest one before."""


def recovered_s(before_s: Sequence[float], after: Sequence[tuple[float, float]]) -> float | None:
    """Return after how long latencies are normal again, for good; ``None`` if they never are.

    ``before_s`` are latencies before the overload, ``after`` are (due so long after its end,
    latency), ascending; a probe that was not answered has an infinite one.
    """
    most_s = NORMAL_FACTOR * max(before_s)
    since_s: float | None = None
    for due_s, took_s in after:
        if took_s > most_s:
            since_s = None
        elif since_s is None:
            since_s = due_s
    return since_s


def run(
    ports: Ports, factor: float, seconds: float, seed: int, begin: Callable[[str], None]
) -> dict[str, Any]:
    """Measure capacity, offer ``factor`` times as much, and see how it ends."""
    return asyncio.run(_run(ports, factor, seconds, seed, begin))


async def _run(
    ports: Ports, factor: float, seconds: float, seed: int, begin: Callable[[str], None]
) -> dict[str, Any]:
    from benchmarks.growth import Sampler

    async with asker(ports, TOKENS) as asks:
        begin("capacity, by a closed loop")
        capacity = await capacity_per_s(asks, CLIENTS, SETTLE_S, CAPACITY_S, stream=False)

        async def ask_at(due_s: Sequence[float]) -> list[Answer]:
            return await offer(
                due_s, lambda number, start_s: asks.ask(number, due_s[number], start_s, False)
            )

        begin("normal latency")
        before = await ask_at(probes_s(0.0, BEFORE_S))
        begin(f"{factor:g} times the capacity, {seconds:g} s")
        sampler, open_before = Sampler(), descriptors()
        due_s = arrivals_s(factor * capacity, seconds, seed)
        answers = await ask_at([*due_s, *probes_s(seconds, AFTER_S)])
        processes = sampler.end()
    await asyncio.sleep(CLOSE_S)
    open_after = descriptors()
    during, after = answers[: len(due_s)], answers[len(due_s) :]
    within = sum(one.is_answered and one.ended_s < seconds for one in during)
    normal = [_latency_s(one) for one in before]
    latencies = [(one.due_s - seconds, _latency_s(one)) for one in after]
    return {
        "capacity_per_s": capacity,
        "offered_per_s": len(due_s) / seconds,
        "answered_per_s": within / seconds,
        "kinds": kinds(answers),
        "sent_late": late_ms(during),
        "answered": _summary_ms([one for one in during if one.is_answered]),
        "refused": _summary_ms([one for one in during if not one.is_answered]),
        "normal": summary_ms(normal),
        "normal_s": normal,
        "after_s": latencies,
        "recovered_s": recovered_s(normal, latencies),
        "descriptors": {"before": open_before, "after": open_after},
        "processes": [asdict(one) for one in processes],
    }


def probes_s(first_s: float, seconds: float) -> list[float]:
    """Return when single requests come that measure latency, evenly."""
    return [first_s + place / PROBES_PER_S for place in range(int(seconds * PROBES_PER_S))]


def _latency_s(answer: Answer) -> float:
    return answer.took_s if answer.is_answered else float("inf")


def _summary_ms(answers: Sequence[Answer]) -> dict[str, float] | None:
    return summary_ms([one.took_s for one in answers]) if answers else None
