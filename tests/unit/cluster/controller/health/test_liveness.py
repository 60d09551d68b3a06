"""When an actor counts as hung: rows wait and nothing is computed, or nothing is answered.

Not where only the controller does not hear it, as far as routers and the other actors tell.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.controller.health.liveness import (
    CONFIRM_S,
    HUNG_S,
    LAST_COPY_S,
    LOOK_S,
    PROBE_S,
    SILENT_S,
    SUSPECTED_S,
    TOGETHER_S,
    Progress,
    Signs,
    Silence,
    Silences,
    Verdict,
    has_last_copy,
)
from cluster.spec import ExpertKey

SUSPECTED = Signs(is_suspected=True)
CONFIRMED = Signs(is_suspected=True, hears_others=True)


def test_an_actor_is_hung_once_rows_have_waited_for_the_time_since_its_last_step() -> None:
    idle, busy, hung = Progress(0.0), Progress(0.0), Progress(0.0)
    assert not any(idle.is_hung(3, 0, t * HUNG_S) for t in range(5))
    assert not any(busy.is_hung(t, 1000, t * HUNG_S) for t in range(5))
    looks = [(1, HUNG_S - 1), (2, HUNG_S), (2, 2 * HUNG_S - 0.1), (2, 2 * HUNG_S)]
    assert [hung.is_hung(steps, 5, at_s) for steps, at_s in looks] == [False] * 3 + [True]


class Cluster:
    """Silences of actors that fell silent at given times, looked at every ``LOOK_S``."""

    def __init__(self, size: int, silent_since_s: dict[str, float]) -> None:
        self.silences = Silences()
        self.now_s = 0.0
        self.since_s = silent_since_s
        self.open: dict[str, Silence] = {}
        for number in range(size):
            self.silences.note(f"a{number}", None)

    def until(self, now_s: float) -> None:
        while self.now_s < now_s - 1e-9:
            self.now_s += LOOK_S
            for actor_id, since_s in self.since_s.items():
                if self.now_s >= since_s:
                    silence = self.open.setdefault(actor_id, Silence(since_s))
                    silence.look(self.now_s)
                    self.silences.note(actor_id, silence)

    def answers(self, *actor_ids: str) -> None:
        for actor_id in actor_ids:
            del self.since_s[actor_id]
            self.open.pop(actor_id)
            self.silences.note(actor_id, None)

    def verdict(
        self, actor_id: str, signs: Signs | None = None, goes_later: bool = False
    ) -> Verdict:
        """Decide by signs of the moment; without any, no router says anything."""
        return self.silences.verdict(actor_id, signs or Signs(), lambda: goes_later, self.now_s)

    def replaced_at_s(self, actor_id: str, signs: Signs | None = None) -> float:
        while self.verdict(actor_id, signs) is not Verdict.REPLACED:
            self.until(self.now_s + LOOK_S)
            assert self.now_s < 1000.0
        return self.now_s


@pytest.mark.parametrize(
    ("signs", "limit_s"), [(SUSPECTED, SUSPECTED_S), (None, SILENT_S)], ids=str
)
def test_silence_lasts_less_long_where_a_router_waits(signs: Signs | None, limit_s: float) -> None:
    cluster = Cluster(4, {"a0": 0.0})
    cluster.until(LOOK_S)
    hung_s = cluster.replaced_at_s("a0", signs)
    assert limit_s <= hung_s + 1e-6 < limit_s + 2 * LOOK_S


def test_a_suspicion_counts_from_the_heartbeats_sending() -> None:
    cluster = Cluster(4, {"a0": 0.0})
    cluster.until(SUSPECTED_S + 2 * LOOK_S)
    assert cluster.verdict("a0") is Verdict.WAITS
    assert cluster.verdict("a0", SUSPECTED) is Verdict.REPLACED


def test_what_kept_the_caller_from_looking_is_not_held_against_the_actor() -> None:
    """The whole machine may have stood still, or have been far too busy."""
    silence = Silence(0.0)
    silence.look(3600.0)
    assert silence.silent_s == LOOK_S
    for number in range(1, 7):
        silence.look(3600.0 + 7 * number * LOOK_S)
    assert silence.silent_s == pytest.approx(7 * LOOK_S)


def test_an_actor_that_a_router_hears_is_kept_as_long_as_it_does() -> None:
    cluster = Cluster(4, {"a0": 10.0})
    cluster.until(10.0 + SILENT_S + LOOK_S)
    # An answer from before the silence says nothing.
    assert cluster.verdict("a0", Signs(heard_at_s=10.0)) is Verdict.REPLACED
    cluster.until(60.0)
    assert cluster.verdict("a0", Signs(heard_at_s=59.5)) is Verdict.HEARD
    # One router may hear what another waits for in vain.
    assert cluster.verdict("a0", Signs(True, True, heard_at_s=59.9)) is Verdict.HEARD
    assert cluster.verdict("a0", Signs(heard_at_s=60.0 - SILENT_S - 0.1)) is Verdict.REPLACED
    # Routers have their time to say whom they hear.
    assert cluster.verdict("a0", Signs(is_asked=False)) is Verdict.WAITS


@pytest.mark.parametrize(
    ("size", "silent", "expected"),
    [
        (1, 1, Verdict.REPLACED),
        (2, 1, Verdict.REPLACED),
        (2, 2, Verdict.CUT_OFF),
        (3, 1, Verdict.REPLACED),
        (3, 2, Verdict.CUT_OFF),
        (8, 3, Verdict.REPLACED),
        (8, 4, Verdict.CUT_OFF),
        (8, 8, Verdict.CUT_OFF),
    ],
)
def test_where_half_of_all_fall_silent_the_controller_suspects_itself(
    size: int, silent: int, expected: Verdict
) -> None:
    cluster = Cluster(size, {f"a{number}": 0.1 * number for number in range(silent)})
    cluster.until(SILENT_S + 1.0)
    assert cluster.verdict("a0") is expected
    cluster.until(10 * CONFIRM_S)
    assert cluster.verdict("a0") is expected


def test_slow_heartbeats_and_silences_that_began_long_before_are_no_silence_together() -> None:
    cluster = Cluster(3, {"a0": 0.0, "a1": 1.5 * TOGETHER_S})
    cluster.until(1.5 * TOGETHER_S + SILENT_S + LOOK_S)
    assert cluster.verdict("a1") is Verdict.REPLACED
    late_s = SILENT_S - PROBE_S / 2
    cluster = Cluster(4, {"a0": 0.0, "a1": late_s, "a2": late_s})
    cluster.until(SILENT_S)
    assert cluster.verdict("a0") is Verdict.REPLACED


def test_where_many_are_silent_a_suspicion_waits_for_what_routers_hear_after_it() -> None:
    """A network that was cut brings it late."""
    late = replace(CONFIRMED, is_suspicion_new=True)
    for silent, alone, hearing_others in (
        (1, Verdict.REPLACED, Verdict.REPLACED),
        (2, Verdict.CUT_OFF, Verdict.WAITS),
    ):
        cluster = Cluster(4, {f"a{number}": 0.0 for number in range(silent)})
        cluster.until(SUSPECTED_S + LOOK_S)
        assert cluster.verdict("a0", late) is hearing_others
        assert cluster.verdict("a0", SUSPECTED) is alone
        assert cluster.verdict("a0", CONFIRMED) is Verdict.REPLACED


def test_where_the_network_has_just_come_back_a_suspicion_waits_too() -> None:
    late = replace(CONFIRMED, is_suspicion_new=True)
    cluster = Cluster(6, {f"a{number}": 0.0 for number in range(6)})
    cluster.until(SILENT_S + LOOK_S)
    assert cluster.verdict("a0") is Verdict.CUT_OFF
    cluster.answers("a2", "a3", "a4", "a5")
    assert cluster.verdict("a0", late) is Verdict.WAITS
    assert cluster.verdict("a0", CONFIRMED) is Verdict.REPLACED
    cluster.until(cluster.now_s + SILENT_S + LOOK_S)
    assert cluster.verdict("a0", late) is Verdict.REPLACED


@pytest.mark.parametrize("heard_at_s", [10.0, -math.inf])
def test_a_controller_that_is_deaf_gives_an_actor_its_whole_time(heard_at_s: float) -> None:
    """Routers hear one that is silent, so one answer that a router waits for may be lost alone."""
    signs = replace(CONFIRMED, heard_at_s=heard_at_s)
    for silent in (1, 2):
        cluster = Cluster(4, {f"a{number}": 9.2 for number in range(silent)})
        cluster.until(10.1)
        others = [f"a{number}" for number in range(1, silent)]
        heard = [cluster.verdict(other, replace(CONFIRMED, heard_at_s=10.0)) for other in others]
        assert heard == [Verdict.HEARD] * len(others)
        cluster.until(11.0)
        assert cluster.verdict("a0", signs) is (Verdict.WAITS if others else Verdict.REPLACED)
        cluster.until(9.3 + SILENT_S)
        kept = others and heard_at_s > 0.0
        assert cluster.verdict("a0", signs) is (Verdict.HEARD if kept else Verdict.REPLACED)
        cluster.until(10.2 + SILENT_S)
        assert cluster.verdict("a0", signs) is Verdict.REPLACED


def test_a_deaf_controller_waits_until_a_router_that_hears_others_has_asked_again() -> None:
    """Its word that it waits in vain may be of the time when nobody heard anybody."""
    cluster = Cluster(4, {f"a{number}": 0.0 for number in range(4)})
    cluster.until(SILENT_S + LOOK_S)
    assert cluster.verdict("a1", Signs(heard_at_s=cluster.now_s)) is Verdict.HEARD
    assert cluster.verdict("a0", SUSPECTED) is Verdict.CUT_OFF
    came_back_at_s = cluster.now_s
    replaced_s = cluster.replaced_at_s("a0", CONFIRMED)
    assert SUSPECTED_S <= replaced_s - came_back_at_s + 1e-6 < SUSPECTED_S + 2 * LOOK_S
    assert cluster.verdict("a0", replace(CONFIRMED, heard_at_s=cluster.now_s)) is Verdict.HEARD


def test_a_router_that_hears_nobody_may_be_cut_off_with_the_controller() -> None:
    cluster = Cluster(4, {f"a{number}": 0.0 for number in range(4)})
    cluster.until(LOOK_S)
    replaced_s = cluster.replaced_at_s("a0", SUSPECTED)
    assert CONFIRM_S <= replaced_s + 1e-6 < CONFIRM_S + 2 * LOOK_S


@pytest.mark.parametrize(
    ("members_at_s", "expected"),
    [(None, Verdict.REPLACED), (0.5, Verdict.CUT_OFF), (3.0, Verdict.REPLACED)],
)
def test_the_controller_of_one_actor_goes_by_whether_routers_call(
    members_at_s: float | None, expected: Verdict
) -> None:
    cluster = Cluster(1, {"a0": 1.0})
    cluster.until(1.0 + SILENT_S + LOOK_S)
    assert cluster.verdict("a0", Signs(members_at_s=members_at_s)) is expected


def test_after_a_silence_of_many_each_gets_its_whole_time_again() -> None:
    cluster = Cluster(4, {f"a{number}": 0.0 for number in range(4)})
    cluster.until(10.0)
    assert cluster.verdict("a0") is Verdict.CUT_OFF
    cluster.answers("a1", "a2", "a3")
    cluster.until(10.0 + SILENT_S - LOOK_S)
    assert cluster.verdict("a0") is Verdict.WAITS
    cluster.until(10.0 + SILENT_S + LOOK_S)
    assert cluster.verdict("a0") is Verdict.REPLACED


def test_a_last_copy_goes_later_but_not_for_ever() -> None:
    cluster = Cluster(4, {"a0": 0.0})
    cluster.until(SILENT_S + LOOK_S)
    assert cluster.verdict("a0", goes_later=True) is Verdict.LAST_COPY
    cluster.until(SILENT_S + LAST_COPY_S + LOOK_S)
    assert cluster.verdict("a0", goes_later=True) is Verdict.REPLACED


def test_of_two_actors_with_the_last_copies_one_goes_first() -> None:
    keys = [ExpertKey("m", 0, number) for number in range(3)]
    holders = {keys[0]: ("a", "b"), keys[1]: ("b", "c"), keys[2]: ("d",)}
    assert not has_last_copy("a", holders, {"a", "b"}, ())
    assert has_last_copy("b", holders, {"a", "b"}, ())
    assert not has_last_copy("b", holders, {"b"}, ())  # the other copies live
    # Once the first is gone, the second waits until its successor has loaded.
    holders[keys[0]] = ("b",)
    assert has_last_copy("b", holders, {"b"}, {keys[0]})
    assert not has_last_copy("b", holders, {"b"}, ())
    # With one copy of each expert nobody waits for anybody.
    assert not has_last_copy("d", holders, {"a", "b", "d"}, {keys[0]})
