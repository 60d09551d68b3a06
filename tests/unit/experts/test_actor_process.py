"""The expert actor in this process, without Ray: answers, limits, merging, failures, lease."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
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
def actor(folder: Path) -> Iterator[Actor]:
    """An actor with loaded experts."""
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield local_actor(folder)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


def test_a_gpu_of_rays_that_torch_does_not_find_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(UnavailableError, match=r"finds no accelerator on .*; install") as caught:
        local_actor(folder, num_gpus=1)
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


class Gate:
    """Holds each of the actor's products until it is let through, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.let = threading.Semaphore(0), threading.Semaphore(0)
        self.products: list[int] = []
        self.failure: Exception | None = None
        product = GatedFfnExpert.__call__

        def gated(expert: GatedFfnExpert, rows: np.ndarray) -> np.ndarray:
            self.products.append(rows.shape[0])
            self.entered.release()
            assert self.let.acquire(timeout=LIMIT_S)
            if self.failure is not None:
                raise self.failure
            return product(expert, rows)

        # A frame's experts are not to be computed in one call, past each expert's own.
        monkeypatch.setattr(bank_module, "_grouped_of", lambda experts: None)
        monkeypatch.setattr(GatedFfnExpert, "__call__", gated)

    def open(self) -> None:
        self.let.release(1000)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


@pytest.fixture
def calls(gate: Gate) -> Iterator[ThreadPoolExecutor]:
    """Threads that call the actor; the gate is opened before they are waited for."""
    pool = ThreadPoolExecutor(16)
    yield pool
    gate.open()
    pool.shutdown()


def held(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> tuple[threading.Event, threading.Event]:
    """Let a method wait; returns what it sets when it is called, and what it waits for."""
    begun, going_on = threading.Event(), threading.Event()
    method = getattr(owner, name)

    def slowly(*args: Any) -> Any:
        begun.set()
        assert going_on.wait(LIMIT_S)
        return method(*args)

    monkeypatch.setattr(owner, name, slowly)
    return begun, going_on


def queued(actor: Actor, rows: int) -> None:
    """Wait until so many rows are in the actor, computing or waiting."""
    deadline_s = time.monotonic() + LIMIT_S
    tick = threading.Event()
    while actor.describe().queued_rows != rows:
        assert time.monotonic() < deadline_s
        tick.wait(0.001)


def test_a_frame_is_answered_with_its_experts_rows_each_time(actor: Actor, folder: Path) -> None:
    actor, rows = actor, rows_of(5)
    for _ in range(2):
        data = actor.compute(frame_of(rows, request_id=9))
        answer = decode(data)
        assert isinstance(answer, RowsFrame)
        assert (answer.request_id, answer.num_rows) == (9, 5)
        assert torch.equal(rows_answer(data), expected(folder, rows))


def test_the_report_tells_experts_tokens_steps_and_kernel_classes(actor: Actor) -> None:
    actor.compute(frame_of(rows_of(5)))
    actor.compute(frame_of(rows_of(2)))
    report = actor.describe()
    assert report.experts == tuple(KEYS)
    assert report.tokens == {ExpertKey("m", 0, 3): 7}
    assert (report.queued_rows, report.steps, report.pid) == (0, 2, os.getpid())
    assert report.digest == actor._spec.digest
    own = kernel_class("float32")
    assert own is not None
    assert report.kernels == (ModelKernel("m", own),)
    actor.unload(1, KEYS)
    assert actor.describe().kernels == ()


def test_each_traced_frame_of_a_batch_has_a_span_in_its_own_trace(actor: Actor) -> None:
    spans = SpanKeeper()
    actor.compute(frame_of(rows_of(1), traceparent=f"00-{7:032x}-{8:016x}-01"))
    assert actor._queue._spans is None  # the deployment has no tracing
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
    actor: Actor, gate: Gate, calls: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now_s, time=time.time, now_s=100.0)
    monkeypatch.setattr(queue_module, "time", clock)
    first = calls.submit(actor.compute, frame_of(rows_of(1)))
    assert gate.entered.acquire(timeout=LIMIT_S)
    clock.now_s = 103.0
    others = [calls.submit(actor.compute, frame_of(rows_of(1))) for _ in range(2)]
    queued(actor, 3)
    clock.now_s = 110.0
    gate.open()
    for call in (first, *others):
        rows_answer(call.result(LIMIT_S))
    report = actor.describe()
    assert (report.frames, report.busy_s, report.waited_s) == (3, 10.0, 14.0)


