"""Dispatch over experts with several copies: who is asked, and who is when that one fails."""

from __future__ import annotations

import itertools
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    ExpertUnavailableError,
    FrameError,
    InternalError,
    OverloadedError,
    WrongPlacementError,
)
from cluster.spec import FRAME_VERSION
from cluster.transport.base import Call, CallFailure, IsGone, Outcome, never_gone
from cluster.wire.frames import DispatchFrame, ErrorFrame, encode
from router.moe import dispatch as dispatch_module
from router.moe.failures import MAX_REFUSALS
from router.moe.pace import SLACK
from tests.local_cluster import Answered, LocalCluster, greedy_request

Tokens = list[tuple[int, ...]]
PROMPTS = [[5, 9, 11], [7] * 30, list(range(2, 60))]
LENGTH, FEW = 12, 2
NUMBERS = itertools.count()


def answer_of(error: ExpertMeshError) -> bytes:
    return b"".join(encode(ErrorFrame(0, type(error).__name__, error)))


DAMAGED = b"".join(encode(ErrorFrame.of_damage()))
REFUSED = answer_of(FrameError("is damaged", "frame"))
"""What an actor answers to a frame that it cannot read."""
FAILED = answer_of(InternalError("the batch failed"))
"""What an actor answers to a frame on which its device fails."""
MOVED = answer_of(WrongPlacementError("is not held here", "a0"))
"""What an actor answers that does not hold the expert, since the router's placement is old."""


@pytest.fixture
def make(folder: Path) -> Iterator[Callable[[int], LocalCluster]]:
    """Makes clusters of three actors with so many copies, and closes them."""
    with ExitStack() as stack:

        def make(min_copies: int) -> LocalCluster:
            cluster = LocalCluster(folder, 3, min_copies=min_copies)
            stack.callback(cluster.close)
            return cluster

        yield make


@pytest.fixture
def cluster(make: Callable[[int], LocalCluster]) -> LocalCluster:
    return make(2)


@pytest.fixture
def alone(make: Callable[[int], LocalCluster]) -> LocalCluster:
    return make(1)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tokens:
    with closing(LocalCluster(folder, 3)) as cluster:
        return tokens_of(cluster)


def tokens_of(cluster: LocalCluster, length: int = LENGTH) -> Tokens:
    """Generate for all prompts, one after another, so that batches are the same every time."""
    found = []
    for prompt in PROMPTS:
        [[event]] = cluster.generate(greedy_request(f"r{next(NUMBERS)}", prompt, length))
        found.append(event.token_ids)
    return found


def noted(
    cluster: LocalCluster, fail: Callable[[Call], CallFailure | bytes | None] = lambda call: None
) -> list[tuple[Call, DispatchFrame]]:
    """Let calls fail, and note all of them with their frames."""
    calls: list[tuple[Call, DispatchFrame]] = []

    def note(call: Call, number: int) -> CallFailure | bytes | None:
        calls.append((call, cluster.transport.frames[-1]))
        return fail(call)

    cluster.transport.fail = note
    return calls


def test_tokens_do_not_depend_on_the_copies_and_the_actors_share_the_work(
    cluster: LocalCluster, expected: Tokens
) -> None:
    calls, rows = noted(cluster), Counter[str]()
    assert tokens_of(cluster) == expected
    for call, frame in calls:
        rows[call.actor_id] += frame.num_rows
    assert min(rows.values()) > 0.8 * max(rows.values())


@pytest.mark.parametrize(
    "failure",
    [
        CallFailure.DIED,
        CallFailure.TIMED_OUT,
        CallFailure.UNREACHABLE,
        b"garbage",
        REFUSED,
        answer_of(OverloadedError("full", "queue", 0.01)),
        FAILED,
    ],
    ids=["died", "timed_out", "unreachable", "garbage", "refused", "overloaded", "failed"],
)
def test_where_one_copy_fails_another_is_asked_at_once(
    cluster: LocalCluster,
    expected: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    failure: CallFailure | bytes,
) -> None:
    def no_wait(*_: object) -> None:
        raise AssertionError("there is another copy")

    monkeypatch.setattr(dispatch_module, "back_off", no_wait)
    cluster.transport.fail = lambda call, number: failure if call.actor_id == "a1" else None
    assert tokens_of(cluster) == expected
    asked = Counter(cluster.dispatcher.retries)
    if isinstance(failure, CallFailure) or failure is FAILED:
        # It is left alone after its first failure, and the controller is told.
        assert asked == {"InternalError" if failure is FAILED else failure.value: 1}
        assert cluster.suspected == [("a1", 1)]
    else:
        assert asked.total() > 1
        assert cluster.suspected == []


