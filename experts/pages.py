"""Memory for weights: pages of their own, which go back to the system one tensor at a time.

In the heap they would lie between what is read to make them and let go, and an aligned block of the
same size does not fit into such a hole again: of experts whose matrices are smaller than what
``malloc`` maps by itself, loading would take up to half as much again as they do. That ``malloc``
maps all blocks of that size is no cure: each product would pay for fresh pages.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

MIN_PAGED_BYTES = 64 << 10
"""Smaller tensors come from the heap: half a page is lost at the end of each that has its own."""
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def paged(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor on the CPU, to be filled, that leaves no hole in the heap when it goes."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < MIN_PAGED_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=_FLAGS), dtype=dtype).view(shape)