def test_experts_are_loaded_beside_those_held_from_where_the_checkpoint_is_now(
    actor: Actor, folder: Path, tmp_path: Path
) -> None:
    kept = actor._bank.experts[KEYS[0]]
    moved = copy_of(folder, tmp_path / "moved")
    more = [tuple(KEYS[0]), ("m", 1, 1)]
    report = actor.load(1, of_other_weights(actor, moved, "m"), more)  # type: ignore[arg-type]
    assert report.experts == tuple(sorted({*KEYS, ExpertKey("m", 1, 1)}))
    assert actor._bank.experts[KEYS[0]] is kept  # not read again
    assert actor._checkpoints["m"].folder == moved


def test_experts_are_let_go_after_the_batch_under_way(
    actor: Actor, gate: Gate, calls: ThreadPoolExecutor
) -> None:
    asked = calls.submit(actor.compute, frame_of(rows_of(2)))
    assert gate.entered.acquire(timeout=LIMIT_S)
    letting_go = calls.submit(actor.unload, 1, [tuple(KEYS[1]), ("m", 0, 7)])
    waiting = calls.submit(actor.compute, frame_of(rows_of(1)))
    queued(actor, 3)
    assert not letting_go.done()
    gate.open()
    assert letting_go.result(LIMIT_S).experts == (KEYS[0], KEYS[2])
    assert rows_answer(asked.result(LIMIT_S)).shape == (2, HIDDEN)
    # Computed before or refused after, but answered.
    answer = decode(waiting.result(LIMIT_S))
    assert isinstance(answer, RowsFrame) or answer.kind == "WrongPlacementError"
    assert error_answer(actor.compute(frame_of(rows_of(1)))).kind == "WrongPlacementError"
    assert actor.load(1, actor._spec, KEYS).experts == tuple(KEYS)
    assert rows_answer(actor.compute(frame_of(rows_of(1)))).shape == (1, HIDDEN)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "FrameError"),
        (b"garbage", "FrameError"),
        (b"\xc1", "FrameError"),
        (b"".join(encode(RowsFrame(1, 1, (1,), "float32", (bytes(4),)))), "FrameError"),
        (frame_of(rows_of(1), request_id=4, expert_id=5), "WrongPlacementError"),
        (frame_of(rows_of(3), request_id=4, timeout_s=-1), "DeadlineExceededError"),
    ],
    ids=["empty", "garbage", "no msgpack", "rows", "no expert", "over"],
)
def test_what_cannot_be_computed_is_answered_by_its_error_uncomputed(
    actor: Actor, gate: Gate, data: bytes, kind: str
) -> None:
    answer = error_answer(actor.compute(data))
    assert answer.kind == kind
    if kind == "FrameError":
        assert answer.error.code is Code.INVALID_ARGUMENT
    else:
        assert answer.request_id == 4
    assert gate.products == []
    assert actor.describe().queued_rows == 0
    gate.open()
    assert rows_answer(actor.compute(frame_of(rows_of(1)))).shape == (1, HIDDEN)


