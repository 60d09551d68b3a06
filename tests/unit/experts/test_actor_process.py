"""The expert actor in this process, without Ray: answers, limits, merging, failures, lease."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.controller.lifecycle.lease import ABSENT_S, LEASE_S, Lease
from cluster.errors import Code, StaleEpochError, UnavailableError
from cluster.spec import ActorSpec, ExpertKey, ModelKernel
from cluster.wire.frames import ErrorFrame, RowsFrame, decode, encode, joined
from cluster.wire.tensors import from_bytes
from experts import actor as actor_module
from experts import bank as bank_module
from experts import queue as queue_module
from experts.bank import GatedFfnExpert
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.expert_weights import load_expert
from experts.compute.native_ffn import kernel_class
from experts.remote import RemoteExpertActor
from experts.tracing import BatchSpans
from tests.arrays import results
from tests.checkpoints import copy_of
from tests.cluster_fixture import wait_until
from tests.span_keeper import SpanKeeper
from tests.unit.experts.local_actor import (
    HIDDEN,
    KEYS,
    LIMIT_S,
    Actor,
    frame_of,
    local_actor,
    rows_of,
)


@pytest.fixture
def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Actor]]:
    """Make actors with loaded experts; no lease watches this process."""
    monkeypatch.setattr(actor_module, "end_when_orphaned", lambda lease, app: None)
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()

    def made(max_queue_rows: int = 1000, num_gpus: float = 0.0) -> Actor:
        return local_actor(folder, max_queue_rows, num_gpus)

    yield made
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


@pytest.fixture
def spans() -> SpanKeeper:
    return SpanKeeper()


def test_a_gpu_of_rays_that_torch_does_not_find_is_said(
    make: Callable[..., Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(UnavailableError, match=r"finds no accelerator on .*; install") as caught:
        make(num_gpus=1)
    assert caught.value.field == "args.experts.num_gpus"


def expected(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    expert = GatedFfnExpert(load_expert(open_checkpoint(folder), 0, 3, "float32"), "silu", 1)
    return results(expert.ffn, rows)


def rows_answer(data: bytes) -> torch.Tensor:
    answer = decode(data)
    assert isinstance(answer, RowsFrame), answer
    return from_bytes(joined(answer.rows), answer.dtype, answer.num_rows, answer.row_shape)


def error_answer(data: bytes) -> ErrorFrame:
    answer = decode(data)
    assert isinstance(answer, ErrorFrame)
    return answer


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a frame's experts from being computed in one call, past each expert's own."""
    monkeypatch.setattr(bank_module, "_grouped_of", lambda experts: None)


