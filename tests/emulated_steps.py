"""The copies of each step of an engine whose model is on the emulated device."""

from __future__ import annotations

from typing import Any

from tests.emulated_copies import Copies
from tests.emulated_device import EmulatedDevice
from tests.local_cluster import LocalCluster


class Steps:
    """The copies of each step of an engine."""

    def __init__(self, cluster: LocalCluster, device: EmulatedDevice) -> None:
        self.copies: list[Copies] = []
        step = cluster.engine.step

        def counted(*args: Any) -> None:
            with device.counted() as copies:
                step(*args)
            self.copies.append(copies)

        cluster.engine.step = counted  # type: ignore[method-assign]

    def have_one_copy_each_way_a_layer(self, num_layers: int) -> None:
        """Check that the steps have these copies, one more each way, and no others."""
        assert self.copies
        for copies in self.copies:
            assert len(copies.to_host) == len(copies.to_device) == num_layers + 1
            assert not copies.host_reads
            assert not copies.mixed
