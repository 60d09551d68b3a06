"""Expert actors that tell what their device had and did, by subclasses: the product has no hook."""

from __future__ import annotations

from typing import Any

import ray
import torch

from benchmarks.gpu.device_trace import DeviceRecorder
from benchmarks.gpu.memory import most_bytes
from benchmarks.timeline import Recorded
from benchmarks.tracing import TracingActor
from experts.remote import RemoteExpertActor


class MeasuredActor(RemoteExpertActor):
    """The product's actor, which tells its kernels and the memory that torch had on its device."""

    @ray.method(concurrency_group="control")
    def device_bytes(self) -> tuple[int, int]:
        """Return the most bytes at once of tensors, and of torch; 0 without a device."""
        return most_bytes() if torch.accelerator.is_available() else (0, 0)

    @ray.method(concurrency_group="control")
    def kernel_classes(self) -> list[str]:
        """Return the classes of the kernels that compute its experts."""
        return [kernel.kernel_class for kernel in self.describe().kernels]


class ProfiledActor(TracingActor):
    """The actor that records its spans, and those of its device where that is asked for."""

    def __init__(self, *arguments: Any) -> None:
        """As :class:`TracingActor`."""
        super().__init__(*arguments)
        self._device_recorder: DeviceRecorder | None = None

    @ray.method(concurrency_group="control")
    def begin_device(self) -> None:
        """See :meth:`DeviceRecorder.begin`."""
        self._device_recorder = DeviceRecorder()
        self._device_recorder.begin()

    @ray.method(concurrency_group="control")
    def end_device(self) -> list[Recorded]:
        """See :meth:`DeviceRecorder.end`."""
        assert self._device_recorder is not None
        return self._device_recorder.end()
