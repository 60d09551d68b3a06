"""Shrinks a seed in a worker process, and tells what is left of it."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from tests.world import picture, timeline
from tests.world.many import judged
from tests.world.shrink import shrunk
from tests.world.weather import Scenario, draw


def shrunk_seed(seed: int, law: str, most_s: float) -> dict[str, Any]:
    """Return a seed's scenario, as small as it gets in that time: plain data, text and SVG."""
    until_s = perf_counter() + most_s

    def breaks(scenario: Scenario) -> bool:
        return perf_counter() < until_s and law in judged(scenario).laws()

    scenario = shrunk(draw(seed), breaks)
    return {"seed": seed, "law": law, "scenario": scenario.to_json(), **_told(scenario)}


def _told(scenario: Scenario) -> dict[str, str]:
    """Run a scenario once more for its timeline; one that raises has none."""
    from tests.world.world import run

    with timeline.recorded() as records:
        try:
            outcome = run(scenario)
        except Exception as error:
            return {"timeline": repr(error), "svg": ""}
    return {"timeline": timeline.text(outcome, records.lines), "svg": picture.svg(outcome)}
