"""Which actors a router hears, and when that says that its own network is up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from unittest.mock import patch

import pytest

from router.control.heard import RECENT_S, HeardActors
from router.moe.pace import note_heard

SOON, LATE = 0.6 * RECENT_S, 1.5 * RECENT_S


@pytest.mark.parametrize(
    ("answers", "hears"),
    [
        ([], False),
        ([("b", 0.0)], False),  # the first since the router began
        ([("b", 0.0), ("b", SOON)], False),
        ([("b", 0.0), ("b", SOON), ("b", 2 * SOON)], True),
        ([("b", 0.0), ("a", SOON), ("b", 2 * SOON)], True),
        ([("b", 0.0), ("a", SOON), ("a", 2 * SOON)], False),  # nobody else lately
        ([("b", 0.0), ("b", SOON), ("b", 2 * SOON), ("b", 2 * SOON + LATE)], False),  # a pause
        ([("b", n * SOON) for n in (0, 1, 2)] + [("b", LATE + n * SOON) for n in (2, 3, 4)], True),
    ],
)
def test_others_are_heard_where_they_have_answered_for_a_while_without_a_pause(
    answers: Sequence[tuple[str, float]], hears: bool
) -> None:
    heard, now_s = HeardActors(), 100.0
    for actor_id, at_s in answers:
        now_s = 100.0 + at_s
        note_heard(heard, actor_id, 1, now_s)
    with patch.object(time, "monotonic", lambda: now_s + 0.01):
        assert heard.hears_others("a") is hears
