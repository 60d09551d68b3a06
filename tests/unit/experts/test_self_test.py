"""An actor's self-test: a failing device is told from a frame that no device can compute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.spec import ActorReport, ExpertKey
from cluster.wire.frames import Buffer, ErrorFrame, RowsFrame, decode
from experts import bank as bank_module
from experts import self_test as self_test_module
from tests.checkpoints import copy_of
from tests.unit.experts.local_actor import (
    LIMIT_S,
    Actor,
    frame_of,
    local_actor,
    rows_of,
    self_tests_ended,
)

COUNTED = 3
STAYS_S = 0.1
"""How long a count that must not grow is watched; many test periods."""

Compute = Callable[..., memoryview | None]


@pytest.fixture(autouse=True)
def short_periods(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Test often; no actor tests itself on the device of the next test."""
    monkeypatch.setattr(self_test_module, "TEST_PERIOD_S", 0.005)
    monkeypatch.setattr(self_test_module, "SAMPLE_PERIOD_S", 0.0)
    with self_tests_ended():
        yield


@pytest.fixture
def actor(folder: Path) -> Actor:
    return local_actor(folder)


def device_of(
    monkeypatch: pytest.MonkeyPatch, compute: Callable[[Compute, Buffer], object]
) -> None:
    """Have products computed by ``compute``, which gets the true product and its rows."""
    product = bank_module.compute_native

    def computed(experts: object, counts: object, rows: Buffer) -> object:
        return compute(lambda: product(experts, counts, rows), rows)  # type: ignore[arg-type]

    monkeypatch.setattr(bank_module, "compute_native", computed)


def until(actor: Actor, condition: Callable[[ActorReport], bool]) -> ActorReport:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition(report := actor.heartbeat(1)):
        assert time.monotonic() < deadline_s, report
        threading.Event().wait(0.002)
    return report


def after_tests(actor: Actor) -> ActorReport:
    """Return a report after the tests that have been asked for, which must pass."""
    until(actor, lambda _: actor._queue.self_test._sample is None)
    until(actor, lambda _: actor._queue.self_test._suspected is None)
    threading.Event().wait(STAYS_S)
    return actor.heartbeat(1)


