"""The queue of a mixture's router: works of requests, their order, and the ends of requests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import CancelledRequestError, OverloadedError
from router.messages.prediction import PredictionReply, PredictionRequest
from router.mixture.queue import Job, Outcome, QueueLimits, Work, WorkQueue

LIMITS = QueueLimits(step_requests=3, step_rows=8, requests=4, rows=100)


def queue_of(*sizes: int, shape: tuple[int, ...] = (2,)) -> tuple[WorkQueue, list[list[Outcome]]]:
    """Return a queue with a request of each size, and the outcomes of each."""
    queue, outcomes = WorkQueue(LIMITS, "x"), []
    for number, size in enumerate(sizes):
        outcomes.append(add(queue, f"r{number}", np.zeros((size, *shape))))
    return queue, outcomes


def add(queue: WorkQueue, request_id: str, rows: np.ndarray, tenant: str = "") -> list[Outcome]:
    outcome: list[Outcome] = []
    request = PredictionRequest(request_id, "m", {"x": rows}, ("y",), math.inf, tenant=tenant)
    queue.add(Job(request, outcome.append, 0.0))
    return outcome


def add_of(queue: WorkQueue, tenant: str, *sizes: int) -> None:
    for number, size in enumerate(sizes):
        add(queue, f"{tenant}{number}", np.zeros((size, 2)), tenant)


def steps_of(queue: WorkQueue) -> list[list[tuple[str, int, int]]]:
    return [spans(queue.take()) for _ in iter(lambda: queue.has_ready, False)]


def spans(works: list[Work]) -> list[tuple[str, int, int]]:
    return [(work.job.request.request_id, work.begin, work.end) for work in works]


def outputs_of(work: Work) -> dict[str, np.ndarray]:
    return {"y": np.arange(work.begin, work.end)}


def test_steps_take_requests_in_order_within_their_bounds() -> None:
    queue, _ = queue_of(10, 3, 2, 0)
    assert spans(queue.take()) == [("r0", 0, 8)]
    assert spans(queue.take()) == [("r0", 8, 10), ("r1", 0, 3), ("r2", 0, 2)]
    assert spans(queue.take()) == [("r3", 0, 0)]
    assert queue.take() == []


def test_rows_of_another_shape_wait_for_the_next_step() -> None:
    queue, _ = queue_of(1)
    add(queue, "longer", np.zeros((1, 3)))
    assert spans(queue.take()) == [("r0", 0, 1)]
    assert spans(queue.take()) == [("longer", 0, 1)]


def test_outputs_are_joined_in_the_order_of_rows_whichever_work_ends_first() -> None:
    queue, [outcome] = queue_of(20)
    works = [work for _ in range(3) for work in queue.take()]
    for work in reversed(works):
        assert outcome == []
        queue.finish(work, outputs_of(work), is_exact=work.begin != 8, identity="i")
    [reply] = outcome
    assert isinstance(reply, PredictionReply)
    assert reply.outputs["y"].tolist() == list(range(20))
    assert (reply.exact, reply.identity) == (False, "i")
    assert (queue.jobs, queue.num_rows) == ({}, 0)


def test_a_work_that_is_computed_again_counts_once() -> None:
    queue, [outcome] = queue_of(12)
    first, second = [work for _ in range(2) for work in queue.take()]
    for _ in range(2):
        queue.finish(second, outputs_of(second), True, "i")
    assert outcome == []  # the rows of the first work are not there yet
    queue.finish(first, outputs_of(first), True, "i")
    [reply] = outcome
    assert isinstance(reply, PredictionReply)
    assert len(reply.outputs["y"]) == 12
    queue.finish(first, outputs_of(first), True, "i")
    assert len(outcome) == 1


def test_an_ended_request_leaves_nothing_behind_and_ends_once() -> None:
    queue, [outcome, other] = queue_of(20, 1)
    [first] = queue.take()
    [second] = queue.take()
    queue.park(second, frozenset({(0, 1)}))
    error = CancelledRequestError("gone")
    for _ in range(2):
        queue.end(first.job, error)
    assert outcome == [error]
    queue.park(first, frozenset({(0, 1)}))
    queue.finish(first, outputs_of(first), True, "i")
    assert queue.parked == []
    assert spans(queue.take()) == [("r1", 0, 1)]
    assert (outcome, other) == ([error], [])


def test_parked_works_go_on_before_others_once_their_experts_are_back() -> None:
    queue, _ = queue_of(1, 1, 1)
    works = queue.take()
    queue.park(works[0], frozenset({(0, 1)}))
    queue.park(works[1], frozenset({(0, 2)}))
    queue.park(works[2], frozenset({(0, 1)}))
    add(queue, "new", np.zeros((1, 2)))
    queue.unpark(lambda awaited: (0, 1) in awaited)
    assert spans(queue.take()) == [("r0", 0, 1), ("r2", 0, 1), ("new", 0, 1)]
    assert spans(queue.parked) == [("r1", 0, 1)]


def test_a_full_queue_refuses_by_its_bound() -> None:
    queue, _ = queue_of(50, 50)
    with pytest.raises(OverloadedError, match="100 rows") as caught:
        add(queue, "more", np.zeros((1, 2)))
    assert caught.value.retry_after_s is not None
    queue, _ = queue_of(1, 1, 1, 1)
    with pytest.raises(OverloadedError, match="4 requests"):
        add(queue, "more", np.zeros((1, 2)))
    queue, _ = queue_of(1000)  # alone it may have more rows
    assert queue.num_rows == 1000


MANY = QueueLimits(step_requests=4, step_rows=8, requests=200, rows=10**6)
SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12)


def test_turns_of_two_tenants_worked_by_hand() -> None:
    queue = WorkQueue(MANY, "x")
    add_of(queue, "a", 20, 3)
    add_of(queue, "b", 5, 3, 8)
    # Works of a: 8, 8, 4, 3 rows; of b: 5, 3, 8. A round is 8 rows of each.
    assert steps_of(queue) == [
        [("a0", 0, 8)],
        [("b0", 0, 5), ("b1", 0, 3)],
        [("a0", 8, 16)],
        [("b2", 0, 8)],
        [("a0", 16, 20), ("a1", 0, 3)],
    ]


@pytest.mark.parametrize("flood_rows", [0, 1, 2, 8, 80])
def test_a_request_waits_for_one_step_of_each_other_tenant_however_much_these_ask_for(
    flood_rows: int,
) -> None:
    queue, others = WorkQueue(MANY, "x"), ("flood", "deluge", "spate")
    for other in others:
        add_of(queue, other, *[flood_rows] * 60)
    for number in range(10):  # again and again, with a pause for thought
        for _ in range(2):
            queue.take()
        add(queue, f"quiet{number}", np.zeros((4, 2)), "quiet")
        steps = [spans(queue.take()) for _ in range(1 + len(others))]
        assert f"quiet{number}" in {name for step in steps for name, _, _ in step}


@given(st.dictionaries(st.sampled_from("abcd"), SIZES, min_size=2))
def test_tenants_that_all_wait_have_the_same_part_of_the_rows(queued: dict[str, list[int]]) -> None:
    queue = WorkQueue(MANY, "x")
    for tenant, sizes in queued.items():
        add_of(queue, tenant, *sizes)
    least = -(-MANY.step_rows // MANY.step_requests)
    paid = dict.fromkeys(queued, 0)
    taken: dict[str, list[tuple[str, int]]] = {tenant: [] for tenant in queued}
    while {work.job.request.tenant for work in queue.ready()} == set(queued):
        for work in queue.take():
            tenant = work.job.request.tenant
            paid[tenant] += max(least, work.num_rows)
            taken[tenant].append((work.job.request.request_id, work.begin))
        if {work.job.request.tenant for work in queue.ready()} == set(queued):
            assert max(paid.values()) - min(paid.values()) <= 2 * MANY.step_rows
    for tenant, sizes in queued.items():
        order = [(f"{tenant}{i}", b) for i, n in enumerate(sizes) for b in range(0, max(1, n), 8)]
        assert taken[tenant] == order[: len(taken[tenant])]


def test_a_tenant_that_has_left_brings_neither_debt_nor_credit() -> None:
    queue = WorkQueue(MANY, "x")
    add_of(queue, "a", *[8] * 6)
    add_of(queue, "b", 8, 8)
    assert [spans(queue.take())[0][0] for _ in range(4)] == ["a0", "b0", "a1", "b1"]
    assert spans(queue.take()) == [("a2", 0, 8)]  # b is not there
    add_of(queue, "b", 8, 8)
    assert [spans(queue.take())[0][0] for _ in range(4)] == ["a3", "b0", "a4", "b1"]
    for job in list(queue.jobs.values()):
        queue.end(job, CancelledRequestError("gone"))
    assert not queue.has_ready
    add_of(queue, "b", 8)
    add_of(queue, "a", 8)
    assert steps_of(queue) == [[("b0", 0, 8)], [("a0", 0, 8)]]


def test_the_end_of_a_request_leaves_the_turns_of_others_alone() -> None:
    queue = WorkQueue(MANY, "x")
    add_of(queue, "a", 16, 8)
    add_of(queue, "b", 8)
    add_of(queue, "c", 8)
    queue.end(queue.jobs["b0"], CancelledRequestError("gone"))
    assert spans(queue.take()) == [("a0", 0, 8)]
    queue.end(queue.jobs["a0"], CancelledRequestError("gone"))
    assert steps_of(queue) == [[("c0", 0, 8)], [("a1", 0, 8)]]


def test_a_tenant_pays_once_for_works_that_were_parked() -> None:
    queue, awaited = WorkQueue(MANY, "x"), frozenset({(0, 1)})
    add_of(queue, "a", 8, 8)
    add_of(queue, "b", 8, 8)
    [first] = queue.take()
    queue.park(first, awaited)
    queue.unpark(lambda _: True)
    assert [step[0][0] for step in steps_of(queue)] == ["a0", "b0", "a1", "b1"]


def test_a_full_queue_still_takes_the_only_request_of_a_tenant() -> None:
    queue = WorkQueue(LIMITS, "x")
    add_of(queue, "flood", 1, 1, 1, 1)
    add_of(queue, "quiet", 1000)
    for tenant in ("flood", "quiet"):
        with pytest.raises(OverloadedError, match="5 requests"):
            add(queue, "more", np.zeros((1, 2)), tenant)
    queue.end(queue.jobs["quiet0"], CancelledRequestError("gone"))
    add_of(queue, "quiet", 1)
