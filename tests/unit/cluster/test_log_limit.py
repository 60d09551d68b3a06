"""Log lines that strangers can cause are few, and say how many events they stand for."""

from __future__ import annotations

import time

import pytest

from cluster.log_limit import PERIOD_S, LogLimit


def test_a_line_a_period_stands_for_all_events_since_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    limit = LogLimit()
    assert [limit.count() for _ in range(1000)] == [1] + [0] * 999
    now_s += PERIOD_S
    assert [limit.count(), limit.count()] == [1000, 0]
