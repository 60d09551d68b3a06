"""What the law of ends says of actors that end themselves after their application."""

from __future__ import annotations

import pytest

from tests.world.law_of_ends import ORPHANS_WAIT_S
from tests.world.weather import Event
from tests.world.world import World


@pytest.mark.parametrize(
    ("later_s", "kind", "laws"),
    [
        (-1.0, "", ["orphans wait"]),
        (0.0, "", []),
        (-1.0, "orphaned", ["orphans wait"]),
        (-1.0, "hangs", []),
    ],
)
def test_orphan_waits_unless_a_fault_hit(later_s: float, kind: str, laws: list[str]) -> None:
    world = World(0)
    try:
        world.happenings.hit = [Event(0.0, kind)] if kind else []
        process = world.kernel.process("expertmesh:world:expert-0:g1", "node-0")
        world.serve.is_wanted = False
        world.ends._orphaned_at_s = world.kernel.now_s - ORPHANS_WAIT_S - later_s
        world.ends.exits(process, 0)
        assert [breach.law for breach in world.law.breaches] == laws
    finally:
        world.close()
