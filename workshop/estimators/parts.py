"""A fitted mixture: its gates, its experts, and the prediction that they make together.

A :class:`FittedMixture` is an estimator's own prediction and the content of the served folder
(:mod:`workshop.estimators.saved.folder`). Everything is float64. Gates and networks are computed by
the code that serves them, so that both give the same numbers.

Dimension letters: N rows, E experts, C choices of a gate, W values of an expert's output, F inputs
of a layer, T steps of a sequence, D outputs of a regression, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from experts.backends.products import mlp, softmax
from experts.backends.tensors import NamedTensors
from experts.backends.torch_experts import RnnModel
from experts.mixture.parts import Activation, RnnExpert
from router.mixture.scores import best_choices
from router.mixture.sums import sum_first
from workshop.estimators.em import log_softmax, log_sum_exp
from workshop.estimators.sequences import Sequences

Array = npt.NDArray[np.float64]
Rows = Array | Sequences
"""Rows [N, *row shape], or sequences of several lengths."""
Layers = tuple[tuple[Array, Array], ...]
"""The weight [out, F] and the bias [out] of each layer."""
Link = Literal["none", "softmax"]


@dataclass(frozen=True)
class GatePart:
    """One gate of the tree: a score for each of its ``choices``, the names of gates or experts.

    One layer is a linear gate, several are an MLP. A row goes to its ``top_k`` best choices, of
    equal scores to the first; ``None`` is all of them. Of rows [T, F] the gate sees the values
    that ``pool`` makes one vector.
    """

    layers: Layers
    choices: tuple[str, ...]
    top_k: int | None = None
    activation: Activation = "tanh"
    pool: Literal["flatten", "mean", "last"] = "flatten"

    def log_weights(self, X: Rows) -> Array:
        """Return the logarithms [N, C] of the weights of rows [N, *row shape].

        They are the log softmax over the chosen scores, and -inf where a choice is not chosen.
        """
        scores = mlp(_pooled(X, self.pool), self.layers, self.activation)
        if self.top_k is not None:
            scores = np.where(best_choices(scores, self.top_k), scores, -np.inf)
        return log_softmax(scores)


@dataclass(frozen=True)
class NetworkPart:
    """A linear expert of one layer, or an MLP of several. Rows are flattened."""

    layers: Layers
    activation: Activation = "tanh"
    link: Link = "none"

    def __call__(self, X: Rows) -> Array:
        """Return the outputs [N, W] of rows [N, *row shape]."""
        return _linked(mlp(_pooled(X, "flatten"), self.layers, self.activation), self.link)


@dataclass(frozen=True)
class RecurrentPart:
    """A recurrent network over rows [T, F] and a linear head at the last step.

    ``tensors`` have the names of :class:`experts.mixture.parts.RnnExpert`: those of a torch module
    with ``rnn`` and ``head``. A plain cell's function is tanh.
    """

    cell: Literal["plain", "gru", "lstm"]
    tensors: Mapping[str, Array]
    link: Link = "none"

    def __call__(self, X: Rows) -> Array:
        """Return the outputs [N, W] of rows [N, T, F], or of sequences of several lengths.

        Raises :class:`CheckpointError` for tensors of wrong names or shapes.
        """
        width = len(self.tensors["head.bias"])
        num_inputs = self.tensors["rnn.weight_ih_l0"].shape[1]
        part = RnnExpert(kind="rnn", cell=self.cell, link=self.link, file="tensors")
        tensors = NamedTensors(self.tensors, "tensors")
        model = RnnModel(tensors, num_inputs, width, part)
        tensors.finish()
        if isinstance(X, Sequences):
            return X.by_length(model)
        return model(np.ascontiguousarray(X, np.float64))


@dataclass(frozen=True)
class EstimatorPart:
    """A fitted scikit-learn estimator. Rows are flattened.

    The probabilities of a classifier's classes are spread over the ``num_classes`` of the mixture
    by ``class_places``; a class that the estimator never saw has probability 0.
    """

    estimator: Any
    method: Literal["predict", "predict_proba"] = "predict"
    class_places: npt.NDArray[np.intp] | None = None
    num_classes: int = 0

    def __call__(self, X: Rows) -> Array:
        """Return the outputs [N, W] of rows [N, *row shape]; raises the estimator's own errors."""
        outputs = getattr(self.estimator, self.method)(_pooled(X, "flatten").copy())
        outputs = np.asarray(outputs, np.float64).reshape(len(X), -1)
        if self.class_places is None:
            return outputs
        spread = np.zeros((len(X), self.num_classes))
        spread[:, self.class_places] = outputs
        return spread


ExpertPart = NetworkPart | RecurrentPart | EstimatorPart


