"""When an actor counts as hung: rows wait and nothing is computed, or nothing is answered."""

from __future__ import annotations

import pytest

from cluster.controller.liveness import HUNG_S, LOOK_S, SILENT_S, SUSPECTED_S, Progress, Silence


def test_an_actor_without_work_is_never_hung() -> None:
    progress = Progress(0.0)
    assert not any(progress.is_hung(3, 0, t * HUNG_S) for t in range(5))


def test_an_actor_that_computes_is_not_hung_however_long_its_queue() -> None:
    progress = Progress(0.0)
    assert not any(progress.is_hung(t, 1000, t * HUNG_S) for t in range(5))


def test_rows_that_wait_without_a_step_make_it_hung_after_the_time() -> None:
    progress = Progress(0.0)
    assert not progress.is_hung(7, 5, 10.0)
    assert not progress.is_hung(7, 5, 10.0 + HUNG_S - 0.1)
    assert progress.is_hung(7, 5, 10.0 + HUNG_S)


def test_the_time_begins_anew_with_each_step() -> None:
    progress = Progress(0.0)
    assert not progress.is_hung(1, 5, HUNG_S - 1)
    assert not progress.is_hung(2, 5, HUNG_S)
    assert not progress.is_hung(2, 5, 2 * HUNG_S - 1)
    assert progress.is_hung(2, 5, 2 * HUNG_S)


def silent_for(is_suspected: bool, period_s: float) -> float:
    """Look every ``period_s``; return when the actor counts as hung."""
    silence, now_s = Silence(100.0), 100.0
    while True:
        now_s += period_s
        if silence.is_hung(is_suspected, now_s):
            return now_s - 100.0


@pytest.mark.parametrize(
    ("is_suspected", "limit_s"), [(True, SUSPECTED_S), (False, SILENT_S)], ids=str
)
def test_silence_lasts_less_long_where_a_router_waits(is_suspected: bool, limit_s: float) -> None:
    hung_s = silent_for(is_suspected, LOOK_S)
    assert limit_s <= hung_s + 1e-6 < limit_s + 2 * LOOK_S


def test_a_suspicion_counts_from_the_heartbeats_sending() -> None:
    silence = Silence(0.0)
    looks = int(SUSPECTED_S / LOOK_S) + 1
    assert not any(silence.is_hung(False, (i + 1) * LOOK_S) for i in range(looks))
    assert silence.is_hung(True, (looks + 1) * LOOK_S)


def test_what_kept_the_caller_from_looking_is_not_held_against_the_actor() -> None:
    """The whole machine may have stood still, or have been far too busy."""
    assert not Silence(0.0).is_hung(True, 3600.0)
    slow_s = 7 * LOOK_S
    assert silent_for(True, slow_s) >= 6 * SUSPECTED_S