def test_a_frame_whose_deadline_passes_while_it_waits_is_dropped_and_its_mates_are_not(
    actor: Actor, gate: Gate, calls: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocking = calls.submit(actor.compute, frame_of(rows_of(1)))
    assert gate.entered.acquire(timeout=LIMIT_S)
    hasty = calls.submit(actor.compute, frame_of(rows_of(2), timeout_s=LIMIT_S))
    patient = calls.submit(actor.compute, frame_of(rows_of(4), timeout_s=1000))
    queued(actor, 7)
    later_s = time.monotonic() + LIMIT_S + 1
    monkeypatch.setattr(queue_module.time, "monotonic", lambda: later_s)
    gate.open()
    assert rows_answer(blocking.result(LIMIT_S)).shape[0] == 1
    assert error_answer(hasty.result(LIMIT_S)).kind == "DeadlineExceededError"
    assert rows_answer(patient.result(LIMIT_S)).shape[0] == 4
    assert gate.products == [1, 4]


def test_calls_that_wait_together_share_one_product_and_get_their_own_rows(
    actor: Actor, folder: Path, gate: Gate, calls: ThreadPoolExecutor
) -> None:
    first = calls.submit(actor.compute, frame_of(rows_of(1), 1))
    assert gate.entered.acquire(timeout=LIMIT_S)
    batches = {i: rows_of(i, seed=i) for i in range(2, 8)}
    mates: dict[int, Future[bytes]] = {
        i: calls.submit(actor.compute, frame_of(rows, i)) for i, rows in batches.items()
    }
    queued(actor, 1 + sum(batches))
    gate.open()
    assert rows_answer(first.result(LIMIT_S)).shape[0] == 1
    for i, mate in mates.items():
        answer = decode(mate.result(LIMIT_S))
        assert answer.request_id == i
        torch.testing.assert_close(rows_answer(mate.result(LIMIT_S)), expected(folder, batches[i]))
    assert gate.products == [1, sum(batches)]
    queued(actor, 0)
    assert actor.describe().steps == 2


def test_large_frames_share_no_product_and_each_answer_comes_before_the_next_is_computed(
    actor: Actor, folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "MAX_BATCH_ROWS", 8)
    gate.open()
    sizes = [3, 5, 1, 20, 2]
    batches = [rows_of(size, seed=size) for size in sizes]
    answers = actor.compute_all([frame_of(rows, i) for i, rows in enumerate(batches)])
    computed = []
    for rows, answer in zip(batches, answers, strict=True):
        torch.testing.assert_close(rows_answer(b"".join(answer)), expected(folder, rows))
        computed.append(list(gate.products))
    assert computed == [[8], [8], [8, 1], [8, 1, 20], [8, 1, 20, 2]]


def test_a_call_that_has_its_answer_waits_for_no_other_product(
    actor: Actor, gate: Gate, calls: ThreadPoolExecutor
) -> None:
    first = calls.submit(actor.compute, frame_of(rows_of(1)))
    assert gate.entered.acquire(timeout=LIMIT_S)
    mates = [calls.submit(actor.compute, frame_of(rows_of(count))) for count in (2, 3)]
    queued(actor, 1 + 2 + 3)
    gate.let.release()
    assert gate.entered.acquire(timeout=LIMIT_S)
    last = calls.submit(actor.compute, frame_of(rows_of(9)))
    queued(actor, 2 + 3 + 9)
    gate.let.release()
    assert gate.entered.acquire(timeout=LIMIT_S)
    assert gate.products == [1, 2 + 3, 9]
    assert [len(rows_answer(mate.result(LIMIT_S / 3))) for mate in mates] == [2, 3]
    assert not last.done()
    gate.open()
    assert [len(rows_answer(one.result(LIMIT_S))) for one in (first, last)] == [1, 9]


def test_a_full_queue_refuses_the_next_frame_and_serves_those_that_wait(
    folder: Path, gate: Gate, calls: ThreadPoolExecutor
) -> None:
    actor = local_actor(folder, 10)
    accepted = [calls.submit(actor.compute, frame_of(rows_of(6)))]
    assert gate.entered.acquire(timeout=LIMIT_S)
    accepted.append(calls.submit(actor.compute, frame_of(rows_of(4))))
    queued(actor, 10)
    refused = error_answer(actor.compute(frame_of(rows_of(1), request_id=8)))
    assert (refused.request_id, refused.kind) == (8, "OverloadedError")
    assert refused.error.code is Code.RESOURCE_EXHAUSTED
    assert refused.error.retry_after_s
    gate.open()
    assert [len(rows_answer(call.result(LIMIT_S))) for call in accepted] == [6, 4]
    queued(actor, 0)
    assert len(rows_answer(actor.compute(frame_of(rows_of(11))))) == 11  # more than the queue's


def test_a_batch_that_fails_is_answered_by_internal_errors_and_the_next_one_is_computed(
    actor: Actor, folder: Path, gate: Gate, calls: ThreadPoolExecutor
) -> None:
    gate.failure = RuntimeError("secret of the device")
    failing = [calls.submit(actor.compute, frame_of(rows_of(1), 1))]
    assert gate.entered.acquire(timeout=LIMIT_S)
    failing += [calls.submit(actor.compute, frame_of(rows_of(i), i)) for i in (2, 3)]
    queued(actor, 6)
    gate.open()
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


def test_orders_of_an_older_epoch_are_refused_and_only_those_of_a_newer_renew_the_lease(
    actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert actor.heartbeat(5).epoch == 5
    renewed: list[float] = []
    monkeypatch.setattr(actor._lease, "renew", renewed.append)
    for order in (
        lambda: actor.heartbeat(4),
        lambda: actor.load(4, actor._spec, [ExpertKey("m", 1, 1)]),
        lambda: actor.unload(4, KEYS),
    ):
        with pytest.raises(StaleEpochError, match=r"older than 5 \(given: 4\)"):
            order()
    assert actor.describe().experts == tuple(KEYS)
    actor.compute(frame_of(rows_of(1)))
    assert renewed == []
    assert actor.heartbeat(5).epoch == 5
    actor.load(5, actor._spec, [])
    assert len(renewed) == 2


# The lease, by a clock of the test's own.


def test_a_lease_lapses_after_its_time_and_not_before() -> None:
    lease = Lease(100.0)
    assert not lease.lapsed(100 + LEASE_S - 0.1)
    assert lease.lapsed(100 + LEASE_S)
    lease.renew(200.0)
    assert not lease.lapsed(200 + LEASE_S - 0.1)


@pytest.mark.parametrize("sign_of_life", [None, "the app is seen", "a heartbeat"])
def test_an_actor_is_an_orphan_when_its_lease_has_lapsed_and_the_app_stays_away(
    sign_of_life: str | None,
) -> None:
    lease = Lease(0.0)
    for now_s in (LEASE_S, LEASE_S + ABSENT_S, 10 * LEASE_S):
        assert not lease.orphaned(now_s, app_is_there=True)
    lease = Lease(0.0)
    assert not lease.orphaned(LEASE_S - 1, app_is_there=False)
    assert not lease.orphaned(LEASE_S, app_is_there=False)
    away_s, now_s = LEASE_S, LEASE_S + ABSENT_S - 0.1
    if sign_of_life == "a heartbeat":
        lease.renew(now_s)
        away_s = now_s + LEASE_S
    elif sign_of_life is not None:
        assert not lease.orphaned(now_s, app_is_there=True)
        away_s = now_s + 1
    assert not lease.orphaned(away_s, app_is_there=False)
    assert not lease.orphaned(away_s + ABSENT_S - 0.1, app_is_there=False)
    assert lease.orphaned(away_s + ABSENT_S, app_is_there=False)


def test_the_actor_has_what_the_pool_calls() -> None:
    remote: Any = RemoteExpertActor
    methods = [remote.load, remote.heartbeat, remote.describe, remote.offer_stream]
    methods.append(remote.unload)
    assert [m.__ray_concurrency_group__ for m in methods] == ["control"] * 5
    assert not hasattr(remote.compute, "__ray_concurrency_group__")


def test_a_load_ends_once_a_newer_controller_gives_orders(
    actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the newer one's orders wait for all of it, and count the actor as dead meanwhile."""
    begun, going_on = held(monkeypatch, actor, "_load_expert")
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
    actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both passed the first check in time; the newer one is not to find its experts gone."""
    begun, going_on = held(monkeypatch, actor, "_take_over")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(actor.load, 1, actor._spec, [])
        assert begun.wait(LIMIT_S)
        accepted = threading.Event()
        accept = actor._accept
        monkeypatch.setattr(actor, "_accept", lambda epoch: (accept(epoch), accepted.set()))
        older = pool.submit(actor.unload, 1, KEYS)
        assert accepted.wait(LIMIT_S)
        actor.heartbeat(2)
        going_on.set()
        assert first.result(LIMIT_S).experts == tuple(KEYS)
        with pytest.raises(StaleEpochError):
            older.result(LIMIT_S)
    assert actor.describe().experts == tuple(KEYS)


def test_what_an_actor_tells_a_newer_controller_no_older_one_takes_away(
    actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert actor.describe(3).epoch == 1  # as before
    for order in (actor.unload, lambda epoch, keys: actor.load(epoch, actor._spec, keys)):
        with pytest.raises(StaleEpochError):
            order(2, KEYS)
    assert actor.describe(1).epoch == 3
    assert actor.describe().experts == tuple(KEYS)
    assert actor.heartbeat(3).epoch == 3

    begun, going_on = held(monkeypatch, actor._bank, "release")
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
    actor: Actor, folder: Path
) -> None:
    actor.compute(frame_of(rows_of(2)))
    replaced = of_other_weights(actor, folder, "n")
    assert actor.load(1, replaced, [ExpertKey("n", 0, 0)]).tokens[KEYS[1]] == 2
    assert actor.unload(1, KEYS[:2]).tokens[KEYS[1]] == 2  # requests of the old model go on
    assert actor.unload(1, KEYS[2:]).tokens == {}
    assert actor.unload(1, [ExpertKey("n", 0, 0)]).experts == ()