@dataclass(frozen=True)
class FittedMixture:
    """A tree of gates from ``root``, and the experts at its leaves, numbered by their order.

    ``kind`` says what the experts' outputs [W] are:

    - ``mean``: the values of a regression, without a density;
    - ``density``: the means [D] of normal densities whose independent axes have the standard
      ``deviations`` [E, D];
    - ``probabilities``: those of K classes. In a likelihood each is ``(1 - K floor) p + floor``,
      so that a class that an expert never saw is unlikely instead of impossible.

    ``row_shape`` is the shape of a row, ``[F]`` or ``[T, F]``; a T of -1 takes any length.
    """

    root: str
    gates: Mapping[str, GatePart]
    experts: Mapping[str, ExpertPart]
    kind: Literal["mean", "density", "probabilities"]
    row_shape: tuple[int, ...]
    width: int
    deviations: Array | None = None
    floor: float = 0.0

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """The experts' numbers by their names."""
        return {name: number for number, name in enumerate(self.experts)}

    def log_gates(self, X: Rows) -> Array:
        """Return the logarithms [N, E] of the experts' weights; -inf where an expert is not chosen.

        A weight is the product of the gates' weights on the path. The weights of a row add up to 1.
        """
        X = _contiguous(X)
        found = np.full((len(X), len(self.experts)), -np.inf)

        def descend(name: str, rows: npt.NDArray[np.intp], log_path: Array) -> None:
            gate = self.gates[name]
            log_weights = gate.log_weights(X[rows]) + log_path[:, None]
            for place, choice in enumerate(gate.choices):
                if choice in self.numbers:
                    found[rows, self.numbers[choice]] = log_weights[:, place]
                    continue
                is_chosen = log_weights[:, place] > -np.inf
                if is_chosen.any():
                    descend(choice, rows[is_chosen], log_weights[is_chosen, place])

        descend(self.root, np.arange(len(X)), np.zeros(len(X)))
        return found

    def outputs(self, X: Rows, is_given: npt.NDArray[np.bool_] | None = None) -> Array:
        """Return the experts' outputs [N, E, W].

        An expert computes the rows that ``is_given`` [N, E], by default all; the rest is 0.
        """
        X = _contiguous(X)
        found = np.zeros((len(X), len(self.experts), self.width))
        for number, part in enumerate(self.experts.values()):
            rows = np.arange(len(X)) if is_given is None else np.flatnonzero(is_given[:, number])
            if len(rows):
                found[rows, number] = part(X[rows])
        return found

    def combine(self, X: Rows) -> Array:
        """Return the weighted sum [N, W] of the outputs of each row's experts."""
        weights = np.exp(self.log_gates(X))
        total: Array = np.einsum("ne,new->nw", weights, self.outputs(X, weights > 0))
        return total

    def log_likelihoods(self, X: Rows, targets: npt.NDArray[Any]) -> Array:
        """Return the log likelihood [N, E] of each row's target under each expert.

        ``targets`` are values [N, D] of a density, or numbers [N] of classes. Raises ``ValueError``
        for a mixture without a likelihood.
        """
        outputs = self.outputs(X)
        if self.kind == "probabilities":
            chosen = np.take_along_axis(outputs, targets[:, None, None], axis=2)[:, :, 0]
            with np.errstate(divide="ignore"):
                return np.log((1 - self.width * self.floor) * chosen + self.floor)
        if self.deviations is None:
            raise ValueError("a mixture of means has no likelihood: its experts have no deviations")
        return normal_log_densities(targets, outputs, self.deviations)

    def log_density(self, X: Rows, targets: npt.NDArray[Any]) -> Array:
        """Return the log likelihood [N] of each row's target; raises as :meth:`log_likelihoods`."""
        joint = self.log_gates(X) + self.log_likelihoods(X, targets)
        return log_sum_exp(joint)[:, 0]


def named_tensors(layers: Layers) -> dict[str, Array]:
    """Return the arrays of layers by the names that they have in a served file."""
    if len(layers) == 1:
        return {"weight": layers[0][0], "bias": layers[0][1]}
    return {
        f"{place}.{name}": tensor
        for place, layer in enumerate(layers)
        for name, tensor in zip(("weight", "bias"), layer, strict=True)
    }


def normal_log_densities(targets: Array, means: Array, deviations: Array) -> Array:
    """Return the log densities [N, E] of ``targets`` [N, D].

    Expert e is a normal distribution of independent axes, with ``means`` [N, E, D] and standard
    ``deviations`` [E, D].
    """
    scaled = (targets[:, None] - means) / deviations
    constant = np.log(deviations).sum(axis=1) + 0.5 * means.shape[2] * np.log(2 * np.pi)
    densities: Array = -0.5 * (scaled**2).sum(axis=2) - constant
    return densities


def posterior(log_gates: Array, log_likelihoods: Array) -> Array:
    """Return the probability [N, E] of each expert, given a row and its target.

    Where no expert can make a row's target, the gate's weights remain (log likelihoods of -inf).
    """
    joint = log_gates + log_likelihoods
    is_lost = joint.max(axis=1) == -np.inf
    joint[is_lost] = log_gates[is_lost]
    return np.exp(log_softmax(joint))


def _linked(outputs: Array, link: Link) -> Array:
    return softmax(outputs) if link == "softmax" else outputs


def _contiguous(X: Rows) -> Rows:
    return X if isinstance(X, Sequences) else np.ascontiguousarray(X, np.float64)


def _pooled(X: Rows, pool: str) -> Array:
    """Return the vectors of rows [N, *row shape], contiguous."""
    if isinstance(X, Sequences):
        return X.by_length(lambda rows: _pooled(rows, pool))
    if pool == "flatten":
        return np.ascontiguousarray(X.reshape(len(X), -1), np.float64)
    if pool == "last":
        return np.ascontiguousarray(X[:, -1], np.float64)
    steps = np.array(X.swapaxes(0, 1), np.float64, order="C")
    return sum_first(steps) / X.shape[1]
