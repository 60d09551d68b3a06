"""The weights of an adaptive mixture: standardised while fitted, for raw rows in the fitted parts.

A fit sees inputs and targets of mean 0 and deviation 1. The fitted parts take raw rows, with the
standardisation folded into the first and last layers. A warm start unfolds them again.

Dimension letters: N rows, E experts, F inputs, T steps, W outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from torch import Tensor, nn

from workshop.estimators.adaptive.network import (
    AdaptiveNetwork,
    RecurrentLayers,
    StackedLayers,
)
from workshop.estimators.parts import (
    Array,
    FittedMixture,
    GatePart,
    Link,
    NetworkPart,
    RecurrentPart,
    named_tensors,
)
from workshop.estimators.scale import Layer, Scales, folded

NetworkExpert = NetworkPart | RecurrentPart
Pair = tuple[Array, Array]
"""A given array, and the array of the network that it replaces."""
ROOT = "gate"


def gate_part(network: AdaptiveNetwork, top_k: int | None, names: tuple[str, ...]) -> GatePart:
    """Return the gate, for standardised rows and without its noise."""
    a = network.architecture
    layers = _layers(network.gate, 0)
    weight, bias = layers[-1]
    layers[-1] = weight[: a.num_experts], bias[: a.num_experts]
    return GatePart(tuple(layers), names, top_k, a.activation, a.pool)


def expert_part(network: AdaptiveNetwork, number: int, is_softmax: bool) -> NetworkExpert:
    """Return one expert, for standardised rows and targets."""
    a = network.architecture
    link: Link = "softmax" if is_softmax else "none"
    if not isinstance(network.experts, RecurrentLayers):
        return NetworkPart(tuple(_layers(network.experts, number)), a.activation, link)
    cell = network.experts.cells[number]
    tensors = {f"rnn.{name}": _array(tensor) for name, tensor in cell.named_parameters()}
    ((weight, bias),) = _layers(network.experts.output, number)
    return RecurrentPart(
        a.cells[number], tensors | {"head.weight": weight, "head.bias": bias}, link
    )


def fitted_mixture(
    network: AdaptiveNetwork,
    scales: Scales,
    kind: Literal["mean", "density", "probabilities"],
    row_shape: tuple[int, ...],
    top_k: int | None,
    deviations: Array | None,
) -> FittedMixture:
    """Return the mixture for raw rows. ``deviations`` [E, W] are of standardised targets."""
    a = network.architecture
    names = tuple(f"expert{number}" for number in range(a.num_experts))
    is_softmax = kind == "probabilities"
    experts = {name: expert_part(network, number, is_softmax) for number, name in enumerate(names)}
    gates = {ROOT: gate_part(network, top_k, names)}
    scaled = FittedMixture(ROOT, gates, experts, kind, row_shape, a.width, deviations)
    return folded(scaled, scales)


def take_over(network: AdaptiveNetwork, mixture: FittedMixture, scales: Scales) -> None:
    """Set the network's weights to those of a fitted mixture, for a warm start.

    The noise of a noisy gate stays as it is. Raises ``ValueError`` where sizes or kinds of the
    networks differ.
    """
    num_experts = network.architecture.num_experts
    if len(mixture.experts) != num_experts:
        raise _differs("n_experts", len(mixture.experts), num_experts)
    back = folded(mixture, scales.inverse())
    gate = back.gates[mixture.root]
    pairs = [*_pairs("the gate", gate, gate_part(network, None, gate.choices))]
    for number, part in enumerate(back.experts.values()):
        assert isinstance(part, NetworkPart | RecurrentPart)
        own = expert_part(network, number, part.link == "softmax")
        pairs += _pairs("experts", part, own)
    # The arrays of ``gate_part`` and ``expert_part`` are views of the network's parameters.
    for given, parameter in pairs:
        parameter[...] = given
    if network.architecture.deviation != "none" and back.deviations is not None:
        variances = (back.deviations**2).mean(axis=1, keepdims=True)
        if network.architecture.deviation == "shared":
            variances = variances.mean(axis=0, keepdims=True)
        _array(network.log_deviations)[...] = 0.5 * np.log(variances)


def _pairs(
    name: str, given: GatePart | NetworkExpert, own: GatePart | NetworkExpert
) -> Iterator[Pair]:
    """Yield each array of a part with that of the network; raises unless they are alike."""
    arrays, own_arrays = _arrays(given), _arrays(own)
    shapes = [{key: a.shape for key, a in sorted(of.items())} for of in (arrays, own_arrays)]
    for before, now in ((_kind(given), _kind(own)), shapes):
        if before != now:
            raise _differs(name, before, now)
    for key, array in arrays.items():
        yield array, own_arrays[key]


def _arrays(part: GatePart | NetworkExpert) -> Mapping[str, Array]:
    return part.tensors if isinstance(part, RecurrentPart) else named_tensors(part.layers)


def _kind(part: GatePart | NetworkExpert) -> str:
    if isinstance(part, RecurrentPart):
        return f"rnn, cell {part.cell}"
    is_deep = len(part.layers) > 1
    kind = f"{len(part.layers)} layers, activation {part.activation}" if is_deep else "linear"
    return f"{kind}, pool {part.pool}" if isinstance(part, GatePart) else kind


def _differs(name: str, given: object, own: object) -> ValueError:
    return ValueError(
        f"warm_start: {name} of the fitted mixture ({given}) must be as before (now: {own})"
    )


def _layers(stack: StackedLayers, number: int) -> list[Layer]:
    return [
        (_array(weight[number]), _array(bias[number]))
        for weight, bias in zip(stack.weights, stack.biases, strict=True)
    ]


def _array(tensor: Tensor | nn.Parameter) -> Array:
    array: Array = tensor.detach().numpy()
    return array
