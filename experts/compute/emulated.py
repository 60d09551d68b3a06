"""An expert that takes the time of an accelerator and computes nothing.

With these, what serving experts apart gives on many devices is measured on a machine that has none:
the actor's one queue is the device's, and a product sleeps instead of using a core.

Dimension letters: P rows of one expert, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from cluster.spec import Emulation


class EmulatedExpert:
    """Stands for a loaded expert; its answers are zeros, which nobody can take for the model's."""

    num_bytes = 0
    """Nothing is loaded."""
    device = torch.device("cpu")
    together = None
    """A device computes one product after the other."""

    def __init__(
        self,
        emulation: Emulation,
        hidden_size: int,
        dtype: torch.dtype,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take rows of ``hidden_size`` values of ``dtype``; ``sleep`` takes seconds."""
        self._emulation = emulation
        self._sleep = sleep
        self.hidden_size = hidden_size
        self.dtype = dtype

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return zeros for rows [P, H] after the time that the device is to take for them."""
        self._sleep(self._emulation.product_s(rows.shape[0]))
        return torch.zeros_like(rows)
