"""EM of mixtures whose experts are any scikit-learn estimators.

Jordan and Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm", for one level of
gates: the E step gives each expert a share of each row, the M step fits experts and gate to the
shares. Estimators without ``sample_weight`` are fitted to the rows of which they have the largest
share; where no expert takes weights, the shares themselves are 0 or 1 (classification EM, Celeux
and Govaert 1992).

An estimator's fit need not raise the objective. So each expert's new fit, and the gate's, is taken
only where its own part of the expected log likelihood does not fall, which makes generalised EM of
it (Dempster, Laird and Rubin 1977): the objective never falls.

Dimension letters: N rows, F features, E experts, W values of an output, D outputs of a regression,
K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import clone
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import FitFailedWarning
from sklearn.pipeline import Pipeline
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import has_fit_parameter

from experts.backends.errors import described
from router.workshop.mixture.gates import GateLearner, Scale, gate_part
from router.workshop.mixture.parts import (
    Array,
    EstimatorPart,
    FittedMixture,
    log_sum,
    normal_log_densities,
    posterior,
)

FLOOR_MASS = 1e-3
"""The probability that a likelihood spreads evenly over all classes, so that none is impossible."""
MIN_DEVIATION = 1e-3
"""The least deviation of an expert, relative to that of the targets."""
_LEAST_SHARE = 1e-10
"""Rows of a smaller share, relative to the largest weight, are left out of an expert's fit."""
GATE = "gate"
Targets = npt.NDArray[Any]


@dataclass(frozen=True)
class Expert:
    """An expert to fit: its estimator, and the keyword of ``fit`` that takes weights, if any."""

    name: str
    estimator: Any

    @property
    def weight_keyword(self) -> str | None:
        """The keyword of ``fit`` that takes weights, that of a pipeline's last step included."""
        if isinstance(self.estimator, Pipeline):
            step, last = self.estimator.steps[-1]
            return f"{step}__sample_weight" if has_fit_parameter(last, "sample_weight") else None
        return "sample_weight" if has_fit_parameter(self.estimator, "sample_weight") else None

    def __str__(self) -> str:
        """Return the name and the class, for errors."""
        return f"expert {self.name!r} ({type(self.estimator).__name__})"


