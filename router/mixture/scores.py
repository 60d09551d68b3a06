"""The scores of a gate: a linear layer or a network, read from a safetensors file.

Dimension letters: R rows, F values that a gate looks at, C choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from cluster.errors import CheckpointError, shown_name
from experts.checkpoint.mixture import Mixture
from experts.compute.row_math import ACTIVATIONS, linear_columns
from experts.mixture.parts import LinearGate, MlpGate

_Tensors = Mapping[str, torch.Tensor]
_Layer = tuple[np.ndarray, np.ndarray | None]
"""The transposed weight [F, C] and the bias [C] of a layer."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The function of one gate: its layers, with an activation between them."""

    input: str
    pool: str
    layers: tuple[_Layer, ...]
    activation: str

    def __call__(self, columns: np.ndarray) -> np.ndarray:
        """Map ``columns`` [F, R] to scores [C, R], of the same dtype."""
        values = linear_columns(columns, *self.layers[0])
        for layer in self.layers[1:]:
            values = linear_columns(ACTIVATIONS[self.activation](values), *layer)
        return values


def read_scores(mixture: Mixture) -> dict[str, Scores]:
    """Return the scores of a mixture's gates by name; given gates have none.

    Raises :class:`CheckpointError` as :class:`router.mixture.gate.MixtureGate` does.
    """
    files: dict[str, _Tensors] = {}
    scores = {}
    for name, gate in mixture.spec.gates.items():
        if isinstance(gate, LinearGate | MlpGate):
            if gate.file not in files:
                files[gate.file] = _read(mixture, gate.file)
            scores[name] = _scores_of(mixture, name, gate, files[gate.file])
    return scores


def _read(mixture: Mixture, file: str) -> _Tensors:
    try:
        return load(mixture.file(file))
    except SafetensorError as error:
        path = str(mixture.folder / file)
        raise CheckpointError(f"is not a safetensors file: {error}"[:200], path) from None


def _scores_of(
    mixture: Mixture, name: str, gate: LinearGate | MlpGate, tensors: _Tensors
) -> Scores:
    spec = mixture.spec
    given = spec.gate_input(gate)
    layers: list[_Layer] = []
    width: int | None = given.size if gate.pool == "flatten" else given.shape[-1]
    prefixes = [gate.prefix]
    activation = ""
    if isinstance(gate, MlpGate):
        activation = gate.activation
        prefixes = []
        while f"{gate.prefix}{len(prefixes)}.weight" in tensors or not prefixes:
            prefixes.append(f"{gate.prefix}{len(prefixes)}.")
    for place, prefix in enumerate(prefixes):
        is_last = place == len(prefixes) - 1
        layer = _Reader(mixture, name, gate.file, tensors, prefix)
        weight = layer.weight(width, len(gate.choices) if is_last else None)
        layers.append((np.ascontiguousarray(weight.T), layer.bias(len(weight))))
        width = len(weight)
    return Scores(given.name, gate.pool, tuple(layers), activation)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the two tensors of a layer of a gate."""

    mixture: Mixture
    gate: str
    file: str
    tensors: _Tensors
    prefix: str

    def weight(self, width: int | None, num_outputs: int | None) -> np.ndarray:
        """Return the weight [C, F], of as many outputs as are given."""
        tensor = self.tensors.get(f"{self.prefix}weight")
        if tensor is None:
            raise self._error("weight", "is missing")
        shape = tuple(tensor.shape)
        fits = len(shape) == 2 and shape[0] > 0 and shape[1] == width
        if not fits or num_outputs not in (None, shape[0]):
            outputs = "any number" if num_outputs is None else f"{num_outputs} choices"
            raise self._error(
                "weight", f"must have the shape [{outputs}, {width}] (given: {list(shape)})"
            )
        return self._values("weight", tensor)

    def bias(self, num_outputs: int) -> np.ndarray | None:
        """Return the bias [C], if there is one."""
        tensor = self.tensors.get(f"{self.prefix}bias")
        if tensor is None:
            return None
        if tuple(tensor.shape) != (num_outputs,):
            shape = list(tensor.shape)
            raise self._error("bias", f"must have the shape [{num_outputs}] (given: {shape})")
        return self._values("bias", tensor)

    def _values(self, name: str, tensor: torch.Tensor) -> np.ndarray:
        if not tensor.is_floating_point():
            raise self._error(name, f"must be of floating point (given: {tensor.dtype})")
        with np.errstate(over="ignore"):  # noticed below
            values: np.ndarray = tensor.double().numpy().astype(self.mixture.spec.dtype)
        if not np.isfinite(values).all():
            raise self._error(name, f"has a value that is NaN or infinite in {values.dtype}")
        return values

    def _error(self, tensor: str, message: str) -> CheckpointError:
        where = f"{self.mixture.folder / self.file}: {shown_name(self.prefix + tensor)}"
        return CheckpointError(f"{message}, for gates.{self.gate}", where)
