"""Experts of a named torch architecture: linear, MLP, recurrent network.

The weights have torch's names and shapes; the arithmetic is :mod:`experts.backends.products`, so
that a row's result has the same bits alone and among other rows.

Dimension letters: P rows, T steps of a sequence, F inputs, H hidden values, G gates of a cell,
W outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from cluster.errors import CheckpointError
from experts.backends.products import ACTIVATIONS, linear, mlp, softmax
from experts.backends.tensors import Layer, NamedTensors, PartTensors, bytes_of
from experts.checkpoint.mixture import Mixture
from experts.mixture.parts import LinearExpert, MlpExpert, RnnExpert, TorchExpert

MAX_RNN_LAYERS = 1000
_sigmoid, _tanh = ACTIVATIONS["sigmoid"], ACTIVATIONS["tanh"]


class Model(Protocol):
    """The model of an expert, as :class:`experts.backends.load.MixtureExpert` calls it."""

    num_bytes: int
    """The resident bytes of the weights, or an estimate."""

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Map rows [P, *row shape] to outputs [P, *output shape]; P is at least 1.

        May raise anything, and return any dtype.
        """
        ...


def torch_model(mixture: Mixture, key: str, part: TorchExpert) -> Model:
    """Load an expert of a torch architecture.

    Raises :class:`CheckpointError`, which names file and key, for a file that is no safetensors
    file, and for a tensor that is missing, too many, of a wrong shape or dtype, or not finite.
    """
    tensors = PartTensors(mixture, key, part)
    row_shape, width = mixture.spec.rows_input.shape, mixture.spec.combine.shape[-1]
    model: Model
    if isinstance(part, LinearExpert):
        model = _LinearModel(tensors.linear(math.prod(row_shape), width), part)
    elif isinstance(part, MlpExpert):
        model = _MlpModel(tensors.layers(math.prod(row_shape), width), part)
    elif isinstance(part, RnnExpert):
        model = RnnModel(tensors, row_shape[-1], width, part)
    else:
        raise TypeError(f"not a torch architecture: {type(part).__name__}")
    tensors.finish()
    return model


def _linked(outputs: np.ndarray, part: TorchExpert) -> np.ndarray:
    if part.link == "softmax":
        return softmax(outputs)
    return _sigmoid(outputs) if part.link == "sigmoid" else outputs


class _LinearModel:
    """``link(weight x + bias)``."""

    def __init__(self, layer: Layer, part: LinearExpert) -> None:
        self._layer, self._part = layer, part
        self.num_bytes = bytes_of([layer])

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return _linked(linear(rows.reshape(len(rows), -1), self._layer), self._part)


class _MlpModel:
    """Layers with an activation between them, and the link."""

    def __init__(self, layers: list[Layer], part: MlpExpert) -> None:
        self._layers, self._part = layers, part
        self.num_bytes = bytes_of(layers)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        rows = rows.reshape(len(rows), -1)
        return _linked(mlp(rows, self._layers, self._part.activation), self._part)


_State = tuple[np.ndarray, ...]
"""The hidden values [P, H] of a cell; for an LSTM also its cell values [P, H]."""
_Step = Callable[[np.ndarray, _State, Layer], _State]
"""Takes a step's inputs [P, G H], the state, and the recurrent layer [G H, H]."""


def _plain_step(act: Callable[[np.ndarray], np.ndarray]) -> _Step:
    def step(inputs: np.ndarray, state: _State, recurrent: Layer) -> _State:
        return (act(inputs + linear(state[0], recurrent)),)

    return step


def _gates_of(values: np.ndarray, num_gates: int) -> np.ndarray:
    """Return values [P, G H] as [G, P, H].

    Contiguous, as numpy may compute a function of values with gaps in another way, with other bits.
    """
    return np.ascontiguousarray(values.reshape(len(values), num_gates, -1).swapaxes(0, 1))


def _gru_step(inputs: np.ndarray, state: _State, recurrent: Layer) -> _State:
    """The gates r, z, n of torch.nn.GRU (Cho et al. 2014, with the reset after the product)."""
    (hidden,) = state
    entered, recurred = _gates_of(inputs, 3), _gates_of(linear(hidden, recurrent), 3)
    reset, update = _sigmoid(entered[:2] + recurred[:2])
    new = _tanh(entered[2] + reset * recurred[2])
    return ((1 - update) * new + update * hidden,)


