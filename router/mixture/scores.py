"""The scores of a gate: a linear layer or a network, read from a safetensors file.

Dimension letters: R rows, F values that a gate looks at, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experts.backends.products import mlp
from experts.backends.tensors import Layer, PartTensors
from experts.checkpoint.mixture import Mixture
from experts.mixture.parts import Activation, LinearGate, MlpGate


@dataclass(frozen=True, slots=True)
class Scores:
    """The function of one gate, of an input's pooled rows; a linear gate has one layer."""

    input: str
    pool: str
    layers: Sequence[Layer]
    activation: Activation

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Map ``vectors`` [R, F] to scores [R, C], of the same dtype and contiguous."""
        return mlp(vectors, self.layers, self.activation)


def read_scores(mixture: Mixture, name: str, gate: LinearGate | MlpGate) -> Scores:
    """Read the tensors of a gate.

    Raises :class:`CheckpointError` as :class:`router.mixture.gate.MixtureGate` does.
    """
    tensors = PartTensors(mixture, f"gates.{name}", gate)
    given = mixture.spec.gate_input(gate)
    size = given.size if gate.pool == "flatten" else given.shape[-1]
    num_choices = len(gate.choices)
    if isinstance(gate, MlpGate):
        layers, activation = tensors.layers(size, num_choices), gate.activation
    else:
        layers, activation = [tensors.linear(size, num_choices)], "relu"
    tensors.finish()
    return Scores(given.name, gate.pool, layers, activation)


def best_choices(scores: np.ndarray, num_chosen: int) -> np.ndarray:
    """Return the largest of the scores [R, C], bool [R, C]; of equal ones the first."""
    if num_chosen == scores.shape[1]:
        return np.ones(scores.shape, dtype=bool)
    is_chosen = np.zeros(scores.shape, dtype=bool)
    if num_chosen == 1:
        best = scores.argmax(axis=1, keepdims=True)
    else:
        best = np.argsort(-scores, axis=1, kind="stable")[:, :num_chosen]
    np.put_along_axis(is_chosen, best, True, axis=1)
    return is_chosen
