"""Dispatch over experts with several copies: who is asked, and who is when that one fails."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.errors import DeadlineExceededError, ExpertUnavailableError, OverloadedError
from cluster.frames import ErrorFrame, encode
from cluster.placement import Placement
from cluster.transport import Call, CallFailure
from router import dispatch as dispatch_module
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster, greedy_request

PROMPTS = [[5, 9, 11], [7] * 30, list(range(2, 60))]
LENGTH = 12
NUMBERS = itertools.count()
Fail = Callable[[Call, int], CallFailure | bytes | None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_mixtral(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[tuple[int, ...]]:
    cluster = LocalCluster(folder, 3)
    try:
        return tokens_of(cluster)
    finally:
        cluster.close()


@pytest.fixture
def cluster(folder: Path) -> Iterator[LocalCluster]:
    cluster = LocalCluster(folder, 3, min_copies=2)
    yield cluster
    cluster.close()


def tokens_of(cluster: LocalCluster) -> list[tuple[int, ...]]:
    """Generate for all prompts, one after another, so that batches are the same every time."""
    found = []
    for prompt in PROMPTS:
        [[event]] = cluster.generate(greedy_request(f"r{next(NUMBERS)}", prompt, LENGTH))
        found.append(event.token_ids)
    return found


def test_tokens_do_not_depend_on_the_copies_and_the_actors_share_the_work(
    cluster: LocalCluster, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: Counter[str] = Counter()

    def count(call: Call, number: int) -> None:
        rows[call.actor_id] += cluster.transport.frames[-1].num_pairs

    cluster.transport.fail = count
    assert tokens_of(cluster) == expected
    assert min(rows.values()) > 0.8 * max(rows.values())


@pytest.mark.parametrize(
    "failure",
    [
        CallFailure.DIED,
        CallFailure.TIMED_OUT,
        b"garbage",
        b"".join(encode(ErrorFrame(0, "OverloadedError", OverloadedError("full", "queue", 0.01)))),
    ],
)
def test_where_one_copy_fails_another_is_asked_at_once(
    cluster: LocalCluster,
    expected: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    failure: CallFailure | bytes,
) -> None:
    def no_wait(*_: object) -> None:
        raise AssertionError("there is another copy")

    monkeypatch.setattr(dispatch_module.Dispatcher, "_wait", no_wait)
    cluster.transport.fail = lambda call, number: failure if call.actor_id == "a1" else None
    assert tokens_of(cluster) == expected
    asked = Counter(cluster.dispatcher.retries)
    if isinstance(failure, CallFailure):
        # It is left alone after its first failure, and the controller is told.
        assert asked == {failure.value: 1}
        assert cluster.suspected == [("a1", 1)]
    else:
        assert asked.total() > 1
        assert cluster.suspected == []


def test_an_actor_that_is_not_ready_is_asked_only_where_there_is_no_other(
    cluster: LocalCluster, expected: list[tuple[int, ...]]
) -> None:
    asked: Counter[str] = Counter()

    def count(call: Call, number: int) -> None:
        asked[call.actor_id] += 1

    cluster.transport.fail = count
    cluster.transport.unready = {"a1"}
    assert tokens_of(cluster) == expected
    assert asked.keys() == {"a0", "a2"}
    cluster.transport.unready = {"a0", "a1", "a2"}
    assert tokens_of(cluster) == expected
    assert asked["a1"] > 0


def test_only_the_failed_actors_rows_are_sent_again(cluster: LocalCluster) -> None:
    sent: list[tuple[str, int]] = []

    def fail(call: Call, number: int) -> CallFailure | None:
        sent.append((call.actor_id, cluster.transport.frames[-1].num_pairs))
        return CallFailure.DIED if call.actor_id == "a0" else None

    cluster.transport.fail = fail
    cluster.generate(greedy_request("r", [3], 1))
    lost = [n for actor_id, n in sent if actor_id == "a0"]
    assert len(lost) == 1
    layers = 3
    assert sum(n for _, n in sent) == layers * 2 + lost[0]


def test_a_failed_actor_is_asked_where_no_other_is_left(
    cluster: LocalCluster, expected: list[tuple[int, ...]]
) -> None:
    failures = iter([CallFailure.DIED] * 9)
    cluster.transport.fail = lambda call, number: next(failures, None)
    assert tokens_of(cluster) == expected


def test_the_next_generation_of_a_failed_actor_is_asked_again(cluster: LocalCluster) -> None:
    asked: Counter[tuple[str, int]] = Counter()

    def fail(call: Call, number: int) -> CallFailure | None:
        asked[call.actor_id, call.generation] += 1
        return CallFailure.DIED if (call.actor_id, call.generation) == ("a0", 1) else None

    cluster.transport.fail = fail
    tokens_of(cluster)
    assert asked["a0", 1] == 1
    held = [key for key, actors in cluster.placement.holders.items() if "a0" in actors]
    cluster.view.publish(cluster.placement.without("a0").with_actor("a0", 2, held))
    tokens_of(cluster)
    assert asked["a0", 2] > 1


def test_calls_say_whether_another_actor_can_answer(cluster: LocalCluster) -> None:
    said: dict[str, set[bool]] = {}

    def note(call: Call, number: int) -> None:
        said.setdefault(call.actor_id, set()).add(call.replaceable)

    cluster.transport.fail = note
    cluster.generate(greedy_request("both", [3], 4))
    assert set().union(*said.values()) == {True}
    said.clear()
    cluster.view.publish(cluster.placement.without("a0").without("a1"))
    with pytest.raises(ExpertUnavailableError):
        cluster.generate(greedy_request("one", [3], 4, timeout_s=0.5))
    assert set().union(*said.values()) <= {False}


def test_an_actor_that_is_no_longer_placed_is_gone(cluster: LocalCluster) -> None:
    call, epoch = Call("a0", 1, ()), cluster.placement.epoch
    assert not cluster.dispatcher._is_gone(epoch, call)
    cluster.view.publish(cluster.placement.without("a0"))
    assert cluster.dispatcher._is_gone(epoch, call)
    # The next controller begins without any: it has not looked yet.
    cluster.view.publish(Placement(epoch + 1, 0, {}, {}))
    assert not cluster.dispatcher._is_gone(epoch, call)
    cluster.view.publish(Placement(epoch + 1, 1, {}, {"a0": 2}))
    assert cluster.dispatcher._is_gone(epoch, call)


def test_an_answer_is_waited_for_shortly_only_where_another_actor_can_give_it(
    cluster: LocalCluster,
) -> None:
    limits: list[float] = []
    begin = cluster.transport.begin

    def recorded(calls: list[Call], timeout_s: float) -> object:
        limits.append(timeout_s)
        return begin(calls, timeout_s)

    cluster.transport.begin = recorded  # type: ignore[assignment,method-assign]
    started_s = time.monotonic()
    cluster.generate(greedy_request("r", [3], 8))
    took_s = time.monotonic() - started_s
    assert limits[0] == pytest.approx(5.0, abs=0.5)  # nothing was answered before
    assert limits[-1] <= max(0.5, 3 * took_s)


def test_a_deadline_within_an_answers_usual_time_is_no_experts_fault(folder: Path) -> None:
    cluster = LocalCluster(folder, 3)
    request = greedy_request("short", PROMPTS[0], LENGTH, timeout_s=0.3)

    def cut_off(call: Call, number: int) -> CallFailure | None:
        if number < 5:
            return None
        threading.Event().wait(max(0.0, request.deadline_s - time.time()))
        return CallFailure.TIMED_OUT

    cluster.transport.fail = cut_off
    try:
        with pytest.raises(DeadlineExceededError):
            cluster.generate(request)
        cluster.transport.fail = lambda call, number: CallFailure.DIED
        with pytest.raises(ExpertUnavailableError):
            cluster.generate(greedy_request("lost", PROMPTS[0], LENGTH, timeout_s=0.3))
    finally:
        cluster.close()
