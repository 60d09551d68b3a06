"""An expert that computes nothing and takes the time of an accelerator.

With emulated experts a machine without accelerators measures a deployment over many devices. The
actor's queue stands for the device's, and an expert sleeps instead of using a core.

Dimension letters: P rows of one expert, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from cluster.spec import Emulation


class EmulatedExpert:
    """A stand-in for a loaded expert; its results are zeros, unlike those of any model."""

    num_bytes = 0
    """No weights are loaded."""
    device = torch.device("cpu")
    grouped = None
    """The emulated device computes one expert after the other."""

    def __init__(
        self,
        emulation: Emulation,
        hidden_size: int,
        dtype: torch.dtype,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Accept rows of ``hidden_size`` values of ``dtype``; ``sleep`` waits for seconds."""
        self._emulation = emulation
        self._sleep = sleep
        self.hidden_size = hidden_size
        self.dtype = dtype

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return zeros for rows [P, H] after the emulated time."""
        self._sleep(self._emulation.product_s(rows.shape[0]))
        return torch.zeros_like(rows)
