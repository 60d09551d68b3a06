"""A deployment whose router and actors share the accelerator, one of which is killed under load."""

from __future__ import annotations

import pytest
import torch

from benchmarks.failover import KILL
from benchmarks.gpu import kill
from benchmarks.gpu.settings import Settings


@pytest.mark.timeout(300)
def test_a_killed_actor_costs_no_request_and_no_token(device: torch.device) -> None:
    result = kill.run(Settings("tests-gpu-", quiet_s=4.0, kill_s=16.0))
    assert all(one.startswith(device.type) for one in result["devices"])
    for window in result["windows"]:
        assert window["requests"] > 0
        assert window["failures"] == {}
    [killed] = [one for one in result["windows"] if one["name"] == KILL]
    assert killed["back_s"] is not None
