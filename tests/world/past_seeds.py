"""The scenarios that have ever broken a law, each with its story.

A scenario is kept as data in ``past/``, since a seed draws another one after a change of what is
drawn. ``python -m benchmarks.world --replay tests/world/past/NAME.json`` shows one.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.world.weather import Scenario

FOLDER = Path(__file__).parent / "past"
STORIES = {
    "seed-86": "At a redeploy with fewer actors a node's memory is full, and its actors are ended "
    "with all experts that they serve, since they cannot load the rest of their new share. Then "
    "an actor waited for its own relief for ever.",
    "seed-99": "A device yields NaN just after the actor's look at its answers; routers ask its "
    "twins from then on, so nobody tests it, and it stays.",
}
"""The story of each file of ``past/``, by its name without ``.json``."""


def scenario(name: str) -> Scenario:
    """Return a past scenario."""
    data = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Scenario.from_json(data)
