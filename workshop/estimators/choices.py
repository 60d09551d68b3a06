"""Sums over the last axis, that of a mixture's experts, a gate's choices or classes.

It is often two or three long, and numpy's own reductions are many times slower there.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

_FEW_CHOICES = 16


def log_sum_exp(scores: Array) -> Array:
    """Return log Σ exp over the last axis, kept with length 1; -inf where all scores are -inf."""
    top = _over_choices(np.maximum, scores)
    if np.isfinite(top).all():  # no logarithm below is one of 0
        return np.log(sum_of_choices(np.exp(scores - top))) + top
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(sum_of_choices(np.exp(scores - top))) + top


def sum_of_choices(values: Array) -> Array:
    """Return the sum over the last axis, kept with length 1."""
    return _over_choices(np.add, values)


def centred(values: Array) -> Array:
    """Return ``values`` less their mean over the last axis. numpy's own mean is slow there."""
    num_choices = values.shape[-1]
    if num_choices == 2:
        return values - (values[..., :1] + values[..., 1:]) / num_choices
    result: Array = values - np.add.reduce(values, axis=-1, keepdims=True) / num_choices
    return result


def _over_choices(function: np.ufunc, values: Array) -> Array:
    """Reduce the last axis. numpy's own reduction is many times slower where it is short."""
    if values.shape[-1] > _FEW_CHOICES:
        reduced: Array = function.reduce(values, axis=-1, keepdims=True)
        return reduced
    if values.shape[-1] < 2:
        return values[..., :1].copy()
    result = function(values[..., :1], values[..., 1:2])
    for choice in range(2, values.shape[-1]):
        function(result, values[..., choice : choice + 1], out=result)
    return result


def log_softmax(scores: Array) -> Array:
    """Return the log of the softmax over the last axis."""
    return scores - log_sum_exp(scores)
