"""An expert actor that tells what its device had, by a subclass: the product has no hook."""

from __future__ import annotations

import ray
import torch

from benchmarks.gpu.memory import most_bytes
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
