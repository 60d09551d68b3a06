"""Which actors are slow beside their twins, by a clock that the test turns."""

from __future__ import annotations

import pytest

from cluster.placement.slowness import (
    RECOVERED,
    RECOVERY_S,
    SLOW,
    SURE_S,
    UNKNOWN_S,
    SlowActors,
    beside_twins,
)

LIVING = {"a": 1, "b": 1, "c": 1, "d": 1}
KINDS = dict.fromkeys(LIVING, "cpu")


def report(**times: float) -> dict[tuple[str, int], float]:
    return {(actor_id, 1): value for actor_id, value in times.items()}


def test_an_actor_is_compared_with_the_others_of_its_pool_by_the_median_of_its_routers() -> None:
    measured = beside_twins([report(a=1.0, b=1.1, c=0.9, d=5.0)], KINDS, LIVING)
    assert measured == pytest.approx({"a": 1 / 1.1, "b": 1.1, "c": 0.9 / 1.1, "d": 5.0})
    pools = {"a": "gpu", "b": "gpu", "c": "cpu", "d": "cpu"}
    measured = beside_twins([report(a=1.0, b=1.0, c=20.0, d=20.0)], pools, LIVING)
    assert measured == dict.fromkeys(LIVING, 1.0)
    reports = [report(a=1.0, b=times) for times in (1.0, 4.0, 9.0)]
    assert beside_twins(reports, KINDS, LIVING)["b"] == 4.0


def test_actors_without_a_measured_twin_and_earlier_generations_are_left_out() -> None:
    assert beside_twins([report(a=1.0, gone=3.0)], KINDS | {"gone": "cpu"}, LIVING) == {}
    assert beside_twins([{("a", 1): 1.0, ("b", 2): 9.0}], KINDS, LIVING) == {}
    assert beside_twins([], KINDS, LIVING) == {}


class Looks:
    """Looks at the measurements, a second apart."""

    def __init__(self) -> None:
        self.actors = SlowActors()
        self.now_s = 100.0
        self.living = LIVING

    def go_on(self, seconds: float, **slowness: float) -> tuple[list[str], list[str]]:
        """Return the actors that have come and gone meanwhile."""
        came: list[str] = []
        went: list[str] = []
        for _ in range(round(seconds)):
            self.now_s += 1.0
            more = self.actors.look(slowness, self.living, self.now_s)
            came += more[0]
            went += more[1]
        return came, went


def test_an_actor_is_slow_after_a_while_and_said_so_once() -> None:
    looks = Looks()
    assert looks.go_on(SURE_S, a=5.1, b=1.0) == ([], [])
    assert looks.actors.slow == {}
    assert looks.go_on(1, a=5.1, b=1.0) == (["a"], [])
    assert looks.actors.slow == {"a": 5.1}
    assert looks.go_on(100, a=5.2, b=1.0) == ([], [])
    assert looks.actors.slow == {"a": 5.1}  # a change so small moves nothing


def test_a_measurement_that_is_high_for_a_moment_makes_no_actor_slow() -> None:
    looks = Looks()
    for _ in range(10):
        assert looks.go_on(SURE_S - 1, a=9.0) == ([], [])
        assert looks.go_on(1, a=SLOW - 0.1) == ([], [])
    assert looks.actors.slow == {}


def test_a_slow_actor_recovers_only_after_it_was_fast_for_long() -> None:
    looks = Looks()
    looks.go_on(10, a=4.0)
    for _ in range(5):
        assert looks.go_on(RECOVERY_S - 2, a=1.0) == ([], [])
        assert looks.go_on(1, a=4.0) == ([], [])
    assert looks.actors.slow == {"a": 4.0}
    assert looks.go_on(RECOVERY_S + 2, a=1.0) == ([], ["a"])
    assert looks.actors.slow == {}


def test_a_slow_actor_whose_time_changes_much_is_spread_by_the_new_one() -> None:
    looks = Looks()
    looks.go_on(10, a=4.0)
    assert looks.go_on(10, a=12.0) == ([], [])
    assert looks.actors.slow == {"a": 12.0}
    assert looks.go_on(10, a=RECOVERED + 0.1) == ([], [])
    assert looks.actors.slow == {"a": RECOVERED + 0.1}


def test_an_actor_that_is_measured_no_longer_counts_as_slow_for_a_time() -> None:
    looks = Looks()
    looks.go_on(10, a=4.0)
    assert looks.go_on(UNKNOWN_S - 2) == ([], [])
    assert looks.go_on(3) == ([], ["a"])


def test_a_successor_begins_anew() -> None:
    looks = Looks()
    looks.go_on(10, a=4.0)
    looks.living = {**LIVING, "a": 2}
    assert looks.go_on(1) == ([], ["a"])
    assert looks.go_on(10, a=4.0) == (["a"], [])
    del looks.living["a"]
    assert looks.go_on(1) == ([], ["a"])
