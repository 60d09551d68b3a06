"""Makes a scenario that breaks a law smaller, as long as it breaks that law.

Pure but for the call that says whether a scenario breaks the law. Zeller and Hildebrandt, 2002:
"Simplifying and Isolating Failure-Inducing Input".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from tests.world.weather import Event, Scenario

Item = TypeVar("Item")
MAX_RUNS = 200


class _Trials:
    """Counts runs; after the last one, nothing breaks any law."""

    def __init__(self, breaks: Callable[[Scenario], bool], most_runs: int) -> None:
        self._breaks = breaks
        self._left = most_runs

    def __call__(self, scenario: Scenario) -> bool:
        if self._left <= 0:
            return False
        self._left -= 1
        return self._breaks(scenario)


def reduced(
    items: Sequence[Item], is_enough: Callable[[tuple[Item, ...]], bool]
) -> tuple[Item, ...]:
    """Drop items in ever smaller runs of neighbours while those that are left are enough.

    No single item of the result can be dropped, unless ``is_enough`` has stopped saying so.
    """
    kept = tuple(items)
    size = len(kept)
    while size:
        at, has_dropped = 0, False
        while at < len(kept):
            fewer = kept[:at] + kept[at + size :]
            if is_enough(fewer):
                kept, has_dropped = fewer, True
            else:
                at += size
        if size > 1 or not has_dropped:
            size //= 2  # single ones go round until none can be dropped
    return kept


def shrunk(
    scenario: Scenario, breaks: Callable[[Scenario], bool], most_runs: int = MAX_RUNS
) -> Scenario:
    """Return a part of a scenario that still ``breaks``: events, then requests, then round times.

    ``breaks`` is asked at most ``most_runs`` times. One request stays at least, since a world
    lives as long as its requests.
    """
    trials = _Trials(breaks, most_runs)
    events = reduced(scenario.events, lambda some: trials(replace(scenario, events=some)))
    scenario = replace(scenario, events=events)
    plans = reduced(
        scenario.plans, lambda some: bool(some) and trials(replace(scenario, plans=some))
    )
    scenario = replace(scenario, plans=plans)
    for place, event in enumerate(scenario.events):
        for simpler in _simpler(event):
            events = (*scenario.events[:place], simpler, *scenario.events[place + 1 :])
            if simpler != event and trials(replace(scenario, events=events)):
                scenario = replace(scenario, events=events)
                break
    return scenario


def _simpler(event: Event) -> list[Event]:
    """Return an event at rounder times, the roundest first."""
    return [
        replace(event, at_s=round(event.at_s, digits), for_s=round(event.for_s, digits))
        for digits in (0, 1)
        if not event.for_s or round(event.for_s, digits)
    ]
