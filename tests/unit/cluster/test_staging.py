"""Copies through pinned memory, on an emulated device that sees a missing wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from cluster.staging import RING, Staging
from tests.emulated_device import EmulatedDevice, emulated_device


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    with emulated_device() as device:
        yield device


def test_tensors_of_any_dtype_and_shape_move_in_one_copy_each_way(device: EmulatedDevice) -> None:
    staging = Staging(device.device)
    given = [
        torch.tensor([True, False, True]),
        torch.arange(5),
        torch.randn(3, 2).bfloat16(),
        torch.empty(0, 4, dtype=torch.int64),
        torch.from_numpy(np.array([], np.int64)),  # its stride is 0
        torch.randn(2, 3)[:, 1],
        torch.tensor(2.5, dtype=torch.float64),
    ]
    for _ in range(2 * RING):  # buffers are used again, and grow
        with device.counted() as copies:
            there = staging.to_device(*given)
            back = staging.to_host(*there)
        assert [(c.is_pinned, c.is_blocking) for c in copies.to_device] == [(True, False)]
        assert [(c.is_pinned, c.is_blocking) for c in copies.to_host] == [(True, False)]
        for tensor, moved, returned in zip(given, there, back, strict=True):
            assert moved.device == device.device
            assert torch.equal(returned, tensor)
        given.append(torch.randn(100_000))


def test_copies_within_the_reserved_bytes_pin_no_more_memory(
    device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = Staging(device.device)
    staging.to_device(torch.zeros(10))
    staging.reserve(300_000, 300_000)
    pinned: list[int] = []
    empty = torch.empty

    def noted(*sizes: Any, **options: Any) -> torch.Tensor:
        if options.get("pin_memory"):
            pinned.append(sizes[0])
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", noted)
    for _ in range(2 * RING):
        [there] = staging.to_device(torch.ones(75_000))
        assert staging.to_host(there)[0].sum().item() == 75_000
    assert not pinned
    [there] = staging.to_device(torch.ones(200_000))
    assert staging.to_host(there)[0].sum().item() == 200_000
    assert len(pinned) == 2


def test_a_sequence_of_tensors_arrives_as_their_concatenation(device: EmulatedDevice) -> None:
    staging = Staging(device.device)
    pieces = [torch.randn(size, 3) for size in (2, 0, 5)]
    with device.counted() as copies:
        joined, scale = staging.to_device(pieces, torch.tensor(2.0))
    assert len(copies.to_device) == 1
    assert torch.equal((joined * scale).cpu(), torch.cat(pieces) * 2)


def test_tensors_on_the_host_last_until_as_many_next_copies_as_there_are_buffers(
    device: EmulatedDevice,
) -> None:
    staging = Staging(device.device)
    copies = [staging.to_host(torch.full((4,), float(n)).to(device.device))[0] for n in range(RING)]
    staging.to_device(torch.zeros(4))
    assert [copy.tolist() for copy in copies] == [[n] * 4 for n in range(RING)]
    staging.to_host(torch.full((4,), 9.0).to(device.device))
    assert copies[0].tolist() == [9.0] * 4
    assert copies[1].tolist() == [1.0] * 4


def test_a_copy_to_the_device_is_not_waited_for_by_the_host_but_by_the_computation(
    device: EmulatedDevice,
) -> None:
    staging = Staging(device.device)
    staging.to_device(torch.ones(3))
    [copy] = torch.accelerator.current_stream().unfinished  # type: ignore[attr-defined]
    assert not copy.is_finished
    for _ in range(RING - 1):  # the other buffers
        staging.to_device(torch.zeros(3))
        assert not copy.is_finished
    staging.to_device(torch.zeros(3))  # takes the first buffer again, once its copy has ended
    assert copy.is_finished
    torch.accelerator.synchronize()  # raises where a buffer was written under a copy


def test_a_copy_to_the_host_waits_for_itself_alone(device: EmulatedDevice) -> None:
    staging = Staging(device.device)
    other = torch.Stream(device.device)
    late = torch.zeros(3, pin_memory=True)
    with other:
        late.copy_(torch.ones(3).to(device.device), non_blocking=True)
    rows = torch.full((3,), 2.0, device=device.device)
    staging.to_device(torch.zeros(3))
    [copy] = torch.accelerator.current_stream().unfinished  # type: ignore[attr-defined]
    [host] = staging.to_host(rows)
    assert host.tolist() == [2.0] * 3
    assert late.isnan().all(), "another stream's copy is still under way"
    assert copy.is_finished, "the rows may have been computed with it"


def test_a_lone_thread_may_copy_within_and_without_inference_mode(device: EmulatedDevice) -> None:
    staging = Staging(device.device)
    for _ in range(RING):
        with torch.inference_mode():
            assert staging.to_host(*staging.to_device(torch.ones(2)))[0].tolist() == [1, 1]
    for _ in range(RING):
        assert staging.to_host(*staging.to_device(torch.ones(2)))[0].tolist() == [1, 1]
