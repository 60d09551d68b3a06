"""A router whose device fails ends; an error of a computation alone ends nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from router.engine import isolation
from tests.emulated_device import emulated_device
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.conftest import OpenCluster

PROMPT = [5, 9, 7]
ILLEGAL = "an illegal memory access was encountered"


def raising(error: type[Exception]) -> Callable[..., Any]:
    def raises(*_: Any, **__: Any) -> Any:
        raise error(ILLEGAL)

    return raises


@pytest.fixture
def cluster(open_cluster: OpenCluster) -> Iterator[LocalCluster]:
    with emulated_device() as device:
        cluster = open_cluster(device=device.device)
        yield cluster
        cluster.close()


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError])
def test_a_device_in_error_ends_the_process_and_its_log_says_why(
    cluster: LocalCluster,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[Exception],
) -> None:
    """Also where the error does not say that it is the device's, and the device works no more."""
    ended = threading.Event()
    monkeypatch.setattr(isolation, "end_process", ended.set)
    monkeypatch.setattr(cluster.model.decoder, "forward", raising(error))
    monkeypatch.setattr(torch.accelerator, "synchronize", raising(error))
    cluster.engine.submit(greedy_request("r", PROMPT, 3))
    assert ended.wait(10)
    cluster.close()  # before the process's own end is back: every further step fails, too
    assert not cluster.engine.is_alive()
    assert f"the router exits: its device failed ({ILLEGAL})" in caplog.text


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError])
def test_an_error_while_the_device_works_ends_no_process(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(isolation, "end_process", ended.set)
    forward, failed = cluster.model.decoder.forward, threading.Event()

    def fails_once(*args: Any) -> Any:
        if not failed.is_set():
            failed.set()
            raise error("mat1 and mat2 shapes cannot be multiplied")
        return forward(*args)

    monkeypatch.setattr(cluster.model.decoder, "forward", fails_once)
    [[event]] = cluster.generate(greedy_request("r", PROMPT, 3))
    assert failed.is_set()
    assert len(event.token_ids) == 3
    assert not ended.is_set()


@pytest.mark.parametrize(
    "full",
    [
        None,
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["the allocator's", "the driver's", "a library's"],
)
def test_halves_of_a_step_without_memory_have_the_memory_of_the_whole(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, full: Exception | None
) -> None:
    """The tensors of the step that failed are gone when its halves are computed."""
    forward, failed = cluster.model.decoder.forward, []
    free_bytes = torch.accelerator.get_memory_info()[0]

    def in_much_memory(*args: Any) -> Any:
        num_bytes = len(args[0]) * free_bytes // (2 * len(PROMPT) + 1)
        device = torch.accelerator.current_accelerator()
        mine = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        try:
            more = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            failed.append(len(args[0]))
            raise full or error from None
        del mine, more
        return forward(*args)

    cluster.generate(greedy_request("warm", PROMPT, 2))
    monkeypatch.setattr(cluster.model.decoder, "forward", in_much_memory)
    together = cluster.generate(*(greedy_request(name, PROMPT, 3) for name in "ab"))
    assert max(failed) == 2 * len(PROMPT)
    assert [len(events[0].token_ids) for events in together] == [3, 3]
