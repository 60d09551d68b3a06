"""A hierarchical mixture's parts: from standardised coefficients to a fitted mixture, and back.

Dimension letters: N rows, F features, D = F + 1 columns of the design, O outputs, C classes, E
experts; G gates of a level with B choices each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from router.workshop.mixture.hierarchical.leaves import GaussianLeaves, Leaves, SoftmaxLeaves
from router.workshop.mixture.hierarchical.tree import Tree
from router.workshop.mixture.parts import Array, FittedMixture, GatePart, NetworkPart


@dataclass(frozen=True)
class Scale:
    """The mean and the deviation of each column; a constant column has the deviation 1."""

    mean: Array
    deviation: Array

    @classmethod
    def of(cls, values: Array, weight: Array) -> Scale:
        """Return the weighted mean and deviation of the columns of ``values`` [N, F]."""
        mean = np.average(values, axis=0, weights=weight)
        deviation = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weight))
        # A constant column has rounding for a deviation.
        is_constant = deviation <= 1e-10 * np.maximum(np.abs(mean), 1e-290)
        return cls(mean, np.where(is_constant, 1.0, deviation))

    def standardised(self, values: Array) -> Array:
        """Return ``values`` [N, F] with mean 0 and deviation 1."""
        return (values - self.mean) / self.deviation

    def raw_layer(self, coefficients: Array) -> tuple[Array, Array]:
        """Return weight [W, F] and bias [W] for raw rows, of coefficients [D, W]."""
        weight = np.ascontiguousarray((coefficients[:-1] / self.deviation[:, None]).T)
        return weight, coefficients[-1] - weight @ self.mean

    def coefficients(self, layer: tuple[Array, Array]) -> Array:
        """Return coefficients [D, W] for standardised rows: the inverse of :meth:`raw_layer`."""
        weight, bias = layer
        return np.vstack([(weight * self.deviation).T, bias + weight @ self.mean])


def mixture_of(
    tree: Tree, rows_scale: Scale, targets_scale: Scale | None, top_k: Sequence[int | None]
) -> FittedMixture:
    """Return the mixture that a fitted tree is, for raw rows.

    ``targets_scale`` is that of a regression, and ``None`` for classes. A gate of level l keeps its
    ``top_k[l]`` best choices.
    """
    branching = [level.shape[2] for level in tree.gates]
    gates = {}
    for depth, level in enumerate(tree.gates):
        kind = "gate" if depth + 1 < len(branching) else "expert"
        for number, path in enumerate(_paths(branching[:depth])):
            choices = tuple(_name(kind, (*path, place)) for place in range(branching[depth]))
            layer = rows_scale.raw_layer(level[:, number])
            gates[_name("gate", path)] = GatePart((layer,), choices, top_k[depth])
    leaves = tree.leaves
    names = [_name("expert", path) for path in _paths(branching)]
    row_shape = (len(rows_scale.mean),)
    if isinstance(leaves, SoftmaxLeaves):
        of_classes = {
            name: NetworkPart(
                (rows_scale.raw_layer(leaves.coefficients[:, number]),), link="softmax"
            )
            for number, name in enumerate(names)
        }
        width = leaves.coefficients.shape[2]
        return FittedMixture("gate", gates, of_classes, "probabilities", row_shape, width)
    assert isinstance(leaves, GaussianLeaves)
    assert targets_scale is not None
    experts = {}
    for number, name in enumerate(names):
        weight, bias = rows_scale.raw_layer(leaves.coefficients[number] * targets_scale.deviation)
        experts[name] = NetworkPart(((weight, bias + targets_scale.mean),))
    deviations = np.sqrt(leaves.variances) * targets_scale.deviation
    width = len(targets_scale.mean)
    return FittedMixture("gate", gates, experts, "density", row_shape, width, deviations)


def tree_of(
    mixture: FittedMixture, empty: Tree, rows_scale: Scale, targets_scale: Scale | None
) -> Tree:
    """Return ``empty`` with the coefficients of a mixture that :func:`mixture_of` made.

    Raises ``ValueError`` for a mixture of another tree.
    """
    branching = [level.shape[2] for level in empty.gates]
    names = [_name("expert", path) for path in _paths(branching)]
    if names != list(mixture.experts):
        raise ValueError(
            f"warm_start: branching={tuple(branching)} has {math.prod(branching)} experts in "
            f"another tree than the {len(mixture.experts)} of the fit before"
        )
    gates = tuple(
        np.stack(
            [
                rows_scale.coefficients(mixture.gates[_name("gate", path)].layers[0])
                for path in _paths(branching[:depth])
            ],
            axis=1,
        )
        for depth in range(len(branching))
    )
    layers = []
    for part in mixture.experts.values():
        assert isinstance(part, NetworkPart)
        layers.append(part.layers[0])
    leaves: Leaves = empty.leaves
    if isinstance(leaves, SoftmaxLeaves):
        coefficients = np.stack([rows_scale.coefficients(layer) for layer in layers], axis=1)
        leaves = SoftmaxLeaves(coefficients, leaves.penalty, leaves.newton_steps)
    else:
        assert isinstance(leaves, GaussianLeaves)
        assert targets_scale is not None
        assert mixture.deviations is not None
        deviation = targets_scale.deviation
        coefficients = np.stack(
            [
                rows_scale.coefficients((weight, bias - targets_scale.mean)) / deviation
                for weight, bias in layers
            ]
        )
        variances = np.maximum((mixture.deviations / deviation) ** 2, leaves.min_variance)
        leaves = GaussianLeaves(coefficients, variances, leaves.penalty, leaves.min_variance)
    return Tree(gates, leaves, empty.penalty, empty.newton_steps)


def _paths(branching: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the choices that lead to each node below these levels, in the order of nodes."""
    return list(product(*map(range, branching)))


def _name(kind: str, path: Sequence[int]) -> str:
    return ".".join([kind, *map(str, path)])
