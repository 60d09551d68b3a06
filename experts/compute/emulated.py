"""An expert that computes nothing and takes the time of an accelerator.

With emulated experts a machine without accelerators measures a deployment over many devices. The
actor's queue stands for the device's, and an expert sleeps instead of using a core.

Dimension letter: P rows of one expert.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from cluster.spec import Emulation
from cluster.wire.frames import Shape


class EmulatedExpert:
    """A stand-in for a loaded expert; its results are zeros, unlike those of any model."""

    kernel_class = ""
    num_bytes = 0
    """No weights are loaded."""
    grouped = None
    """The emulated device computes one expert after the other."""

    def __init__(
        self,
        emulation: Emulation,
        row_shape: Shape,
        answer_shape: Shape,
        dtype: str,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Map rows of ``row_shape`` and ``dtype`` to ``answer_shape``; ``sleep`` waits for seconds.

        The first axis of either shape may be -1, the length of the rows' sequences.
        """
        self._emulation = emulation
        self._sleep = sleep
        self._answer_shape = answer_shape
        self.row_shape = row_shape
        self.dtype = dtype

    def takes(self, row_shape: Shape) -> bool:
        """See :class:`experts.bank.Expert`."""
        own = self.row_shape
        if own[0] != -1:
            return row_shape == own
        return len(row_shape) == len(own) and row_shape[1:] == own[1:]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return zeros for rows [P, ...] after the emulated time."""
        self._sleep(self._emulation.product_s(rows.shape[0]))
        steps = rows.shape[1]  # taken only where the rows are sequences
        shape = [steps if axis == -1 else axis for axis in self._answer_shape]
        return np.zeros((rows.shape[0], *shape), rows.dtype)
