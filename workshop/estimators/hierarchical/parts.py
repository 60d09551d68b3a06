"""A hierarchical mixture's parts: from standardised coefficients to a fitted mixture, and back.

Dimension letters: N rows, F features, D = F + 1 columns of the design, O outputs, C classes, E
experts; G gates of a level with B choices each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from workshop.estimators.hierarchical.tree import SoftmaxLeaves, Tree
from workshop.estimators.parts import Array, FittedMixture, GatePart, NetworkPart
from workshop.estimators.scale import Layer, Scales, folded


def mixture_of(tree: Tree, scales: Scales, top_k: Sequence[int | None]) -> FittedMixture:
    """Return the mixture that a fitted tree is, for raw rows.

    A gate of level l keeps its ``top_k[l]`` best choices.
    """
    branching = [level.shape[2] for level in tree.gates]
    gates = {}
    for depth, level in enumerate(tree.gates):
        kind = "gate" if depth + 1 < len(branching) else "expert"
        for number, path in enumerate(_paths(branching[:depth])):
            choices = tuple(_name(kind, (*path, place)) for place in range(branching[depth]))
            layer = _layer(level[:, number])
            gates[_name("gate", path)] = GatePart((layer,), choices, top_k[depth])
    leaves = tree.leaves
    names = [_name("expert", path) for path in _paths(branching)]
    is_softmax = isinstance(leaves, SoftmaxLeaves)
    experts = {}
    for number, name in enumerate(names):
        own = leaves.coefficients[:, number] if is_softmax else leaves.coefficients[number]
        experts[name] = NetworkPart((_layer(own),), link="softmax" if is_softmax else "none")
    width, row_shape = len(scales.targets.mean), (len(scales.inputs.mean),)
    if isinstance(leaves, SoftmaxLeaves):
        mixture = FittedMixture("gate", gates, experts, "probabilities", row_shape, width)
    else:
        deviations = np.sqrt(leaves.variances)
        mixture = FittedMixture("gate", gates, experts, "density", row_shape, width, deviations)
    return folded(mixture, scales)


def tree_of(mixture: FittedMixture, empty: Tree, scales: Scales) -> Tree:
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
    mixture = folded(mixture, scales.inverse())
    gates = tuple(
        np.stack(
            [
                _coefficients(mixture.gates[_name("gate", path)].layers[0])
                for path in _paths(branching[:depth])
            ],
            axis=1,
        )
        for depth in range(len(branching))
    )
    coefficients = []
    for part in mixture.experts.values():
        assert isinstance(part, NetworkPart)
        coefficients.append(_coefficients(part.layers[0]))
    leaves = empty.leaves
    if isinstance(leaves, SoftmaxLeaves):
        leaves = replace(leaves, coefficients=np.stack(coefficients, axis=1))
    else:
        assert mixture.deviations is not None
        variances = np.maximum(mixture.deviations**2, leaves.min_variance)
        leaves = replace(leaves, coefficients=np.stack(coefficients), variances=variances)
    return Tree(gates, leaves, empty.penalty, empty.newton_steps)


def _layer(coefficients: Array) -> Layer:
    """Return coefficients [D, W] as a layer."""
    return coefficients[:-1].T, coefficients[-1]


def _coefficients(layer: Layer) -> Array:
    """Return a layer's coefficients [D, W]."""
    return np.vstack([layer[0].T, layer[1]])


def _paths(branching: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the choices that lead to each node below these levels, in the order of nodes."""
    return list(product(*map(range, branching)))


def _name(kind: str, path: Sequence[int]) -> str:
    return ".".join([kind, *map(str, path)])