class Gate:
    """Holds the actor's products until it is opened, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.products: list[int] = []
        self.failure: Exception | None = None
        product = GatedFfnExpert.__call__

        def gated(expert: GatedFfnExpert, rows: np.ndarray) -> np.ndarray:
            self.products.append(rows.shape[0])
            self.entered.release()
            assert self.open.wait(LIMIT_S)
            if self.failure is not None:
                raise self.failure
            return product(expert, rows)

        one_by_one(monkeypatch)
        monkeypatch.setattr(GatedFfnExpert, "__call__", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


@pytest.fixture
def calls(gate: Gate) -> Iterator[ThreadPoolExecutor]:
    """Threads that call the actor; the gate is opened before they are waited for."""
    pool = ThreadPoolExecutor(16)
    yield pool
    gate.open.set()
    pool.shutdown()


def queued(actor: Actor, rows: int) -> None:
    """Wait until so many rows are in the actor, computing or waiting."""
    deadline_s = time.monotonic() + LIMIT_S
    tick = threading.Event()
    while actor.describe().queued_rows != rows:
        assert time.monotonic() < deadline_s
        tick.wait(0.001)


def test_a_frame_is_answered_with_its_experts_rows(
    make: Callable[..., Actor], folder: Path
) -> None:
    rows = rows_of(5)
    answer = decode(make().compute(frame_of(rows, request_id=9)))
    assert isinstance(answer, RowsFrame)
    assert (answer.request_id, answer.num_rows) == (9, 5)
    assert torch.equal(rows_answer(b"".join(encode(answer))), expected(folder, rows))


def test_a_frame_may_be_computed_again_with_the_same_answer(make: Callable[..., Actor]) -> None:
    actor, frame = make(), frame_of(rows_of(5))
    assert actor.compute(frame) == actor.compute(frame)


def test_the_report_tells_experts_tokens_and_steps(make: Callable[..., Actor]) -> None:
    actor = make()
    actor.compute(frame_of(rows_of(5)))
    actor.compute(frame_of(rows_of(2)))
    report = actor.describe()
    assert report.experts == tuple(KEYS)
    assert report.tokens == {ExpertKey("m", 0, 3): 7}
    assert (report.queued_rows, report.steps, report.pid) == (0, 2, os.getpid())
    assert report.digest == actor._spec.digest


def test_the_report_has_the_kernel_class_of_each_model_with_an_expert(
    make: Callable[..., Actor],
) -> None:
    actor = make()
    own = kernel_class("float32")
    assert own is not None
    assert actor.describe().kernels == (ModelKernel("m", own),)
    actor.unload(1, KEYS)
    assert actor.describe().kernels == ()


def test_each_traced_frame_of_a_batch_has_a_span_in_its_own_trace(
    make: Callable[..., Actor], spans: SpanKeeper
) -> None:
    actor = make()
    actor.compute(frame_of(rows_of(1), traceparent=f"00-{7:032x}-{8:016x}-01"))
    assert actor._queue._spans is None
    assert spans.told() == []  # the deployment has no tracing
    actor._queue._spans = BatchSpans(spans.tracer, "expert-0")
    frames = [
        frame_of(rows_of(5), traceparent=f"00-{7:032x}-{8:016x}-01"),
        frame_of(rows_of(1)),
        frame_of(rows_of(2), traceparent=f"00-{9:032x}-{3:016x}-01"),
        frame_of(rows_of(3), traceparent=f"00-{9:032x}-{3:016x}-00"),  # not sampled
    ]
    assert len(list(actor.compute_all(frames))) == 4
    told = [
        (s.context.trace_id, s.parent.span_id, s.attributes["expertmesh.rows"])
        for s in spans.told("expertmesh.experts")
    ]
    assert told == [(7, 8, 5), (9, 3, 2)]
    for span in spans.told():
        assert span.attributes["expertmesh.actor"] == "expert-0"
        assert span.attributes["expertmesh.batch_frames"] == 4
        assert 0 <= span.attributes["expertmesh.waited_s"] < LIMIT_S
        assert 0 <= time.time_ns() - span.start_time < LIMIT_S * 1e9
        assert span.start_time <= span.end_time


def test_the_report_tells_how_long_frames_waited_and_products_took(
    make: Callable[..., Actor],
    gate: Gate,
    calls: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actor = make()
    clock = SimpleNamespace(monotonic=lambda: clock.now_s, time=time.time, now_s=100.0)
    monkeypatch.setattr(queue_module, "time", clock)
    first = calls.submit(actor.compute, frame_of(rows_of(1)))
    assert gate.entered.acquire(timeout=LIMIT_S)
    clock.now_s = 103.0
    others = [calls.submit(actor.compute, frame_of(rows_of(1))) for _ in range(2)]
    queued(actor, 3)
    clock.now_s = 110.0
    gate.open.set()
    for call in (first, *others):
        rows_answer(call.result(LIMIT_S))
    report = actor.describe()
    assert (report.frames, report.busy_s, report.waited_s) == (3, 10.0, 14.0)


def test_experts_are_loaded_beside_those_already_held(make: Callable[..., Actor]) -> None:
    actor = make()
    held = actor._bank.experts[KEYS[0]]
    more = [KEYS[0], ExpertKey("m", 1, 1)]
    report = actor.load(1, actor._spec, [tuple(key) for key in more])  # type: ignore[misc]
    assert report.experts == tuple(sorted({*KEYS, *more}))
    assert actor._bank.experts[KEYS[0]] is held  # not read again


def test_experts_are_let_go_after_the_batch_under_way(
    make: Callable[..., Actor], gate: Gate, calls: ThreadPoolExecutor
) -> None:
    actor = make()
    asked = calls.submit(actor.compute, frame_of(rows_of(2)))
    assert gate.entered.acquire(timeout=LIMIT_S)
    letting_go = calls.submit(actor.unload, 1, [tuple(KEYS[1]), ("m", 0, 7)])
    waiting = calls.submit(actor.compute, frame_of(rows_of(1)))
    queued(actor, 3)
    assert not letting_go.done()
    gate.open.set()
    assert letting_go.result(LIMIT_S).experts == (KEYS[0], KEYS[2])
    assert rows_answer(asked.result(LIMIT_S)).shape == (2, HIDDEN)
    # Computed before or refused after, but answered.
    answer = decode(waiting.result(LIMIT_S))
    assert isinstance(answer, RowsFrame) or answer.kind == "WrongPlacementError"
    assert error_answer(actor.compute(frame_of(rows_of(1)))).kind == "WrongPlacementError"
    assert actor.load(1, actor._spec, KEYS).experts == tuple(KEYS)
    assert rows_answer(actor.compute(frame_of(rows_of(1)))).shape == (1, HIDDEN)


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage", b"\xc1", b"".join(encode(RowsFrame(1, 1, (1,), "float32", (bytes(4),))))],
)
def test_what_is_no_dispatch_frame_is_answered_by_a_frame_error(
    make: Callable[..., Actor], data: bytes
) -> None:
    actor = make()
    answer = error_answer(actor.compute(data))
    assert (answer.kind, answer.error.code) == ("FrameError", Code.INVALID_ARGUMENT)
    assert rows_answer(actor.compute(frame_of(rows_of(1)))).shape == (1, HIDDEN)


def test_an_expert_that_is_not_held_is_wrong_placement_and_never_an_empty_share(
    make: Callable[..., Actor],
) -> None:
    answer = error_answer(make().compute(frame_of(rows_of(1), request_id=4, expert_id=5)))
    assert (answer.request_id, answer.kind) == (4, "WrongPlacementError")


def test_a_frame_past_its_deadline_is_dropped_uncomputed(
    make: Callable[..., Actor], gate: Gate
) -> None:
    gate.open.set()
    actor = make()
    answer = error_answer(actor.compute(frame_of(rows_of(3), request_id=6, timeout_s=-1)))
    assert (answer.request_id, answer.kind) == (6, "DeadlineExceededError")
    assert gate.products == []
    assert actor.describe().queued_rows == 0


def test_a_frame_whose_deadline_passes_while_it_waits_is_dropped_and_its_mates_are_not(
    make: Callable[..., Actor],
    gate: Gate,
    calls: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actor = make()
    blocking = calls.submit(actor.compute, frame_of(rows_of(1)))
    assert gate.entered.acquire(timeout=LIMIT_S)
    hasty = calls.submit(actor.compute, frame_of(rows_of(2), timeout_s=LIMIT_S))
    patient = calls.submit(actor.compute, frame_of(rows_of(4), timeout_s=1000))
    queued(actor, 7)
    later_s = time.monotonic() + LIMIT_S + 1
    monkeypatch.setattr(queue_module.time, "monotonic", lambda: later_s)
    gate.open.set()
    assert rows_answer(blocking.result(LIMIT_S)).shape[0] == 1
    assert error_answer(hasty.result(LIMIT_S)).kind == "DeadlineExceededError"
    assert rows_answer(patient.result(LIMIT_S)).shape[0] == 4
    assert gate.products == [1, 4]


def test_calls_that_wait_together_share_one_product_and_get_their_own_rows(
    make: Callable[..., Actor], folder: Path, gate: Gate, calls: ThreadPoolExecutor
) -> None:
    actor = make()
    first = calls.submit(actor.compute, frame_of(rows_of(1), 1))
    assert gate.entered.acquire(timeout=LIMIT_S)
    batches = {i: rows_of(i, seed=i) for i in range(2, 8)}
    mates: dict[int, Future[bytes]] = {
        i: calls.submit(actor.compute, frame_of(rows, i)) for i, rows in batches.items()
    }
    queued(actor, 1 + sum(batches))
    gate.open.set()
    assert rows_answer(first.result(LIMIT_S)).shape[0] == 1
    for i, mate in mates.items():
        answer = decode(mate.result(LIMIT_S))
        assert answer.request_id == i
        torch.testing.assert_close(rows_answer(mate.result(LIMIT_S)), expected(folder, batches[i]))
    assert gate.products == [1, sum(batches)]
    queued(actor, 0)
    assert actor.describe().steps == 2


def test_large_frames_share_no_product_and_each_answer_comes_before_the_next_is_computed(
    make: Callable[..., Actor], folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "MAX_BATCH_ROWS", 8)
    gate.open.set()
    sizes = [3, 5, 1, 20, 2]
    batches = [rows_of(size, seed=size) for size in sizes]
    answers = make().compute_all([frame_of(rows, i) for i, rows in enumerate(batches)])
    computed = []
    for rows, answer in zip(batches, answers, strict=True):
        torch.testing.assert_close(rows_answer(b"".join(answer)), expected(folder, rows))
        computed.append(list(gate.products))
    assert computed == [[8], [8], [8, 1], [8, 1, 20], [8, 1, 20, 2]]


def test_a_call_that_has_its_answer_waits_for_no_other_product(
    make: Callable[..., Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    product = GatedFfnExpert.__call__
    gates = {num_rows: threading.Event() for num_rows in (1, 2 + 3, 9)}
    entered: SimpleQueue[int] = SimpleQueue()

    def gated(expert: GatedFfnExpert, rows: np.ndarray) -> np.ndarray:
        entered.put(len(rows))
        assert gates[len(rows)].wait(LIMIT_S)
        return product(expert, rows)

    one_by_one(monkeypatch)
    monkeypatch.setattr(GatedFfnExpert, "__call__", gated)
    actor = make()
    with ThreadPoolExecutor(4) as pool:
        try:
            first = pool.submit(actor.compute, frame_of(rows_of(1)))
            assert entered.get(timeout=LIMIT_S) == 1
            mates = [pool.submit(actor.compute, frame_of(rows_of(count))) for count in (2, 3)]
            queued(actor, 1 + 2 + 3)
            gates[1].set()
            assert entered.get(timeout=LIMIT_S) == 2 + 3
            last = pool.submit(actor.compute, frame_of(rows_of(9)))
            queued(actor, 2 + 3 + 9)
            gates[2 + 3].set()
            assert entered.get(timeout=LIMIT_S) == 9
            assert [len(rows_answer(mate.result(LIMIT_S / 3))) for mate in mates] == [2, 3]
            assert not last.done()
        finally:
            for gate in gates.values():
                gate.set()
        assert [len(rows_answer(one.result(LIMIT_S))) for one in (first, last)] == [1, 9]


def test_a_full_queue_refuses_the_next_frame_and_serves_those_that_wait(
    make: Callable[..., Actor], gate: Gate, calls: ThreadPoolExecutor
) -> None:
    actor = make(10)
    accepted = [calls.submit(actor.compute, frame_of(rows_of(6)))]
    assert gate.entered.acquire(timeout=LIMIT_S)
    accepted.append(calls.submit(actor.compute, frame_of(rows_of(4))))
    queued(actor, 10)
    refused = error_answer(actor.compute(frame_of(rows_of(1), request_id=8)))
    assert (refused.request_id, refused.kind) == (8, "OverloadedError")
    assert refused.error.code is Code.RESOURCE_EXHAUSTED
    assert refused.error.retry_after_s
    gate.open.set()
    assert [len(rows_answer(call.result(LIMIT_S))) for call in accepted] == [6, 4]
    queued(actor, 0)
    assert len(rows_answer(actor.compute(frame_of(rows_of(1))))) == 1


def test_an_empty_actor_takes_a_frame_larger_than_its_queue(make: Callable[..., Actor]) -> None:
    assert len(rows_answer(make(10).compute(frame_of(rows_of(11))))) == 11


def test_a_batch_that_fails_is_answered_by_internal_errors_and_the_next_one_is_computed(
    make: Callable[..., Actor], folder: Path, gate: Gate, calls: ThreadPoolExecutor
) -> None:
    actor = make()
    gate.failure = RuntimeError("secret of the device")
    failing = [calls.submit(actor.compute, frame_of(rows_of(1), 1))]
    assert gate.entered.acquire(timeout=LIMIT_S)
    failing += [calls.submit(actor.compute, frame_of(rows_of(i), i)) for i in (2, 3)]
    queued(actor, 6)
    gate.open.set()
    for i, call in enumerate(failing, start=1):
        answer = error_answer(call.result(LIMIT_S))
        assert (answer.request_id, answer.kind) == (i, "InternalError")
        assert answer.error.code is Code.INTERNAL
        assert "secret" not in str(answer.error)
    queued(actor, 0)
    gate.failure = None
    rows = rows_of(3)
    assert torch.equal(rows_answer(actor.compute(frame_of(rows))), expected(folder, rows))


def test_the_end_of_a_process_is_at_once_and_no_success() -> None:
    code = "from cluster.device import end_process; end_process()"
    assert (
        subprocess.run([sys.executable, "-c", code], timeout=LIMIT_S, check=False).returncode == 1
    )


def test_many_callers_at_once_all_get_their_own_rows(
    make: Callable[..., Actor], folder: Path
) -> None:
    actor = make()
    batches = [rows_of(1 + i % 5, seed=i) for i in range(200)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda rows: rows_answer(actor.compute(frame_of(rows))), batches))
    for rows, answer in zip(batches, answers, strict=True):
        torch.testing.assert_close(answer, expected(folder, rows))
    report = actor.describe()
    assert report.tokens == {ExpertKey("m", 0, 3): sum(len(rows) for rows in batches)}
    assert report.queued_rows == 0


def test_orders_of_an_older_epoch_are_refused_and_those_of_a_newer_accepted(
    make: Callable[..., Actor],
) -> None:
    actor = make()
    assert actor.heartbeat(5).epoch == 5
    for order in (
        lambda: actor.heartbeat(4),
        lambda: actor.load(4, actor._spec, [ExpertKey("m", 1, 1)]),
        lambda: actor.unload(4, KEYS),
    ):
        with pytest.raises(StaleEpochError, match=r"older than 5 \(given: 4\)"):
            order()
    assert actor.describe().experts == tuple(KEYS)
    assert actor.heartbeat(5).epoch == 5


def test_heartbeats_and_loads_renew_the_lease_and_other_calls_do_not(
    make: Callable[..., Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = make()
    renewed: list[float] = []
    monkeypatch.setattr(actor._lease, "renew", renewed.append)
    actor.describe()
    actor.compute(frame_of(rows_of(1)))
    with pytest.raises(StaleEpochError):
        actor.heartbeat(0)
    assert renewed == []
    actor.heartbeat(1)
    actor.load(1, actor._spec, [])
    assert len(renewed) == 2


# The lease, by a clock of the test's own.


def test_a_lease_lapses_after_its_time_and_not_before() -> None:
    lease = Lease(100.0)
    assert not lease.lapsed(100 + LEASE_S - 0.1)
    assert lease.lapsed(100 + LEASE_S)
    lease.renew(200.0)
    assert not lease.lapsed(200 + LEASE_S - 0.1)


def test_a_lapsed_lease_alone_orphans_nobody() -> None:
    lease = Lease(0.0)
    for now_s in (LEASE_S, LEASE_S + ABSENT_S, 10 * LEASE_S):
        assert not lease.orphaned(now_s, app_is_there=True)


def test_an_actor_is_an_orphan_when_the_app_stays_away() -> None:
    lease = Lease(0.0)
    assert not lease.orphaned(LEASE_S - 1, app_is_there=False)
    assert not lease.orphaned(LEASE_S, app_is_there=False)
    assert not lease.orphaned(LEASE_S + ABSENT_S - 0.1, app_is_there=False)
    assert lease.orphaned(LEASE_S + ABSENT_S, app_is_there=False)


@pytest.mark.parametrize("sign_of_life", ["the app is seen", "a heartbeat"])
def test_a_sign_of_life_starts_the_absence_anew(sign_of_life: str) -> None:
    lease = Lease(0.0)
    assert not lease.orphaned(LEASE_S, app_is_there=False)
    now_s = LEASE_S + ABSENT_S - 1
    if sign_of_life == "a heartbeat":
        lease.renew(now_s)
        now_s += LEASE_S
    else:
        assert not lease.orphaned(now_s, app_is_there=True)
    assert not lease.orphaned(now_s + 1, app_is_there=False)
    assert not lease.orphaned(now_s + ABSENT_S, app_is_there=False)
    assert lease.orphaned(now_s + 1 + ABSENT_S, app_is_there=False)


def test_the_actor_has_what_the_pool_calls() -> None:
    remote: Any = RemoteExpertActor
    methods = [remote.load, remote.heartbeat, remote.describe, remote.offer_stream]
    methods.append(remote.unload)
    assert [m.__ray_concurrency_group__ for m in methods] == ["control"] * 5
    assert not hasattr(remote.compute, "__ray_concurrency_group__")


def test_a_load_ends_once_a_newer_controller_gives_orders(
    make: Callable[..., Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the newer one's orders wait for all of it, and count the actor as dead meanwhile."""
    actor = make()
    begun, going_on = threading.Event(), threading.Event()
    load = actor._load_expert

    def slowly(*args: Any) -> Any:
        begun.set()
        assert going_on.wait(LIMIT_S)
        return load(*args)

    monkeypatch.setattr(actor, "_load_expert", slowly)
    share = [ExpertKey("m", 1, expert_id) for expert_id in range(4)]
    with ThreadPoolExecutor() as pool:
        older = pool.submit(actor.load, 1, actor._spec, share)
        assert begun.wait(LIMIT_S)
        waiting = pool.submit(actor.load, 1, actor._spec, [ExpertKey("m", 1, 7)])
        newer = pool.submit(actor.unload, 2, KEYS)
        wait_until(lambda: actor.describe().epoch == 2, "the newer order is there", LIMIT_S)
        going_on.set()
        assert newer.result(LIMIT_S).epoch == 2
        for overtaken in (older, waiting):
            with pytest.raises(StaleEpochError):
                overtaken.result(LIMIT_S)
    assert len(actor.describe().experts) == 1  # the one that was being read


