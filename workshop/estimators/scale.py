"""The scale of columns: values of mean 0 and deviation 1 inside a fit, raw ones outside.

Dimension letters: N rows, T steps of a sequence, F columns, W outputs of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from workshop.estimators.parts import (
    Array,
    EstimatorPart,
    ExpertPart,
    FittedMixture,
    Layers,
    NetworkPart,
)

Layer = tuple[Array, Array]
"""The weight [W, F] and the bias [W] of a linear layer."""


@dataclass(frozen=True)
class Scale:
    """``(values - mean) / deviation`` along the last axis; ``mean`` and ``deviation`` are [F]."""

    mean: Array
    deviation: Array

    @classmethod
    def of(cls, values: Array, weights: Array) -> Scale:
        """Return that of values [N, F] or [N, T, F] of rows with ``weights`` [N].

        The deviation of a constant column is 1.
        """
        columns = values.reshape(-1, values.shape[-1])
        repeated = np.repeat(weights, len(columns) // len(values))
        mean = np.average(columns, axis=0, weights=repeated)
        centred = columns - mean
        # Squares of large values overflow and of small ones vanish; a power of 2 rounds nothing.
        _, exponent = np.frexp(np.abs(centred).max(axis=0))
        variance = np.average(np.ldexp(centred, -exponent) ** 2, axis=0, weights=repeated)
        deviation = np.ldexp(np.sqrt(variance), exponent)
        # A constant column has rounding for a deviation.
        is_constant = deviation <= 1e-12 * np.maximum(np.abs(mean), 1e-290)
        return cls(mean, np.where(is_constant, 1.0, deviation))

    @classmethod
    def none(cls, width: int) -> Scale:
        """Return the scale that changes nothing, for [W] values."""
        return cls(np.zeros(width), np.ones(width))

    def __call__(self, values: Array) -> Array:
        """Return the scaled values."""
        scaled: Array = (values - self.mean) / self.deviation
        return scaled

    def inverse(self) -> Scale:
        """Return the scale that undoes this one."""
        return Scale(-self.mean / self.deviation, 1 / self.deviation)

    def tiled(self, copies: int) -> Scale:
        """Return that of ``copies`` values behind each other, as of a flattened sequence."""
        return Scale(np.tile(self.mean, copies), np.tile(self.deviation, copies))

    def before(self, layer: Layer) -> Layer:
        """Return the layer that takes raw inputs in place of scaled ones."""
        weight = layer[0] / self.deviation
        return weight, layer[1] - weight @ self.mean

    def undone_after(self, layer: Layer) -> Layer:
        """Return the layer whose outputs are raw in place of scaled."""
        return layer[0] * self.deviation[:, None], layer[1] * self.deviation + self.mean


@dataclass(frozen=True)
class Scales:
    """The scales of inputs and of targets; those of classes change nothing."""

    inputs: Scale
    targets: Scale

    def inverse(self) -> Scales:
        """Return the scales that undo these."""
        return Scales(self.inputs.inverse(), self.targets.inverse())

    @property
    def log_units(self) -> float:
        """How much a log density of raw targets is below one of scaled targets."""
        return float(np.log(self.targets.deviation).sum())


def folded(mixture: FittedMixture, scales: Scales) -> FittedMixture:
    """Return the mixture for raw rows and targets of one for scaled ones, in arrays of its own.

    With the inverse scales it is the other way round.
    """
    deviations = mixture.deviations
    return replace(
        mixture,
        gates={
            name: replace(gate, layers=_after(scales.inputs, gate.layers))
            for name, gate in mixture.gates.items()
        },
        experts={name: _folded(part, scales) for name, part in mixture.experts.items()},
        deviations=None if deviations is None else deviations * scales.targets.deviation,
    )


def _folded(part: ExpertPart, scales: Scales) -> ExpertPart:
    if isinstance(part, NetworkPart):
        *layers, last = _after(scales.inputs, part.layers)
        return replace(part, layers=(*layers, scales.targets.undone_after(last)))
    assert not isinstance(part, EstimatorPart), "its rows are raw"
    tensors = {name: tensor.copy() for name, tensor in part.tensors.items()}
    for scale, weight, bias in (
        (scales.inputs.before, "rnn.weight_ih_l0", "rnn.bias_ih_l0"),
        (scales.targets.undone_after, "head.weight", "head.bias"),
    ):
        tensors[weight], tensors[bias] = scale((tensors[weight], tensors[bias]))
    return replace(part, tensors=tensors)


def _after(inputs: Scale, layers: Layers) -> Layers:
    """Return copies of layers, of which the first takes raw inputs."""
    first, *rest = layers
    weight, bias = inputs.tiled(first[0].shape[1] // len(inputs.mean)).before(first)
    return (np.ascontiguousarray(weight), bias), *((w.copy(), b.copy()) for w, b in rest)
