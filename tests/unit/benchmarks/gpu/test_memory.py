"""What a plan says of a device's memory, beside what router and actors have on an emulated one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu.memory import Planned, compared, planned
from tests.checkpoints import save_mixtral
from tests.emulated_device import emulated_device
from tests.local_cluster import LocalCluster, greedy_request


def test_the_planned_bytes_are_those_that_router_and_actors_have(tmp_path: Path) -> None:
    save_mixtral(tmp_path, hidden_size=128, intermediate_size=256)
    cache_tokens = 8192
    plan = planned(tmp_path, 1, cache_tokens)
    for on_device, part in zip(("device", "experts_device"), plan, strict=True):
        with emulated_device() as device:
            where = {on_device: device.device}
            cluster = LocalCluster(
                tmp_path, num_actors=1, cache_tokens=cache_tokens, dtype="bfloat16", **where
            )
            held = torch.accelerator.memory_allocated()
            cluster.generate(*(greedy_request(f"r{i}", range(3, 90), 3) for i in range(4)))
            peak = torch.accelerator.max_memory_allocated()
            cluster.close()
            del cluster
        assert held == pytest.approx(part.held_bytes, rel=0.02)
        assert part.held_bytes < peak < part.most_bytes


def test_each_process_is_compared_with_its_own_part_of_the_plan() -> None:
    plan = Planned(150, 50), Planned(700, 300)
    found = compared(plan, {"router": (100, 130), "actor-0": (1500, 1500), "actor-1": (500, 0)})
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
    assert found["router"]["held_bytes"] == 150
    assert found["router"]["reserved_bytes"] == 130
