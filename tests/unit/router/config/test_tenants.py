"""Deficit round robin: by hand, against a simulation of its rounds, and with late tenants."""

from __future__ import annotations

from collections import deque

from hypothesis import assume, given
from hypothesis import strategies as st

from router.config.tenants import TenantTurns

QUANTUM = 100


def simulated(costs: dict[str, list[int]]) -> list[tuple[str, int]]:
    """Serve all items by the rounds of the paper: a deficit per tenant, a quantum per visit."""
    queues = {name: deque(enumerate(own)) for name, own in costs.items()}
    deficits = dict.fromkeys(costs, 0)
    order = []
    while any(queues.values()):
        for name, queue in queues.items():
            if not queue:
                continue
            deficits[name] += QUANTUM
            while queue and queue[0][1] <= deficits[name]:
                index, cost = queue.popleft()
                deficits[name] -= cost
                order.append((name, index))
            if not queue:
                deficits[name] = 0
    return order


def by_turns(costs: dict[str, list[int]]) -> list[tuple[str, int]]:
    turns = TenantTurns(QUANTUM).turns(costs)
    items = [(turn, i, name) for name, own in turns.items() for i, turn in enumerate(own)]
    return [(name, i) for _, i, name in sorted(items)]


def test_three_tenants_worked_by_hand() -> None:
    costs = {"a": [60, 60, 60, 150], "b": [200, 50], "c": [30, 30, 30]}
    # Round 1: a has 100, spends 60, keeps 40; b keeps its 100; c spends 90.
    # Round 2: a has 140 and spends 60 and 60; b has 200 and spends all.
    # Round 3: a keeps 20 + 100; b spends 50. Round 4: a has 220 and spends 150.
    assert by_turns(costs) == [
        ("a", 0), ("c", 0), ("c", 1), ("c", 2), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("a", 3)
    ]  # fmt: skip


QUEUES = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.integers(1, 350), min_size=1, max_size=8), min_size=1
)


@given(QUEUES)
def test_turns_are_those_of_the_rounds(costs: dict[str, list[int]]) -> None:
    assume(next(iter(costs.values()))[0] <= QUANTUM)  # so that all join in the first round
    assert by_turns(costs) == simulated(costs)


@given(QUEUES)
def test_turns_asked_anew_after_each_item_serve_the_same(costs: dict[str, list[int]]) -> None:
    assume(next(iter(costs.values()))[0] <= QUANTUM)
    turns = TenantTurns(QUANTUM)
    left = {name: deque(enumerate(own)) for name, own in costs.items()}
    order = []
    while left:
        heads = turns.turns({name: [cost for _, cost in queue] for name, queue in left.items()})
        name = min(heads, key=lambda tenant: heads[tenant][0])
        index, cost = left[name].popleft()
        turns.spend(name, cost)
        order.append((name, index))
        left = {tenant: queue for tenant, queue in left.items() if queue}
    assert order == simulated(costs)


def test_a_late_tenant_joins_the_round_under_way_and_brings_nothing_from_before() -> None:
    turns = TenantTurns(QUANTUM)
    both = {"a": [50] * 9, "b": [50] * 9}
    assert turns.turns(both)["b"][0] == (1, 1)
    for name in "ab":
        turns.spend(name, 450)
    assert turns.turns(both)["a"][0] == (5, 0)
    assert turns.turns(both | {"c": [50, 60]})["c"] == [(5, 2), (6, 2)]
    assert "b" not in turns.turns({"a": [50], "c": [50]})
    turns.spend("b", 10**9)  # which nobody competes with any more
    assert turns.turns({"a": [50], "b": [50]}) == {"a": [(5, 0)], "b": [(5, 3)]}
    turns.keep(())
    assert turns.turns({"b": [150]}) == {"b": [(2, 4)]}


def test_who_comes_after_one_whose_turn_takes_many_rounds_waits_for_it() -> None:
    assert TenantTurns(QUANTUM).turns({"a": [450], "b": [10, 95]}) == {
        "a": [(5, 0)], "b": [(5, 1), (6, 1)]
    }  # fmt: skip
