"""When an actor is broken, when its successor comes, and which nodes it avoids: worked by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from cluster.controller.health.deaths import (
    AVOID_NODE_S,
    BROKEN_TESTS,
    FIRST_RETRY_S,
    FORGIVEN_IDLE_S,
    FORGIVEN_S,
    MAX_AVOID_NODE_S,
    MAX_RETRY_S,
    Death,
    Deaths,
    delay_s,
)
from cluster.reports import FailingActor, failing_line
from cluster.spec import ActorReport

DIED = Death("died", is_of_place=True)


def report(node: str = "n1", steps: int = 0, failed_tests: int = 0) -> ActorReport:
    return ActorReport(
        "a", 1, "", 1, 7, node, "cpu", (), 0, {}, 0, steps,
        failed_tests=failed_tests, failure="boom" if failed_tests else "",
    )  # fmt: skip


def lives(deaths: Deaths, now_s: float, works_s: float | None, node: str = "n1") -> float:
    """Have an actor come up and die; returns the delay. It works for so long, or not at all."""
    deaths.begin("a", now_s)
    deaths.came_up(report(node), now_s)
    if works_s is None:
        return deaths.ended("a", DIED, now_s)
    deaths.observe(report(node, steps=1), now_s)
    return deaths.ended("a", DIED, now_s + works_s)


def fails_to_load(deaths: Deaths, now_s: float, death: Death = DIED, node: str = "n1") -> float:
    deaths.begin("a", now_s)
    deaths.located(report(node))
    return deaths.ended("a", death, now_s)


def test_an_actor_that_comes_up_and_dies_at_once_waits_longer_each_time() -> None:
    deaths = Deaths()
    assert [lives(deaths, 100.0 * i, None) for i in range(4)] == [0.0, 0.2, 0.4, 0.8]
    [failing] = deaths.status(300.0)
    assert (failing.deaths, failing.reason) == (4, "died")
    assert failing.retry_in_s == pytest.approx(0.8)


def test_work_forgives_one_death_for_each_while_and_coming_up_forgives_none() -> None:
    deaths = Deaths()
    for i in range(5):
        lives(deaths, i, None)
    assert lives(deaths, 10.0, 3 * FORGIVEN_S) == delay_s(5 - 3 + 1, came_up=True)
    assert lives(deaths, 100.0, FORGIVEN_S - 0.1) == delay_s(4, came_up=True)
    assert lives(deaths, 200.0, 100 * FORGIVEN_S) == 0.0
    assert deaths.status(1e6) != ()  # it is away


def test_an_actor_that_nobody_asks_is_forgiven_later() -> None:
    deaths = Deaths()
    for i in range(3):
        lives(deaths, i, None)
    deaths.begin("a", 10.0)
    deaths.came_up(report(), 10.0)
    assert deaths.status(10.0 + FORGIVEN_IDLE_S - 1)[0].deaths == 3
    assert deaths.status(10.0 + FORGIVEN_IDLE_S)[0].deaths == 2
    assert deaths.status(10.0 + 2 * FORGIVEN_IDLE_S) == ()


def test_a_load_that_fails_again_and_again_backs_off_and_says_so() -> None:
    deaths = Deaths()
    no_room = Death("n1 lacks 5 bytes", True, needed_bytes=9, missing_bytes=5)
    delays = [fails_to_load(deaths, 100.0 * i, no_room) for i in range(12)]
    assert delays[:3] == [FIRST_RETRY_S, 2 * FIRST_RETRY_S, 4 * FIRST_RETRY_S]
    assert delays[-2:] == [MAX_RETRY_S] * 2
    [failing] = deaths.status(1100.0 + 18.0)
    assert deaths.place_of("a") == ("n1", "cpu")
    assert failing == FailingActor("a", 12, "n1 lacks 5 bytes", "n1", "cpu", 42.0, 0, 9, 5)
    assert failing_line(failing) == (
        "a on cpu, n1 fails: 12 deaths in a row, next start in 42.0 s; n1 lacks 5 bytes"
    )
    deaths.forget("a")
    assert (deaths.status(1118.0), deaths.place_of("a")) == ((), ("", ""))


def test_an_actor_is_broken_after_a_few_failed_tests_in_a_row() -> None:
    deaths = Deaths()
    deaths.begin("a", 0.0)
    deaths.came_up(report(), 0.0)
    for failed, is_broken in ((0, False), (BROKEN_TESTS - 1, False), (0, False), (3, True)):
        deaths.observe(report(failed_tests=failed), 1.0)
        assert deaths.is_broken("a") == is_broken
    [failing] = deaths.status(1.0)
    assert (failing.deaths, failing.failed_tests, failing.reason) == (0, 3, "boom")
    assert "3 failed self-tests in a row; boom" in failing_line(failing)


def test_work_before_the_first_failed_test_counts_and_time_after_it_does_not() -> None:
    deaths = Deaths()
    for i in range(4):
        lives(deaths, i, None)
    deaths.begin("a", 10.0)
    deaths.came_up(report(), 10.0)
    deaths.observe(report(steps=1), 10.0)
    deaths.observe(report(steps=9, failed_tests=1), 10.0 + FORGIVEN_S)
    assert deaths.status(10.0 + 50 * FORGIVEN_S)[0].deaths == 3


def test_a_node_is_avoided_after_a_broken_actor_at_once() -> None:
    deaths = Deaths()
    deaths.begin("a", 0.0)
    deaths.came_up(report(), 0.0)
    deaths.observe(report(steps=1), 0.0)
    deaths.observe(report(steps=9, failed_tests=3), 1000.0)
    assert deaths.avoided_nodes(1000.0) == {}
    deaths.ended("a", Death("boom", is_of_place=True), 1000.0)
    assert deaths.avoided_nodes(1000.0) == {"n1": 1000.0 + AVOID_NODE_S}
    assert deaths.avoided_nodes(1000.0 + AVOID_NODE_S) == {}


def test_one_death_is_no_nodes_fault_and_the_next_at_once_after_it_is() -> None:
    deaths = Deaths()
    lives(deaths, 0.0, 1000.0)
    assert deaths.avoided_nodes(1000.0) == {}
    lives(deaths, 1001.0, 1.0, "n2")
    assert deaths.avoided_nodes(1002.0).keys() == {"n2"}
    lives(deaths, 1100.0, 3 * FORGIVEN_S, "n3")  # it has worked there
    assert "n3" not in deaths.avoided_nodes(1130.0)


@pytest.mark.parametrize(("other_node", "avoided"), [("n1", {"n1"}), ("n2", set())])
def test_deaths_of_actors_on_several_nodes_at_a_time_are_no_nodes_fault(
    other_node: str, avoided: set[str]
) -> None:
    deaths = Deaths()
    for now_s in 0.0, 5.0:
        for actor_id, node in ("a", "n1"), ("b", other_node):
            came_up = replace(report(node, steps=1), actor_id=actor_id)
            deaths.begin(actor_id, now_s)
            deaths.came_up(came_up, now_s)
            deaths.observe(came_up, now_s)
        for actor_id in "a", "b":
            deaths.ended(actor_id, DIED, now_s + 1.0)
    assert deaths.avoided_nodes(7.0).keys() == avoided


def test_a_node_that_stays_bad_is_avoided_longer_each_time() -> None:
    deaths, now_s, avoided = Deaths(), 0.0, []
    for _ in range(9):
        fails_to_load(deaths, now_s)
        until_s = next(t for t in itertools.count(int(now_s)) if not deaths.avoided_nodes(t))
        avoided.append(until_s - now_s)
        now_s = float(until_s)
    assert avoided[:3] == [AVOID_NODE_S, 2 * AVOID_NODE_S, 4 * AVOID_NODE_S]
    assert avoided[-1] == MAX_AVOID_NODE_S
    now_s += MAX_AVOID_NODE_S + 1
    fails_to_load(deaths, now_s)
    assert deaths.avoided_nodes(now_s + AVOID_NODE_S) == {}


@pytest.mark.parametrize("node", ["", "n1"])
def test_a_checkpoint_that_cannot_be_read_is_no_nodes_fault(node: str) -> None:
    deaths = Deaths()
    for i in range(3):
        fails_to_load(deaths, i, Death("no such file"), node)
    assert deaths.avoided_nodes(3.0) == {}