@dataclass(frozen=True)
class Data:
    """The rows to fit: X [N, F], targets, weights [N]; ``classes`` [K] of a classification.

    ``targets`` are values [N, D], or the numbers [N] of classes.
    """

    X: Array
    targets: Targets
    weights: Array
    classes: npt.NDArray[Any] | None

    @property
    def width(self) -> int:
        """The values W of an expert's output."""
        return self.targets.shape[1] if self.classes is None else len(self.classes)

    @property
    def least_share(self) -> float:
        """The weight at and below which a row is left out of an expert's fit."""
        return _LEAST_SHARE * float(self.weights.max())

    def y(self, rows: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
        """Return the targets of some rows as an estimator takes them."""
        if self.classes is not None:
            return self.classes[self.targets[rows]]
        targets = self.targets[rows]
        return targets[:, 0] if targets.shape[1] == 1 else targets


class FitFailedError(ValueError):
    """An expert's fit, or its prediction, fails on the rows that the gate gives it."""


def fitted_part(expert: Expert, data: Data, shares: Array) -> tuple[EstimatorPart, Array]:
    """Fit an expert to its ``shares`` [N] of the rows; returns it and its outputs [N, W].

    Where all of its rows have one class, a constant classifier stands in for the expert. Raises
    :class:`FitFailedError`, which names the expert, for any error of the estimator.
    """
    rows = shares > data.least_share
    y = data.y(rows)
    estimator = clone(expert.estimator)
    keywords: dict[str, Any] = {}
    if data.classes is not None and len(np.unique(y)) == 1:
        estimator = DummyClassifier(strategy="most_frequent")
    elif (keyword := expert.weight_keyword) is not None:
        keywords[keyword] = shares[rows]
    try:
        estimator.fit(data.X[rows], y, **keywords)
        if data.classes is None:
            part = EstimatorPart(estimator)
        else:
            places = np.searchsorted(data.classes, estimator.classes_)
            part = EstimatorPart(estimator, "predict_proba", places, data.width)
        outputs = part(data.X)
    except Exception as error:  # an estimator may raise anything
        raise FitFailedError(
            f"{expert} cannot be fitted to {rows.sum()} of {len(rows)} rows: {described(error)}"
        ) from error
    if outputs.shape != (len(rows), data.width) or not np.isfinite(outputs).all():
        raise FitFailedError(
            f"{expert} predicts the shape {list(outputs.shape)}, or values that are not finite, "
            f"where {data.width} values of each row are needed"
        )
    return part, outputs


class EnsembleEM:
    """The state of EM: experts, their deviations, the gate, and the shares of the next M step."""

    def __init__(
        self, experts: Sequence[Expert], learner: GateLearner, data: Data, n_jobs: int | None
    ) -> None:
        """Take the data; :meth:`start` or :meth:`resume` comes next."""
        self._experts = experts
        self._learner = learner
        self._data = data
        self._n_jobs = n_jobs
        self._scale = Scale.of(data.X, data.weights)
        self._scaled = self._scale(data.X)
        self._is_hard = all(expert.weight_keyword is None for expert in experts)
        self._parts: list[EstimatorPart] = []
        count = len(experts)
        self._outputs = np.empty((len(data.X), count, data.width))
        self._log_gates = np.full((len(data.X), count), -np.log(count))
        if data.classes is None:
            deviation = np.sqrt(np.average(
                (data.targets - np.average(data.targets, axis=0, weights=data.weights)) ** 2,
                axis=0, weights=data.weights,
            ))  # fmt: skip
            self._least = MIN_DEVIATION * np.where(deviation > 0, deviation, 1.0)
            self._deviations = np.tile(np.maximum(deviation, self._least), (count, 1))

    def start(self, shares: Array) -> None:
        """Begin with the ``shares`` [N, E] of a first division of the rows.

        An expert without a share is fitted to all rows. Raises :class:`FitFailedError`.
        """
        weights = self._data.weights
        begun = shares * weights[:, None]
        begun[:, begun.max(axis=0) <= self._data.least_share] = weights[:, None]
        for number, result in enumerate(self._fits(begun, range(len(self._experts)))):
            if isinstance(result, FitFailedError):
                raise result
            part, self._outputs[:, number] = result
            self._parts.append(part)
            self._set_deviations(number, begun[:, number])
        self._set_gate(shares, is_first=True)

    def resume(self, mixture: FittedMixture) -> None:
        """Begin with the experts and the gate of an earlier fit."""
        gate = mixture.gates[GATE]
        self._layers, self._activation = gate.layers, gate.activation
        self._log_gates = self._gate().log_weights(self._data.X)
        self._parts = [part for part in mixture.experts.values() if isinstance(part, EstimatorPart)]
        self._outputs = mixture.outputs(self._data.X)
        if mixture.deviations is not None:
            self._deviations = np.maximum(mixture.deviations, self._least)

    def step(self) -> float:
        """Do an E step and an M step; returns the objective, a mean over the rows by weight.

        Warns :class:`FitFailedWarning` for an expert that cannot be fitted to its rows. It keeps
        its earlier fit.
        """
        shares = self._shares()
        given = shares * self._data.weights[:, None]
        fitted = self._given_rows(given)
        numbers = [number for number in range(len(self._experts)) if fitted[:, number].any()]
        for number, result in zip(numbers, self._fits(fitted, numbers), strict=True):
            if isinstance(result, FitFailedError):
                warnings.warn(f"{result}; it keeps its earlier fit", FitFailedWarning, stacklevel=3)
            else:
                self._take_if_better(number, given[:, number], *result)
            self._set_deviations(number, given[:, number])
        self._set_gate(shares)
        return self.objective()

    def objective(self) -> float:
        """Return the mean log likelihood; of hard EM that of each row's likeliest expert alone."""
        joint = self._log_gates + self._log_likelihoods(slice(None))
        rows = joint.max(axis=1) if self._is_hard else log_sum(joint)
        return float(np.average(rows, weights=self._data.weights))

    def mixture(self, top_k: int | None = None) -> FittedMixture:
        """Return the mixture as it is, with the gate's ``top_k``."""
        names = [expert.name for expert in self._experts]
        parts = dict(zip(names, self._parts, strict=True))
        data = self._data
        is_regression = data.classes is None
        return FittedMixture(
            GATE,
            {GATE: self._gate(top_k)},
            parts,
            "density" if is_regression else "probabilities",
            (data.X.shape[1],),
            data.width,
            self._deviations.copy() if is_regression else None,
            0.0 if is_regression else FLOOR_MASS / data.width,
        )

    def _shares(self) -> Array:
        shares = posterior(self._log_gates, self._log_likelihoods(slice(None)))
        return _one_hot(shares) if self._is_hard else shares

    def _given_rows(self, given: Array) -> Array:
        """Return the shares that the fits take: all of the largest for those without weights."""
        fitted = np.where(given > self._data.least_share, given, 0.0)
        largest = _one_hot(given) * self._data.weights[:, None]
        for number, expert in enumerate(self._experts):
            if expert.weight_keyword is None:
                fitted[:, number] = largest[:, number]
        return fitted

    def _fits(
        self, given: Array, numbers: Sequence[int]
    ) -> list[tuple[EstimatorPart, Array] | FitFailedError]:
        return list(
            Parallel(n_jobs=self._n_jobs)(
                delayed(_fitted_or_error)(self._experts[number], self._data, given[:, number])
                for number in numbers
            )
        )

    def _take_if_better(
        self, number: int, given: Array, part: EstimatorPart, outputs: Array
    ) -> None:
        old = self._parts[number], self._outputs[:, number].copy()
        before = self._expected(number, given)
        self._parts[number], self._outputs[:, number] = part, outputs
        of_old = self._deviations[number].copy() if self._data.classes is None else None
        self._set_deviations(number, given)
        if self._expected(number, given) < before:
            self._parts[number], self._outputs[:, number] = old
            if of_old is not None:
                self._deviations[number] = of_old

    def _expected(self, number: int, given: Array) -> float:
        """Return an expert's part of the expected log likelihood."""
        return float(given @ self._log_likelihoods(slice(number, number + 1))[:, 0])

    def _log_likelihoods(self, experts: slice) -> Array:
        outputs, targets = self._outputs[:, experts], self._data.targets
        if self._data.classes is None:
            return normal_log_densities(targets, outputs, self._deviations[experts])
        chosen = np.take_along_axis(outputs, targets[:, None, None], axis=2)[:, :, 0]
        return np.log((1 - FLOOR_MASS) * chosen + FLOOR_MASS / self._data.width)

    def _set_deviations(self, number: int, given: Array) -> None:
        """Set an expert's deviations to the likeliest ones."""
        total = given.sum()
        if self._data.classes is not None or total <= 0:
            return
        squares = (self._data.targets - self._outputs[:, number]) ** 2
        self._deviations[number] = np.maximum(np.sqrt(given @ squares / total), self._least)

    def _gate(self, top_k: int | None = None) -> Any:
        names = tuple(expert.name for expert in self._experts)
        return gate_part(self._layers, self._activation, names, top_k)

    def _set_gate(self, shares: Array, is_first: bool = False) -> None:
        weights = self._data.weights
        layers, activation = self._learner.fit(self._scaled, shares, weights)
        layers = self._scale.folded(layers)
        names = tuple(expert.name for expert in self._experts)
        log_gates = gate_part(layers, activation, names).log_weights(self._data.X)
        if is_first or _gain(shares, log_gates, self._log_gates, weights) >= 0:
            self._layers, self._activation, self._log_gates = layers, activation, log_gates


def _gain(shares: Array, new: Array, old: Array, weights: Array) -> float:
    return float(weights @ (shares * (new - old)).sum(axis=1))


def _one_hot(values: Array) -> Array:
    """Return 1 at the largest value of each row, the first of equal ones, and 0 elsewhere."""
    chosen = np.zeros_like(values)
    chosen[np.arange(len(values)), values.argmax(axis=1)] = 1.0
    return chosen


def _fitted_or_error(
    expert: Expert, data: Data, shares: Array
) -> tuple[EstimatorPart, Array] | FitFailedError:
    """Return an error as a value, so that one expert's does not end the others' fits."""
    try:
        return fitted_part(expert, data, shares)
    except FitFailedError as error:
        return error