@pytest.mark.parametrize(
    ("answer", "times", "reason"),
    [(REFUSED, MAX_REFUSALS, "malformed"), (DAMAGED, 2 * MAX_REFUSALS, "damaged")],
)
def test_a_frame_damaged_on_its_way_is_sent_again(
    alone: LocalCluster, expected: Tokens, answer: bytes, times: int, reason: str
) -> None:
    sent: Counter[str] = Counter()

    def damage(call: Call, number: int) -> bytes | None:
        sent[call.actor_id] += 1
        return answer if sent[call.actor_id] % times else None

    alone.transport.fail = damage
    assert tokens_of(alone, FEW) == [tokens[:FEW] for tokens in expected]
    assert alone.dispatcher.retries == {reason: sum(sent.values()) * (times - 1) // times}
    assert alone.suspected == []


@pytest.mark.parametrize("min_copies", [1, 2])
def test_a_frame_that_is_always_refused_is_our_own_fault(
    make: Callable[[int], LocalCluster], expected: Tokens, min_copies: int
) -> None:
    cluster = make(min_copies)
    calls = noted(cluster, lambda call: REFUSED)
    with pytest.raises(InternalError):
        cluster.generate(greedy_request("ours", [3], 1))
    refused = Counter((f.layer_id, expert_id) for _, f in calls for expert_id in f.expert_ids)
    assert max(refused.values()) == MAX_REFUSALS
    cluster.transport.fail = lambda call, number: None
    assert tokens_of(cluster) == expected


def test_an_actor_that_is_not_ready_is_asked_only_where_there_is_no_other(
    cluster: LocalCluster, expected: Tokens
) -> None:
    calls = noted(cluster)
    cluster.transport.unready = {"a1"}
    assert tokens_of(cluster) == expected
    assert {call.actor_id for call, _ in calls} == {"a0", "a2"}
    cluster.transport.unready = {"a0", "a1", "a2"}
    assert tokens_of(cluster) == expected
    assert "a1" in {call.actor_id for call, _ in calls}


def test_where_the_other_copy_has_no_connection_a_refusing_one_is_asked_after_a_moment(
    cluster: LocalCluster, expected: Tokens
) -> None:
    """Seed 4292: it was asked again at once, ten thousand times a second."""
    asked: Counter[bool] = Counter()
    refusing_until_s = time.monotonic() + 0.5

    def refuse(call: Call, number: int) -> bytes | None:
        is_refused = call.actor_id == "a0" and time.monotonic() < refusing_until_s
        asked[is_refused] += 1
        return MOVED if is_refused else None

    cluster.transport.fail = refuse
    cluster.transport.unready = {"a1"}
    assert tokens_of(cluster) == expected
    assert 0 < asked[True] < 60


def test_only_the_failed_actors_rows_are_sent_again(cluster: LocalCluster) -> None:
    calls = noted(cluster, lambda call: CallFailure.DIED if call.actor_id == "a0" else None)
    cluster.generate(greedy_request("r", [3], 1))
    [lost] = [frame.num_rows for call, frame in calls if call.actor_id == "a0"]
    layers = 3
    assert sum(frame.num_rows for _, frame in calls) == layers * 2 + lost


def test_a_failed_actor_is_asked_where_no_other_is_left(
    cluster: LocalCluster, expected: Tokens
) -> None:
    failures = iter([CallFailure.DIED] * 9)
    cluster.transport.fail = lambda call, number: next(failures, None)
    assert tokens_of(cluster) == expected


def test_calls_say_whether_another_actor_can_answer(cluster: LocalCluster) -> None:
    calls = noted(cluster)
    cluster.generate(greedy_request("both", [3], 4))
    assert all(call.replaceable for call, _ in calls)
    calls.clear()
    cluster.view.publish(cluster.placement.without("a0").without("a1"))
    with pytest.raises(ExpertUnavailableError):
        cluster.generate(greedy_request("one", [3], 4, timeout_s=0.5))
    assert not any(call.replaceable for call, _ in calls)


def test_an_only_copy_that_takes_too_long_is_suspected_and_still_waited_for(
    alone: LocalCluster, expected: Tokens
) -> None:
    assert tokens_of(alone) == expected
    assert alone.suspected == []
    asked: list[bool] = []

    @dataclass
    class Slow(Answered):
        def wait(self, is_gone: IsGone = never_gone) -> list[Outcome]:
            dispatcher, call = alone.dispatcher, Call("a1", 1, (), 5.0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dispatcher._pace, "stall_s", lambda rows: 3600.0)
                asked.append(is_gone(call, 1.0))
                assert alone.suspected == []
                patch.setattr(dispatcher._pace, "stall_s", lambda rows: 0.0)
                asked.append(is_gone(call, 1.0))
            return self.outcomes

    send = alone.transport.send
    pending_calls = iter([Slow])
    alone.transport.send = lambda calls: next(pending_calls, Answered)(  # type: ignore[method-assign]
        send(calls).outcomes
    )
    assert tokens_of(alone) == expected
    assert asked == [False, False]
    assert alone.suspected == [("a1", 1)]
    assert not alone.dispatcher.retries


@pytest.mark.parametrize("took_s", [None, 2.0])
def test_the_routers_own_time_is_not_kept_as_that_of_its_actors(
    cluster: LocalCluster, expected: Tokens, took_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that were there before the wait have no known time."""
    monkeypatch.setattr(Answered, "took_s", took_s)
    assert tokens_of(cluster) == expected
    stall_s = cluster.dispatcher._pace.stall_s(1)
    assert stall_s == (float("inf") if took_s is None else SLACK * took_s)


def test_an_answer_is_waited_for_shortly_only_where_another_actor_can_give_it(
    cluster: LocalCluster,
) -> None:
    calls, started_s = noted(cluster), time.monotonic()
    cluster.generate(greedy_request("r", [3], 8))
    took_s, limits = time.monotonic() - started_s, [call.timeout_s for call, _ in calls]
    assert limits[0] == pytest.approx(5.0, abs=0.5)  # nothing was answered before
    assert limits[-1] <= max(0.5, 3 * took_s)


def test_a_deadline_within_an_answers_usual_time_is_no_experts_fault(alone: LocalCluster) -> None:
    request = greedy_request("short", PROMPTS[0], LENGTH, timeout_s=0.3)

    def outlast(call: Call, number: int) -> None:
        if number == 5:
            threading.Event().wait(max(0.0, request.deadline_s - time.monotonic()))

    alone.transport.fail = outlast
    with pytest.raises(DeadlineExceededError):
        alone.generate(request)
    alone.transport.fail = lambda call, number: CallFailure.DIED
    with pytest.raises(ExpertUnavailableError):
        alone.generate(greedy_request("lost", PROMPTS[0], LENGTH, timeout_s=0.3))


def test_an_actor_whose_frames_have_another_version_is_unavailable(
    alone: LocalCluster, caplog: pytest.LogCaptureFixture
) -> None:
    older = struct.pack("<H", FRAME_VERSION - 1) + REFUSED[2:]
    alone.transport.fail = lambda call, number: older
    with pytest.raises(ExpertUnavailableError), caplog.at_level("WARNING"):
        alone.generate(greedy_request("older", PROMPTS[0], LENGTH, timeout_s=1.0))
    assert alone.dispatcher.retries["malformed"] > 1
    assert f"version {FRAME_VERSION - 1}; this build reads {FRAME_VERSION}" in caplog.text
    assert alone.suspected == []
