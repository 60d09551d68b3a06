"""Which neuron of an expert is which neuron of another one.

An expert's output does not depend on the order of its neurons. Before experts are averaged, the
neurons of each are brought into the order of a reference, by the assignment with the largest sum of
inner products (Li et al. 2023, "Merge, Then Compress", arXiv 2310.01334).

Dimension letters: I neurons, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

DOWN, DOWN_BIAS = 2, 5
"""The indices in ``ExpertTensors.parts()`` of the parts whose rows are no neurons."""


def neuron_order(reference: Sequence[np.ndarray], parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the order [I] in which an expert's neurons are most like the reference's.

    Both are float32 matrices and biases in the order of ``ExpertTensors.parts()``.
    """
    [num_neurons, _] = reference[0].shape
    products = np.zeros((num_neurons, num_neurons), np.float32)
    for index, (left, right) in enumerate(zip(reference, parts, strict=True)):
        if index == DOWN:
            products += left.T @ right
        elif index != DOWN_BIAS:
            products += left.reshape(num_neurons, -1) @ right.reshape(num_neurons, -1).T
    _, order = linear_sum_assignment(products, maximize=True)
    found: np.ndarray = order
    return found


def in_order(part: np.ndarray, index: int, order: np.ndarray) -> np.ndarray:
    """Return a part of an expert with its neurons in this order."""
    if index == DOWN_BIAS:
        return part
    ordered: np.ndarray = part[:, order] if index == DOWN else part[order]
    return ordered
