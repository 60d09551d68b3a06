"""``torch.accelerator`` finds the emulated device; copies that nobody waits for show as errors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.emulated_accelerator import HostMemoryError, StreamError
from tests.emulated_device import EmulatedDevice, emulated_device

MIB = 1 << 20
Wait = Callable[[torch.Stream, torch.Event], object]


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    with emulated_device(memory_bytes=MIB) as emulated:
        yield emulated


def test_the_device_is_the_only_accelerator_until_the_end() -> None:
    def functions() -> tuple[object, ...]:
        here = torch.accelerator
        return torch.empty, torch.Tensor.is_pinned, torch.Stream, here.current_accelerator()

    before = functions()
    with emulated_device() as device:
        assert torch.accelerator.is_available()
        assert torch.accelerator.device_count() == 1
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        assert torch.ones(3, device=accelerator).device == device.device
        assert torch.accelerator.current_device_index() == 0
        torch.accelerator.set_device_index(0)
        with torch.accelerator.device_index(device.device.index):
            torch.accelerator.synchronize()
        with pytest.raises(RuntimeError, match="device 0 alone"):
            torch.accelerator.set_device_index(1)
    assert functions() == before


def test_memory_is_taken_and_given_back(device: EmulatedDevice) -> None:
    info = torch.accelerator.get_memory_info
    assert info() == (MIB, MIB)
    rows = torch.zeros(64, 1024).to(device.device)  # 256 KiB
    views = rows.view(-1), rows[3:], rows.t()
    assert info() == (MIB - MIB // 4, MIB)
    more = rows + 1
    assert torch.accelerator.memory_allocated() == MIB // 2
    del rows, more
    gc.collect()
    assert info() == (MIB - MIB // 4, MIB)
    assert torch.accelerator.max_memory_allocated() == MIB // 2
    torch.accelerator.reset_peak_memory_stats()
    del views
    gc.collect()
    assert info() == (MIB, MIB)
    assert torch.accelerator.max_memory_allocated() == MIB // 4


@pytest.mark.parametrize(
    "allocate",
    [
        lambda device: torch.empty(MIB, device=device),
        lambda device: torch.zeros(MIB).to(device),
        lambda device: torch.zeros(MIB // 4, device=device).double(),
        lambda device: torch.arange(MIB, device=device),
    ],
    ids=["empty", "to", "an operation", "arange"],
)
def test_a_full_device_raises_torchs_error(
    device: EmulatedDevice, allocate: Callable[[torch.device], object]
) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=f"of {MIB} free"):
        allocate(device.device)
    gc.collect()
    assert torch.accelerator.memory_allocated() <= MIB
    assert torch.zeros(8, device=device.device).cpu().sum() == 0


def test_pinned_memory_is_known_in_copies(device: EmulatedDevice) -> None:
    ring = torch.empty(2, 8, pin_memory=True)
    plain = torch.zeros(2, 8)
    assert (ring.is_pinned(), ring[1].is_pinned(), plain.is_pinned()) == (True, True, False)
    assert plain.pin_memory().is_pinned()
    assert torch.frombuffer(ring.numpy().data, dtype=torch.uint8).is_pinned()
    rows = torch.zeros(2, 8).to(device.device)
    with device.counted() as copies:
        rows.copy_(plain)
        rows[1].copy_(ring[1].zero_(), non_blocking=True)
        ring.copy_(rows)
        rows.cpu()
    pinned = [(access.is_pinned, access.is_blocking) for access in copies.accesses]
    assert pinned == [(False, True), (True, False), (True, True), (False, True)]
    with pytest.raises(RuntimeError, match="only tensors of the host"):
        rows.pin_memory()


WAITS: dict[str, Wait] = {
    "event": lambda stream, event: event.synchronize(),
    "query": lambda stream, event: event.query(),
    "stream": lambda stream, event: stream.synchronize(),
    "device": lambda stream, event: torch.accelerator.synchronize(),
    "the next blocking copy": lambda stream, event: torch.zeros(1).copy_(
        torch.zeros(1, device=stream.device)
    ),
    "a stream that waits": lambda stream, event: _other_stream(stream, event).synchronize(),
}


def _other_stream(stream: torch.Stream, event: torch.Event) -> torch.Stream:
    other = torch.Stream(stream.device)
    other.wait_event(event)
    return other


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_copy_to_the_host_has_its_values_once_it_is_waited_for(
    device: EmulatedDevice, wait: Wait
) -> None:
    rows = torch.ones(3).to(device.device)
    ring, ids = torch.zeros(3, pin_memory=True), torch.zeros(3, dtype=torch.int64, pin_memory=True)
    with torch.Stream(device.device) as stream:
        assert torch.accelerator.current_stream() is stream
        rows.record_stream(stream)
        ring.copy_(rows, non_blocking=True)
        ids.copy_(rows.long(), non_blocking=True)
        event = stream.record_event()
        rows.add_(1)  # comes after the copy on its stream
        assert ring.isnan().all()
        assert ids.tolist() == [torch.iinfo(torch.int64).max] * 3
        wait(stream, event)
    assert ring.tolist() == ids.tolist() == [1, 1, 1]


def test_only_the_copies_before_an_event_are_waited_for(device: EmulatedDevice) -> None:
    first, second = torch.empty(2, 1, pin_memory=True)
    event = torch.Event(device.device)
    first.copy_(torch.ones(1, device=device.device), non_blocking=True)
    event.record()
    second.copy_(torch.ones(1, device=device.device), non_blocking=True)
    event.synchronize()
    assert (first.item(), second.isnan().item()) == (1, True)
    moved = torch.ones(1, device=device.device).to("cpu", non_blocking=True)
    assert moved.isnan()
    torch.accelerator.current_stream().synchronize()
    assert (second.item(), moved.item()) == (1, 1)


@pytest.mark.parametrize("is_pinned", [True, False])
def test_pinned_memory_is_not_overwritten_under_a_copy(
    device: EmulatedDevice, is_pinned: bool
) -> None:
    """A copy from other memory has read it when the call returns."""
    ring = torch.empty(3, pin_memory=is_pinned).fill_(torch.nan)
    rows = ring.to(device.device, non_blocking=True)
    event = torch.accelerator.current_stream().record_event()
    event.synchronize()
    ring.fill_(1)
    rows.copy_(ring, non_blocking=True)
    event.record()
    ring.fill_(2)
    if is_pinned:
        with pytest.raises(HostMemoryError, match=r"copy at tests/unit/test_emulated_accelerator"):
            event.synchronize()
    event.synchronize()
    assert rows.cpu().tolist() == [1, 1, 1]


def test_a_stream_computes_with_its_own_tensors_and_those_that_name_it(
    device: EmulatedDevice,
) -> None:
    default = torch.accelerator.current_stream()
    with torch.Stream(device.device):
        rows = torch.ones(3).to(device.device, non_blocking=True)
        assert (rows + 1).cpu().tolist() == [2] * 3
    with pytest.raises(StreamError, match="record_stream"):
        rows + 1
    rows.record_stream(default)
    assert (rows[1:] + 1).cpu().tolist() == [2] * 2


def test_each_thread_has_a_current_stream(device: EmulatedDevice) -> None:
    default = torch.accelerator.current_stream()
    with torch.Stream(device.device) as stream, ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.accelerator.current_stream).result(20) is default
        assert torch.accelerator.current_stream() is stream
    assert torch.accelerator.current_stream() is default
    torch.accelerator.set_stream(stream)
    assert torch.accelerator.current_stream() is stream
    with pytest.raises(TypeError, match="enable_timing"):
        torch.Event(device.device, enable_timing=True)
