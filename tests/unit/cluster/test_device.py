"""The device of a process, by torch's interface to accelerators."""

from __future__ import annotations

import psutil
import pytest
import torch

from cluster.device import CPU, accelerator, free_bytes


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
