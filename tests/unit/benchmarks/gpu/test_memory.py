"""What a plan says of a device's memory, beside what router and actors have on an emulated one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu.memory import Planned, compared, planned
from tests.checkpoints import save_mixtral
from tests.emulated_device import emulated_device
from tests.local_cluster import LocalCluster


def test_the_planned_bytes_are_those_that_router_and_actors_have(tmp_path: Path) -> None:
    save_mixtral(tmp_path, hidden_size=128, intermediate_size=256)
    cache_tokens, peaks = 8192, []
    plan = planned(tmp_path, 1, cache_tokens)
    for on_device in ("device", "experts_device"):
        with emulated_device() as device:
            where = {on_device: device.device}
            cluster = LocalCluster(tmp_path, num_actors=1, cache_tokens=cache_tokens, **where)
            peaks.append(torch.accelerator.max_memory_allocated())
            cluster.close()
            del cluster
    assert peaks[0] == pytest.approx(plan.router_bytes, rel=0.02)
    assert peaks[1] == pytest.approx(plan.actor_bytes, rel=0.02)


def test_each_process_is_compared_with_its_own_part_of_the_plan() -> None:
    found = compared(Planned(200, 1000), {"router": 100, "actor-0": 1500, "actor-1": 500})
    assert {process: one["planned_bytes"] for process, one in found.items()} == {
        "router": 200,
        "actor-0": 1000,
        "actor-1": 1000,
    }
    assert {process: one["ratio"] for process, one in found.items()} == {
        "router": 0.5,
        "actor-0": 1.5,
        "actor-1": 0.5,
    }
