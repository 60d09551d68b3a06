"""The device of a process, by torch's interface to accelerators."""

from __future__ import annotations

import psutil
import pytest
import torch

from cluster.device import CPU, accelerator, check_room, device_of, free_bytes
from cluster.errors import UnavailableError


def test_a_machine_without_an_accelerator_has_none_and_its_memory_is_the_systems() -> None:
    if torch.accelerator.is_available():
        found = accelerator()
        assert found is not None
        assert 0 < free_bytes(found) <= torch.accelerator.get_memory_info(found)[1]
    else:
        assert accelerator() is None
    assert 0 < free_bytes(CPU) <= psutil.virtual_memory().total


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_any_accelerator_of_torch_is_one(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    device = torch.device(kind)
    told = {device: (3 << 30, 4 << 30)}
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", told.__getitem__)
    assert accelerator() == device
    assert free_bytes(device) == 3 << 30


@pytest.mark.parametrize(
    ("kind", "num_gpus", "is_host"),
    [
        ("cpu", 0.0, True),
        ("auto", 0.0, True),
        ("auto", 0.25, False),
        ("accelerator", 0.0, False),
        ("accelerator", 1.0, False),
    ],
)
def test_the_device_is_that_which_was_asked_for_or_it_is_said(
    monkeypatch: pytest.MonkeyPatch, kind: str, num_gpus: float, is_host: bool
) -> None:
    xpu = torch.device("xpu")
    found: list[torch.device | None] = [xpu]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found[0])
    assert device_of(kind, num_gpus, "a.b") == (CPU if is_host else xpu)
    found[0] = None
    if is_host:
        assert device_of(kind, num_gpus, "a.b") == CPU
    else:
        with pytest.raises(UnavailableError, match=r"finds no accelerator on .*; inst") as caught:
            device_of(kind, num_gpus, "a.b")
        assert caught.value.field == "a.b"


def test_a_device_with_too_little_memory_is_told_with_the_bytes_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = [5000]
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (free[-1], 9000))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: free.append(5000))
    xpu = torch.device("xpu")
    check_room(xpu, 5000, "a.b")
    free.append(100)  # the rest is kept for later tensors
    check_room(xpu, 5000, "a.b")
    check_room(CPU, 1 << 60, "a.b")  # the host's memory is the system's to give
    with pytest.raises(
        UnavailableError, match=r"xpu of .* lacks 1,001 bytes of the 6,001"
    ) as caught:
        check_room(xpu, 6001, "a.b")
    assert caught.value.field == "a.b"
