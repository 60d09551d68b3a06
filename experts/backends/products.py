"""Layers whose result for a row does not depend on the other rows.

A matrix product over all rows adds up in an order that depends on their number. So each row is
multiplied alone, by one BLAS call of a fixed shape from numpy's loop over rows. numpy's functions
of single values give the same bits at every place of an array; some of torch's do not. Unlike the
sums of :mod:`experts.compute.row_math`, the bits may differ between processors.

Dimension letters: P rows, F inputs of a layer, W outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experts.backends.tensors import Layer
from experts.compute.row_math import ACTIVATIONS
from experts.mixture.parts import Activation


def linear(rows: np.ndarray, layer: Layer) -> np.ndarray:
    """Return rows [P, F] times ``weight`` [W, F] plus ``bias`` [W]: [P, W], of their dtype."""
    weight, bias = layer
    outputs: np.ndarray = np.matmul(weight, rows[:, :, None])[:, :, 0]
    if bias is not None:
        outputs += bias
    return outputs


def softmax(values: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def mlp(rows: np.ndarray, layers: Sequence[Layer], activation: Activation) -> np.ndarray:
    """Apply layers to rows [P, F], with the activation between them."""
    for layer in layers[:-1]:
        rows = ACTIVATIONS[activation](linear(rows, layer))
    return linear(rows, layers[-1])
