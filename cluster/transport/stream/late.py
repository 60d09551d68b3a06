"""The wait for answers that are late: time for each call, and actors that are gone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from cluster.transport.base import GONE_CHECK_S, Call, CallFailure, IsGone, Outcome

LATE_READ_S = 1.0
"""The longest time for which answers that have arrived are read after their calls' time is over."""


class Late(Protocol):
    """The calls that are waited for: :class:`cluster.transport.stream.client.StreamCalls`."""

    calls: Sequence[Call]
    unanswered: dict[int, int]
    outcomes: list[Outcome]
    until_s: list[float]
    sent_at_s: float

    def forget(self, call_id: int, /) -> int:
        """Wait no longer for a call; returns its index."""
        ...


class Receiver(Protocol):
    """Receives them: :class:`cluster.transport.stream.client.StreamTransport`."""

    waits_since_s: float

    def receive_any(self, waiting: Any, timeout_s: float, /) -> bool:
        """Wait for an answer; returns whether any connection had bytes to read."""
        ...

    def moved_at_s(self, call_id: int, call: Call, /) -> float:
        """Return when a byte of a call left last."""
        ...


def wait_for_any(calls: Late, transport: Receiver, is_gone: IsGone, check_at_s: float) -> None:
    """Wait for all streams at once, until every call is answered or given up.

    ``is_gone`` is asked from ``check_at_s`` on, each ``GONE_CHECK_S``.
    """
    read_until_s: float | None = None
    transport.waits_since_s = time.monotonic()
    while calls.unanswered:
        now_s = time.monotonic()
        if now_s >= check_at_s:
            _give_up(calls, transport, is_gone, now_s)
            check_at_s = now_s + GONE_CHECK_S
            continue
        _extend(calls, transport, now_s)
        until_s = min(calls.until_s[index] for index in calls.unanswered.values())
        # Also after its time: an answer that arrived while this thread did not wait counts.
        timeout_s = max(0.0, min(until_s, check_at_s) - now_s)
        has_bytes = transport.receive_any(calls, timeout_s)
        late = [call_id for call_id, i in calls.unanswered.items() if calls.until_s[i] <= now_s]
        if not late:
            read_until_s = None
            continue
        read_until_s = now_s + LATE_READ_S if read_until_s is None else read_until_s
        if has_bytes and now_s < read_until_s:  # more of an answer may lie in the socket
            continue
        for call_id in late:
            calls.forget(call_id)


def _since_s(calls: Late, transport: Receiver, call_id: int, index: int) -> float:
    """Return from when the time of a call counts: its last byte, or the last that moved."""
    return max(calls.sent_at_s, transport.moved_at_s(call_id, calls.calls[index]))


def _extend(calls: Late, transport: Receiver, now_s: float) -> None:
    """Give more time to late calls of which bytes have left meanwhile."""
    for call_id, index in calls.unanswered.items():
        if calls.until_s[index] <= now_s:
            call = calls.calls[index]
            until_s = _since_s(calls, transport, call_id, index) + call.timeout_s
            calls.until_s[index] = min(until_s, call.end_s)


def _give_up(calls: Late, transport: Receiver, is_gone: IsGone, now_s: float) -> None:
    """Wait no longer for the answers of actors that are gone."""
    gone = [
        call_id
        for call_id, index in calls.unanswered.items()
        if is_gone(calls.calls[index], now_s - _since_s(calls, transport, call_id, index))
    ]
    for call_id in gone:
        calls.outcomes[calls.forget(call_id)] = CallFailure.DIED
