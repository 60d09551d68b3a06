"""Who belongs to a fleet, and what a next controller makes of what was written down."""

from __future__ import annotations

import pytest

from cluster.controller.records.fleet import Fleet, PoolMembers
from cluster.controller.records.ledger import Ledger
from cluster.errors import InvalidRequestError
from cluster.spec import ActorSpec, ModelExperts, PoolSpec, ScalingTargets

SPEC = ActorSpec("app", (), 0.1, 0.0, 1, 100)


def pool(num_actors: int, name: str = "a", most: int | None = None) -> PoolSpec:
    targets = None if most is None else ScalingTargets(1, most, 0.5, 0.01, 1.0, 1.0)
    return PoolSpec(name, num_actors, None, SPEC, targets)


def test_actors_join_under_the_first_free_name_and_with_their_pools_budget() -> None:
    fleet = Fleet([pool(3), pool(1, "b")])
    fleet.remove("a-1")
    assert fleet.of("a") == ["a-0", "a-2"]
    assert (fleet.add("a"), fleet.add("a"), fleet.add("b")) == ("a-1", "a-3", "b-1")
    assert fleet.specs.keys() == fleet.pool_of.keys() == {"a-0", "a-1", "a-2", "a-3", "b-0", "b-1"}
    assert fleet.budgets_bytes is None
    fleet = Fleet([PoolSpec("a", 1, 30, SPEC)])
    fleet.add("a")
    fleet.remove("a-0")
    assert fleet.budgets_bytes == {"a-1": 30}


@pytest.mark.parametrize(
    ("configured", "most", "kept", "expected"),
    [
        (2, None, PoolMembers(2, ("a-0", "a-4")), ["a-0", "a-4"]),
        (2, None, PoolMembers(2, ("a-4",)), ["a-4"]),
        (2, None, PoolMembers(2, ()), []),
        (3, None, PoolMembers(2, ("a-0", "a-4")), ["a-0", "a-4", "a-1"]),
        (1, None, PoolMembers(2, ("a-4", "a-0")), ["a-4"]),
        (2, 3, PoolMembers(2, ("a-0", "a-1", "a-2", "a-3")), ["a-0", "a-1", "a-2"]),
        (2, 3, PoolMembers(2, ()), ["a-0"]),
    ],
)
def test_a_next_controller_goes_on_unless_the_configuration_changed(
    configured: int, most: int | None, kept: PoolMembers, expected: list[str]
) -> None:
    fleet = Fleet([pool(configured, most=most)])
    fleet.resume({"a": kept, "gone": PoolMembers(1, ("gone-0",))})
    assert fleet.of("a") == expected
    assert fleet.members() == {"a": PoolMembers(configured, tuple(expected))}


def test_a_pool_is_named_where_there_are_several() -> None:
    one, two = Fleet([pool(1)]), Fleet([pool(1), pool(1, "b")])
    assert one.pool_named("").name == one.pool_named("a").name == "a"
    assert two.pool_named("b").name == "b"
    for fleet, name in ((one, "b"), (two, ""), (two, "c")):
        with pytest.raises(InvalidRequestError, match="must be one of a"):
            fleet.pool_named(name)


def test_the_ledger_survives_its_way_through_text() -> None:
    models = (ModelExperts("m@old", (0, 2), 4, 10), ModelExperts("n", (1,), 2, 7))
    kept = PoolMembers(2, ("a-0", "a-4"), ("a-1",))
    ledger = Ledger(3, {"a-0": 2}, {"a": kept}, models)
    assert Ledger.from_json(ledger.to_json()) == ledger
    # Before there were pools.
    assert Ledger.from_json('{"epoch": 3, "generations": {}}') == Ledger(3)