def _lstm_step(inputs: np.ndarray, state: _State, recurrent: Layer) -> _State:
    """The gates i, f, g, o of torch.nn.LSTM (Hochreiter and Schmidhuber 1997, Gers et al. 2000)."""
    hidden, cell = state
    gates = _gates_of(inputs + linear(hidden, recurrent), 4)
    entry, forget = _sigmoid(gates[:2])
    cell = forget * cell + entry * _tanh(gates[2])
    return _sigmoid(gates[3]) * _tanh(cell), cell


_NUM_GATES: Mapping[str, int] = {"plain": 1, "gru": 3, "lstm": 4}
_NUM_STATES: Mapping[str, int] = {"plain": 1, "gru": 1, "lstm": 2}


class RnnModel:
    """Recurrent layers over rows [T, F] from a state of zeros, a linear head, and the link."""

    def __init__(self, tensors: NamedTensors, num_inputs: int, width: int, part: RnnExpert) -> None:
        """Take the tensors; raises :class:`CheckpointError` as :func:`torch_model` does."""
        self._part = part
        self._layers = _recurrent_layers(tensors, num_inputs, _NUM_GATES[part.cell])
        self._head = tensors.linear(self._layers[-1][1][0].shape[1], width, "head.")
        self.num_bytes = bytes_of([*(layer for pair in self._layers for layer in pair), self._head])
        steps: dict[str, _Step] = {
            "plain": _plain_step(ACTIVATIONS[part.nonlinearity]),
            "gru": _gru_step,
            "lstm": _lstm_step,
        }
        self._step = steps[part.cell]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        hidden = np.ascontiguousarray(rows.swapaxes(0, 1))  # [T, P, F]
        for entry, recurrent in self._layers:
            hidden = self._run(hidden, entry, recurrent)  # [T, P, H]
        if self._part.returns == "last":
            return _linked(linear(hidden[-1], self._head), self._part)
        num_steps, num_rows, size = hidden.shape
        outputs = linear(hidden.reshape(-1, size), self._head)
        return _linked(outputs, self._part).reshape(num_steps, num_rows, -1).swapaxes(0, 1)

    def _run(self, inputs: np.ndarray, entry: Layer, recurrent: Layer) -> np.ndarray:
        num_steps, num_rows, num_inputs = inputs.shape
        size = recurrent[0].shape[1]
        entered = linear(inputs.reshape(-1, num_inputs), entry).reshape(num_steps, num_rows, -1)
        zeros = np.zeros((num_rows, size), inputs.dtype)
        state: _State = (zeros,) * _NUM_STATES[self._part.cell]
        outputs = np.empty((num_steps, num_rows, size), inputs.dtype)
        for step in range(num_steps):
            state = self._step(entered[step], state, recurrent)
            outputs[step] = state[0]
        return outputs


def _recurrent_layers(
    tensors: NamedTensors, num_inputs: int, num_gates: int
) -> list[tuple[Layer, Layer]]:
    """Return the input layer [G H, F] and the recurrent layer [G H, H] of each layer."""
    found: list[tuple[Layer, Layer]] = []
    for number in range(MAX_RNN_LAYERS):
        recurrent_name = f"rnn.weight_hh_l{number}"
        if found and recurrent_name not in tensors:
            break
        recurrent = tensors.take(recurrent_name, -1, -1)
        size = recurrent.shape[1]
        if recurrent.shape[0] != num_gates * size:
            raise CheckpointError(
                f"tensor {recurrent_name} must have {num_gates} times as many rows as columns "
                f"(given: {list(recurrent.shape)})",
                tensors.where,
            )
        entry = tensors.take(f"rnn.weight_ih_l{number}", num_gates * size, num_inputs)
        entry_bias = tensors.take_if_there(f"rnn.bias_ih_l{number}", num_gates * size)
        recurrent_bias = tensors.take_if_there(f"rnn.bias_hh_l{number}", num_gates * size)
        if (entry_bias is None) != (recurrent_bias is None):
            raise CheckpointError(
                f"has only one of rnn.bias_ih_l{number} and rnn.bias_hh_l{number}",
                tensors.where,
            )
        found.append(((entry, entry_bias), (recurrent, recurrent_bias)))
        num_inputs = size
    return found