def nan(product: Callable[[], memoryview], rows: Buffer) -> memoryview:
    return np.full(len(product()) // 4, np.nan, np.float32).view(np.uint8).data


def gone(product: object, rows: Buffer) -> object:
    raise RuntimeError("the device is gone " + "x" * 1000)


@pytest.mark.parametrize(
    ("device", "num_rows", "failure"),
    [
        (gone, 2, "RuntimeError: the device is gone"),
        (nan, 2, "NaN or infinity"),
        (lambda product, rows: product()[: -len(rows)], 1, "missing"),
        (lambda product, rows: product()[: -len(rows) // 3], 3, "missing"),
    ],
    ids=["raises", "not finite", "loses all rows", "loses a row"],
)
def test_a_broken_device_fails_tests_in_a_row(
    actor: Actor, monkeypatch: pytest.MonkeyPatch, device: Any, num_rows: int, failure: str
) -> None:
    device_of(monkeypatch, device)
    answer = actor.compute(frame_of(rows_of(num_rows)))
    report = until(actor, lambda report: report.failed_tests >= COUNTED)
    assert failure in report.failure
    assert len(report.failure) <= self_test_module.MAX_CHARS
    if device is gone:
        assert isinstance(decode(answer), ErrorFrame)
        assert report.failed_batches == 1
    elif device is nan:
        assert isinstance(decode(answer), RowsFrame)


def test_a_frame_on_which_products_raise_is_no_fault_of_the_device(
    actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = rows_of(1, seed=7)
    marker = poison.numpy().tobytes()

    def choosy(product: Callable[[], object], rows: Buffer) -> object:
        if marker in bytes(rows):
            raise RuntimeError("these rows")
        return product()

    device_of(monkeypatch, choosy)
    for _ in range(2 * COUNTED):
        assert isinstance(decode(actor.compute(frame_of(poison))), ErrorFrame)
    report = after_tests(actor)
    assert (report.failed_batches, report.failed_tests, report.failure) == (2 * COUNTED, 0, "")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_rows_that_overflow_or_are_not_finite_themselves_are_no_fault_of_the_device(
    actor: Actor, value: float
) -> None:
    answer = decode(actor.compute(frame_of(torch.full((2, 64), value))))
    assert isinstance(answer, RowsFrame)
    assert not np.isfinite(np.frombuffer(answer.rows[0], np.float32)).all()
    report = after_tests(actor)
    assert (report.failed_batches, report.failed_tests) == (0, 0)


def test_weights_that_are_not_finite_in_the_checkpoint_are_no_fault_of_the_device(
    folder: Path, tmp_path: Path
) -> None:
    [file] = copy_of(folder, tmp_path / "broken").glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".0.block_sparse_moe.experts.3." in name:
            tensor[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    actor = local_actor(file.parent, keys=[ExpertKey("m", 0, 3)])
    answer = decode(actor.compute(frame_of(rows_of(2))))
    assert isinstance(answer, RowsFrame)
    assert np.isnan(np.frombuffer(answer.rows[0], np.float32)).any()
    assert after_tests(actor).failed_tests == 0


def test_where_experts_are_unloaded_meanwhile_others_are_tested(
    actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        device_of(patch, nan)
        actor.compute(frame_of(rows_of(2)))
        until(actor, lambda report: report.failed_tests >= 1)
        actor.unload(1, [ExpertKey("m", 0, 3)])
        failed = actor.heartbeat(1).failed_tests
        until(actor, lambda report: report.failed_tests >= failed + COUNTED)
    report = until(actor, lambda report: report.failed_tests == 0)  # the device works again
    assert report.failure == ""
    assert after_tests(actor).failed_tests == 0


def test_an_actor_without_experts_whose_tests_have_failed_waits_for_some(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ExpertKey("m", 0, 3)
    actor = local_actor(folder, keys=[key])
    device_of(monkeypatch, nan)
    actor.compute(frame_of(rows_of(2)))
    until(actor, lambda report: report.failed_tests >= 1)
    actor.unload(1, [key])
    threading.Event().wait(STAYS_S)
    failed = actor.heartbeat(1).failed_tests
    threading.Event().wait(STAYS_S)
    assert actor.heartbeat(1).failed_tests == failed  # no test has a result
    actor.load(1, actor._spec, [key])
    until(actor, lambda report: report.failed_tests >= failed + COUNTED)


def test_where_a_test_hangs_the_report_tells_of_the_frames_that_wait(
    actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the controller sees a hung actor, whose heartbeats are answered."""
    hangs, go_on = threading.Event(), threading.Event()

    def broken(product: Callable[[], object], rows: Buffer) -> object:
        if not any(bytes(rows)):
            hangs.set()
            assert go_on.wait(LIMIT_S)
            return product()
        if not hangs.is_set():
            raise RuntimeError("the device is gone")
        return product()

    device_of(monkeypatch, broken)
    actor.compute(frame_of(rows_of(2)))
    assert hangs.wait(LIMIT_S)
    with ThreadPoolExecutor(1) as calls:
        try:
            call = calls.submit(actor.compute, frame_of(rows_of(3)))
            until(actor, lambda report: report.queued_rows == 3)
        finally:
            go_on.set()
        assert isinstance(decode(call.result(LIMIT_S)), RowsFrame)
    assert until(actor, lambda report: report.queued_rows == 0).failed_tests == 0


@pytest.mark.parametrize("period_s", [0.2, 3600.0])
def test_the_last_answer_of_a_period_is_looked_at_when_it_is_over(
    actor: Actor, monkeypatch: pytest.MonkeyPatch, period_s: float
) -> None:
    """Routers ask other copies once rows are not finite, so no answer may follow the first."""
    monkeypatch.setattr(self_test_module, "SAMPLE_PERIOD_S", period_s)
    actor.compute(frame_of(rows_of(2)))  # is looked at; the next look comes a period later
    until(actor, lambda _: actor._queue.self_test._sample is None)
    device_of(monkeypatch, nan)
    actor.compute(frame_of(rows_of(2)))
    if period_s < LIMIT_S:
        assert "NaN" in until(actor, lambda report: report.failed_tests >= COUNTED).failure
    else:
        threading.Event().wait(STAYS_S)
        assert actor._queue.self_test._sample is not None
        assert actor.heartbeat(1).failed_tests == 0
