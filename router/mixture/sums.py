"""Sums whose order depends only on the number of summands, not on shape and place in memory."""

from __future__ import annotations

import numpy as np


def sum_first(values: np.ndarray) -> np.ndarray:
    """Return the sum over the first axis, of at least one, by halves; ``values`` are overwritten.

    Every addition is of single values, so that a sum has the same bits in any array. The error is
    that of a pairwise sum.
    """
    count = len(values)
    while count > 1:
        half = count // 2
        # The middle of an odd number stays where it is.
        np.add(values[:half], values[count - half : count], out=values[:half])
        count -= half
    first: np.ndarray = values[0]
    return first
