"""A router tells where its device has no room for its largest step."""

from __future__ import annotations

import pytest
import torch

from cluster.device import CPU
from router.config.deployment import RouterConfig
from router.engine.device_room import warn_of_steps
from router.model.memory import StepLimits, router_sizes
from tests.emulated_device import emulated_device
from tests.unit.router.engine.conftest import OpenCluster

CONFIG = RouterConfig(max_batch_size=4, max_batch_tokens=64, cache_tokens=4096)
LENGTH = 1000


@pytest.mark.parametrize("lacking_bytes", [0, 1])
def test_a_device_that_lacks_a_byte_for_the_largest_step_is_told_of(
    open_cluster: OpenCluster,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    lacking_bytes: int,
) -> None:
    with emulated_device() as device:
        cluster = open_cluster(threaded=False, device=device.device)
        checkpoint = cluster.checkpoint
        sizes = router_sizes(checkpoint.family, checkpoint.config)
        limits = StepLimits(4, 64, LENGTH)
        needed_bytes = sizes.step_bytes(limits, 4, reads_pages=False)
        assert needed_bytes > sizes.step_bytes(limits, 2, reads_pages=True)
        left_bytes = needed_bytes - lacking_bytes
        monkeypatch.setattr("router.engine.device_room.free_bytes", lambda device: left_bytes)
        given = "m", checkpoint, cluster.model, CONFIG, LENGTH, torch.float32
        caplog.clear()
        warn_of_steps(*given, device.device)
        assert bool(caplog.records) == bool(lacking_bytes)
        if lacking_bytes:
            assert f"may take {needed_bytes:,} bytes" in caplog.text
            assert f"which has {left_bytes:,} free" in caplog.text
        caplog.clear()
        warn_of_steps(*given, CPU)
        assert not caplog.records
