"""The queue of a mixture's router: works of requests, their order, and the ends of requests."""

from __future__ import annotations

import math

import numpy as np
import pytest

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


def add(queue: WorkQueue, request_id: str, rows: np.ndarray) -> list[Outcome]:
    outcome: list[Outcome] = []
    request = PredictionRequest(request_id, "m", {"x": rows}, ("y",), math.inf)
    queue.add(Job(request, outcome.append, 0.0))
    return outcome


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
    with pytest.raises(OverloadedError, match="100 rows"):
        add(queue, "more", np.zeros((1, 2)))
    queue, _ = queue_of(1, 1, 1, 1)
    with pytest.raises(OverloadedError, match="4 requests"):
        add(queue, "more", np.zeros((1, 2)))
    queue, _ = queue_of(1000)  # alone it may have more rows
    assert queue.num_rows == 1000
