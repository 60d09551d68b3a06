"""How soon another copy of an expert is asked."""

from __future__ import annotations

from router.moe.pace import SLACK, STALL_S, LatencyTracker


def test_nothing_is_a_stall_before_anything_was_answered() -> None:
    assert LatencyTracker().stall_s(1) == float("inf")


def test_a_stall_is_longer_than_the_longest_answer_lately() -> None:
    pace = LatencyTracker()
    pace.note(5, 0.01, ())
    assert pace.stall_s(5) == STALL_S
    pace.note(5, 1.0, ())
    assert pace.stall_s(5) == SLACK
    assert pace.stall_s(1) == SLACK  # fewer rows never take longer
    for _ in range(200):
        pace.note(5, 0.01, ())
    assert pace.stall_s(5) == STALL_S  # one slow answer is forgotten


def test_an_answer_that_nobody_waited_for_tells_nothing_but_that_its_actor_lives() -> None:
    pace = LatencyTracker()
    pace.left_out([("a", 1)])
    pace.note(5, None, [("a", 1)])
    assert pace.stall_s(5) == float("inf")
    assert pace.answer_timeout_s("a", 1, 5) == STALL_S
    pace.note(5, 1.0, ())
    pace.note(5, None, ())
    assert pace.stall_s(5) == SLACK


def test_more_rows_than_ever_are_given_more_time() -> None:
    pace = LatencyTracker()
    pace.note(4, 0.25, ())
    assert pace.stall_s(7) == max(STALL_S, SLACK * 0.25)
    assert pace.stall_s(64) == SLACK * 0.25 * 16


def test_patience_doubles_while_an_actor_is_left_out_and_ends_with_its_answer() -> None:
    pace = LatencyTracker()
    assert pace.answer_timeout_s("a", 1, 4) == STALL_S
    pace.note(4, 1.0, ())
    assert pace.answer_timeout_s("a", 1, 4) == SLACK
    pace.left_out([("a", 1)])
    pace.left_out([("a", 1), ("b", 1)])
    assert pace.answer_timeout_s("a", 1, 4) == 4 * SLACK
    assert pace.answer_timeout_s("b", 1, 4) == 2 * SLACK
    assert pace.answer_timeout_s("a", 2, 4) == SLACK  # its successor
    pace.note(4, 1.0, [("a", 1)])
    assert pace.answer_timeout_s("a", 1, 4) == SLACK
    assert pace.answer_timeout_s("b", 1, 4) == 2 * SLACK