def test_an_older_order_that_waited_for_a_newer_one_is_refused(
    make: Callable[..., Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both passed the first check in time; the newer one is not to find its experts gone."""
    actor = make()
    begun, going_on = threading.Event(), threading.Event()
    take_over = actor._take_over

    def slowly(spec: ActorSpec) -> None:
        begun.set()
        assert going_on.wait(LIMIT_S)
        take_over(spec)

    monkeypatch.setattr(actor, "_take_over", slowly)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(actor.load, 1, actor._spec, [])
        assert begun.wait(LIMIT_S)
        accepted = threading.Event()
        accept = actor._accept

        def noted(epoch: int) -> None:
            accept(epoch)
            accepted.set()

        monkeypatch.setattr(actor, "_accept", noted)
        older = pool.submit(actor.unload, 1, KEYS)
        assert accepted.wait(LIMIT_S)
        actor.heartbeat(2)
        going_on.set()
        assert first.result(LIMIT_S).experts == tuple(KEYS)
        with pytest.raises(StaleEpochError):
            older.result(LIMIT_S)
    assert actor.describe().experts == tuple(KEYS)


def test_what_an_actor_tells_a_newer_controller_no_older_one_takes_away(
    make: Callable[..., Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = make()
    assert actor.describe(3).epoch == 1  # as before
    for order in (actor.unload, lambda epoch, keys: actor.load(epoch, actor._spec, keys)):
        with pytest.raises(StaleEpochError):
            order(2, KEYS)
    assert actor.describe(1).epoch == 3
    assert actor.describe().experts == tuple(KEYS)
    assert actor.heartbeat(3).epoch == 3

    begun, going_on = threading.Event(), threading.Event()
    release = actor._bank.release

    def slowly(key: ExpertKey) -> None:
        begun.set()
        assert going_on.wait(LIMIT_S)
        release(key)

    monkeypatch.setattr(actor._bank, "release", slowly)
    with ThreadPoolExecutor() as pool:
        older = pool.submit(actor.unload, 3, KEYS)
        assert begun.wait(LIMIT_S)
        newer = pool.submit(actor.describe, 4)
        going_on.set()
        assert older.result(LIMIT_S).experts == ()
        assert newer.result(LIMIT_S).experts == ()  # it does not tell of what was on its way out


def of_other_weights(actor: Actor, folder: Path, model: str) -> ActorSpec:
    """Return the actor's specification after a redeploy: the checkpoint has another key or path."""
    [source] = actor._spec.models
    experts = replace(source.experts, model=model)
    return replace(actor._spec, models=(replace(source, path=str(folder), experts=experts),))


def test_what_an_actor_counted_of_a_replaced_model_goes_with_its_last_expert(
    make: Callable[..., Actor], folder: Path
) -> None:
    actor = make()
    actor.compute(frame_of(rows_of(2)))
    replaced = of_other_weights(actor, folder, "n")
    assert actor.load(1, replaced, [ExpertKey("n", 0, 0)]).tokens[KEYS[1]] == 2
    assert actor.unload(1, KEYS[:2]).tokens[KEYS[1]] == 2  # requests of the old model go on
    assert actor.unload(1, KEYS[2:]).tokens == {}
    assert actor.unload(1, [ExpertKey("n", 0, 0)]).experts == ()


def test_a_checkpoint_that_has_moved_is_read_where_it_is_now(
    make: Callable[..., Actor], folder: Path, tmp_path: Path
) -> None:
    actor = make()
    moved = copy_of(folder, tmp_path / "moved")
    report = actor.load(1, of_other_weights(actor, moved, "m"), [ExpertKey("m", 1, 1)])
    assert set(report.experts) == {*KEYS, ExpertKey("m", 1, 1)}
    assert actor._checkpoints["m"].folder == moved
