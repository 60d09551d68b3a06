"""What a command waits for before it shuts Serve down."""

from __future__ import annotations

import time
from threading import Event

import pytest

from router.ops.startup import drain as module
from router.ops.startup.drain import UnderWay, drain, end_requests


class FakeGateways:
    """Gives these numbers of requests, one at each question, and then the last for ever."""

    def __init__(self, *requests: int | None, limit_s: float = 60.0) -> None:
        self.left = list(requests)
        self.limit_s = limit_s
        self.asked: list[bool] = []

    def shut_down(self, ends_requests: bool) -> UnderWay | None:
        self.asked.append(ends_requests)
        requests = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        return None if requests is None else UnderWay(requests, self.limit_s)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits."""
    monkeypatch.setattr(module, "POLL_S", 0.001)
    monkeypatch.setattr(module, "SILENCE_S", 0.1)
    monkeypatch.setattr(module, "END_S", 0.1)


def test_all_requests_may_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 10.0)  # a busy machine makes no gateway silent
    gateways, begun = FakeGateways(3, None, 2, 1, 0), []
    assert drain(gateways, Event(), begun.append) == 0
    assert begun == [UnderWay(3, 60.0)]
    assert gateways.asked == [False] * 5


def test_the_longest_request_bounds_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.0)
    gateways = FakeGateways(2, limit_s=0.2)
    started_s = time.monotonic()
    assert drain(gateways, Event(), lambda _: None) == 2
    assert 0.2 <= time.monotonic() - started_s < 60.0
    assert len(gateways.asked) > 2


@pytest.mark.parametrize("requests", [(None,), (2, None)])
def test_gateways_that_fall_silent_are_not_waited_for(requests: tuple[int | None, ...]) -> None:
    left = drain(FakeGateways(*requests), Event(), lambda _: None)
    assert left == (requests[0] or 0)


@pytest.mark.parametrize(("requests", "num_asked"), [((2, 1, 0), 3), ((None,), 1)])
def test_ended_requests_are_waited_for(requests: tuple[int | None, ...], num_asked: int) -> None:
    gateways = FakeGateways(*requests)
    end_requests(gateways)
    assert gateways.asked == [True] * num_asked


def test_ended_requests_are_waited_for_a_moment_only() -> None:
    stuck = FakeGateways(1)
    end_requests(stuck)
    assert len(stuck.asked) > 1
