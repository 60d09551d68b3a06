"""Products and activations whose result for a row does not depend on the other rows.

A matrix product over all rows adds up in an order that depends on their number. So each row is
multiplied alone, by one BLAS call of a fixed shape from numpy's loop over rows. numpy's functions
of single values give the same bits at every place of an array; some of torch's do not.

Dimension letters: P rows, F inputs of a layer, W outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experts.backends.tensors import Layer
from experts.mixture.parts import Activation

_SQRT_HALF = 0.5**0.5


def linear(rows: np.ndarray, layer: Layer) -> np.ndarray:
    """Return rows [P, F] times ``weight`` [W, F] plus ``bias`` [W]: [P, W], of their dtype."""
    weight, bias = layer
    outputs: np.ndarray = np.matmul(weight, rows[:, :, None])[:, :, 0]
    if bias is not None:
        outputs += bias
    return outputs


def relu(values: np.ndarray) -> np.ndarray:
    """Return the positive part."""
    return np.maximum(values, 0)


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):  # exp(-x) is infinite where the result is 0
        return 1 / (1 + np.exp(-values))


def silu(values: np.ndarray) -> np.ndarray:
    """Return x sigmoid(x) (Hendrycks and Gimpel 2016)."""
    return values * sigmoid(values)


def gelu(values: np.ndarray) -> np.ndarray:
    """Return x Φ(x), with the normal distribution itself (Hendrycks and Gimpel 2016)."""
    from scipy.special import erf  # slow to import and seldom needed

    return values * (0.5 * (1 + erf(values * values.dtype.type(_SQRT_HALF))))


def softmax(values: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


ACTIVATIONS: Mapping[Activation, Callable[[np.ndarray], np.ndarray]] = {
    "relu": relu,
    "tanh": np.tanh,
    "gelu": gelu,
    "silu": silu,
    "sigmoid": sigmoid,
}


def mlp(rows: np.ndarray, layers: Sequence[Layer], activation: Activation) -> np.ndarray:
    """Apply layers to rows [P, F], with the activation between them."""
    for layer in layers[:-1]:
        rows = ACTIVATIONS[activation](linear(rows, layer))
    return linear(rows, layers[-1])
