"""When an actor counts as hung: only while rows wait and nothing is computed."""

from __future__ import annotations

from cluster.progress import HUNG_S, Progress


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
