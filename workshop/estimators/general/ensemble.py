"""EM of mixtures whose experts are any scikit-learn estimators.

Jordan and Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm", for one level of
gates: the E step gives each expert a share of each row, the M step fits experts and gate to the
shares. Estimators without ``sample_weight`` are fitted to the rows of which they have the largest
share; where no expert takes weights, the shares themselves are 0 or 1 (classification EM, Celeux
and Govaert 1992).

An estimator's fit need not raise the objective. So each expert's new fit, and the gate's, is taken
only where its own part of the expected log likelihood does not fall, which makes generalised EM of
it (Dempster, Laird and Rubin 1977): the objective never falls.

With folds, the outputs for a row are out of fold: predictions of clones that are fitted to the
other folds (Wolpert 1992, "Stacked generalization"). Posteriors, deviations, the gate's targets and
the objective follow from them, so an expert that memorises its rows gains nothing. The argument
above holds for any outputs, so this out-of-fold objective never falls either. The shares of a row
still follow from its target, so it is no score of unseen rows. The mixture itself has experts that
are fitted to their shares of all rows.

Dimension letters: N rows, F features, E experts, W values of an output, D outputs of a regression,
K classes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from sklearn.exceptions import FitFailedWarning

from workshop.estimators.em import log_sum_exp
from workshop.estimators.general.fits import Data, Expert, Fit, FitFailedError, Fold, Rows, fits
from workshop.estimators.general.gates import (
    ConstantLearner,
    GateLearner,
    least_squares_weights,
)
from workshop.estimators.parts import (
    Array,
    EstimatorPart,
    FittedMixture,
    GatePart,
    normal_log_densities,
    posterior,
)
from workshop.estimators.scale import Scale

FLOOR_MASS = 1e-3
"""The probability that a likelihood spreads evenly over all classes, so that none is impossible."""
MIN_DEVIATION = 1e-3
"""The least deviation of an expert, relative to that of the targets."""
_MIN_MOVE = 0.01
"""The part of its shares that must move before an expert is fitted again out of fold."""
GATE = "gate"


class EnsembleEM:
    """The state of EM: experts, their deviations, the gate, and the shares of the next M step."""

    def __init__(
        self,
        experts: Sequence[Expert],
        learner: GateLearner,
        data: Data,
        n_jobs: int | None,
        folds: Sequence[Fold] = (),
    ) -> None:
        """Take the data; :meth:`start` or :meth:`resume` comes next.

        Without ``folds`` the fits are judged by the rows that they were fitted to.
        """
        self._experts = experts
        self._data = data
        self._n_jobs = n_jobs
        self._folds = folds
        self._scale = Scale.of(data.X, data.weights)
        self._scaled = self._scale(data.X)
        self._is_hard = all(expert.weight_keyword is None for expert in experts)
        count = len(experts)
        self._given: list[Array] = [data.weights] * count
        """What the experts are fitted to."""
        self._tried: list[Array | None] = [None] * count
        """What the latest fits were to, those included that were not taken."""
        self._parts: list[EstimatorPart | None] = [None] * count
        """The experts; with folds, those that :meth:`mixture` needed already."""
        self._outputs = np.empty((len(data.X), count, data.width))
        if data.classes is None:
            deviation = np.sqrt(np.average(
                (data.targets - np.average(data.targets, axis=0, weights=data.weights)) ** 2,
                axis=0, weights=data.weights,
            ))  # fmt: skip
            self._least = MIN_DEVIATION * np.where(deviation > 0, deviation, 1.0)
            self._deviations = np.tile(np.maximum(deviation, self._least), (count, 1))
        self._learner = learner
        self._log_gates = np.full((len(data.X), count), -np.log(count))

    @property
    def names(self) -> list[str]:
        """The names of the experts."""
        return [expert.name for expert in self._experts]

    def copied(self) -> EnsembleEM:
        """Return a state that goes on by itself."""
        other = copy.copy(self)
        other._given, other._parts = list(self._given), list(self._parts)
        other._tried = list(self._tried)
        other._outputs, other._log_gates = self._outputs.copy(), self._log_gates.copy()
        other._learner = copy.deepcopy(self._learner)
        if self._data.classes is None:
            other._deviations = self._deviations.copy()
        return other

    def start(self, shares: Array | None) -> None:
        """Begin with the ``shares`` [N, E] of a first division of the rows.

        An expert without a share is fitted to all rows; so are all of them without ``shares``, and
        the gate then to the posteriors. Raises :class:`FitFailedError`.
        """
        weights = self._data.weights[:, None]
        given = np.tile(weights, len(self._experts)) if shares is None else shares * weights
        given[:, given.max(axis=0) <= self._data.least_share] = weights
        numbers = range(len(self._experts))
        for number, result in zip(numbers, self._fits(given, numbers), strict=True):
            if isinstance(result, FitFailedError):
                raise result
            self._parts[number], self._outputs[:, number] = result
            self._given[number] = self._tried[number] = given[:, number]
            self._set_deviations(number, given[:, number])
        self._set_gate(self._posterior() if shares is None else shares, is_first=True)

    def on(self, data: Data, folds: Sequence[Fold]) -> EnsembleEM:
        """Return a state of other data, not started."""
        learner = copy.deepcopy(self._learner)
        return EnsembleEM(self._experts, learner, data, self._n_jobs, folds)

    def started(self, shares: Array | None) -> EnsembleEM:
        """Return a state that begins with ``shares``; raises as :meth:`start` does."""
        other = self.copied()
        other.start(shares)
        return other

    def with_mean(self) -> EnsembleEM:
        """Return a state whose gate gives all rows the weights of least squares."""
        weights, targets = self._data.weights, self._data.targets
        if self._data.classes is not None:
            targets = np.eye(self._data.width)[targets]
        errors = self._outputs - targets[:, None]
        return self._with_weights(least_squares_weights(errors, weights))

    def with_gate(self) -> EnsembleEM:
        """Return a state whose gate begins with equal weights."""
        other = self.copied()
        other._log_gates = np.full_like(self._log_gates, -np.log(len(self._experts)))
        other._set_gate(other._posterior(), is_first=True)
        return other

    def with_expert(self, number: int) -> EnsembleEM:
        """Return a state whose gate gives all rows to one expert."""
        return self._with_weights(np.eye(len(self._experts))[number])

    def _with_weights(self, weights: Array) -> EnsembleEM:
        other = self.copied()
        other._learner = ConstantLearner(weights)
        other._set_gate(np.exp(self._log_gates), is_first=True)
        return other

    def resume(self, mixture: FittedMixture) -> None:
        """Begin with the experts and the gate of an earlier fit."""
        self._gate = replace(mixture.gates[GATE], top_k=None)
        self._log_gates = self._gate.log_weights(self._data.X)
        self._given = [np.zeros_like(self._data.weights)] * len(self._experts)
        self._parts = [part for part in mixture.experts.values() if isinstance(part, EstimatorPart)]
        if len(self._parts) != len(self._experts):
            raise ValueError(
                f"the earlier fit has {len(self._parts)} estimators as experts, "
                f"this one {len(self._experts)}"
            )
        self._outputs = mixture.outputs(self._data.X)
        if mixture.deviations is not None:
            self._deviations = np.maximum(mixture.deviations, self._least)

    def step(self) -> float:
        """Do an E step and an M step; returns the objective, a mean over the rows by weight.

        An expert whose shares are those of its latest fit is not fitted again. Warns
        :class:`FitFailedWarning` for an expert that cannot be fitted to its rows. It keeps its
        earlier fit.
        """
        shares = self._posterior()
        shares = _one_hot(shares) if self._is_hard else shares
        given = shares * self._data.weights[:, None]
        fitted = self._given_rows(given)
        numbers = [
            number
            for number in range(len(self._experts))
            if fitted[:, number].any() and self._has_moved(number, fitted[:, number])
        ]
        for number, result in zip(numbers, self._fits(fitted, numbers), strict=True):
            self._tried[number] = fitted[:, number]
            if isinstance(result, FitFailedError):
                warnings.warn(f"{result}; it keeps its earlier fit", FitFailedWarning, stacklevel=3)
            else:
                self._take_if_better(number, given[:, number], fitted[:, number], result)
        for number in range(len(self._experts)):
            self._set_deviations(number, given[:, number])
        self._set_gate(shares)
        return self.objective()

    def _has_moved(self, number: int, fitted: Array) -> bool:
        """Return whether an expert's shares differ from those of its latest fit.

        Out of fold a small difference is none: each fit costs as many as there are folds.
        """
        tried = self._tried[number]
        if tried is None:
            return True
        least = _MIN_MOVE * tried.sum() if self._folds else 0.0
        return float(np.abs(fitted - tried).sum()) > least

    def step_of_gate(self) -> float:
        """Do a step of EM that leaves the experts as they are; returns the mean log likelihood."""
        shares = self._posterior()
        for number in range(len(self._experts)):
            self._set_deviations(number, shares[:, number] * self._data.weights)
        self._set_gate(shares)
        joint = self._log_gates + self._log_likelihoods(slice(None))
        return float(np.average(log_sum_exp(joint)[:, 0], weights=self._data.weights))

    def objective(self) -> float:
        """Return the mean log likelihood; of hard EM that of each row's likeliest expert alone."""
        joint = self._log_gates + self._log_likelihoods(slice(None))
        rows = joint.max(axis=1) if self._is_hard else log_sum_exp(joint)[:, 0]
        return float(np.average(rows, weights=self._data.weights))

    def of(self, rows: Rows) -> EnsembleEM:
        """Return a state of some rows, whose experts stay: for steps of the gate alone."""
        other = self.copied()
        other._data, other._scaled = self._data.of(rows), self._scaled[rows]
        other._outputs, other._log_gates = self._outputs[rows], self._log_gates[rows]
        return other

    def combined(self, rows: Rows, gate: GatePart) -> Array:
        """Return the experts' outputs for some rows, weighted by a gate: [N, W]."""
        weights = np.exp(gate.log_weights(self._data.X[rows]))
        total: Array = np.einsum("ne,new->nw", weights, self._outputs[rows])
        return total

    def mixture(self, top_k: int | None = None) -> FittedMixture:
        """Return the mixture as it is, with the gate's ``top_k``.

        With folds, experts are fitted to all rows first; raises :class:`FitFailedError`.
        """
        missing = [number for number, part in enumerate(self._parts) if part is None]
        given = np.column_stack(self._given)
        whole = fits(
            [self._experts[number] for number in missing],
            self._data, [given[:, number] for number in missing], (), self._n_jobs,
        )  # fmt: skip
        for number, result in zip(missing, whole, strict=True):
            if isinstance(result, FitFailedError):
                raise result
            self._parts[number] = result[0]
        parts = {
            expert.name: part
            for expert, part in zip(self._experts, self._parts, strict=True)
            if part is not None
        }
        data = self._data
        is_regression = data.classes is None
        return FittedMixture(
            GATE,
            {GATE: self.gate(top_k)},
            parts,
            "density" if is_regression else "probabilities",
            (data.X.shape[1],),
            data.width,
            self._deviations.copy() if is_regression else None,
            0.0 if is_regression else FLOOR_MASS / data.width,
        )

    def warn_of_refusals(self) -> None:
        """Warn :class:`FitFailedWarning` of experts that were fitted without their rarest classes.

        It is about those that :meth:`mixture` returned last.
        """
        classes = self._data.classes
        for expert, part, given in zip(self._experts, self._parts, self._given, strict=True):
            if classes is None or part is None or part.class_places is None:
                continue
            own = np.unique(self._data.targets[given > self._data.least_share])
            refused = classes[np.setdiff1d(own, part.class_places)]
            if len(refused):
                warnings.warn(
                    f"{expert} cannot be fitted to so few rows of {refused.tolist()!r:.80}, and is "
                    "fitted without them: their probability is 0 in its predictions",
                    FitFailedWarning,
                    stacklevel=4,
                )

    def _posterior(self) -> Array:
        return posterior(self._log_gates, self._log_likelihoods(slice(None)))

    def _given_rows(self, given: Array) -> Array:
        """Return the shares that the fits take: all of the largest for those without weights."""
        fitted = np.where(given > self._data.least_share, given, 0.0)
        largest = _one_hot(given) * self._data.weights[:, None]
        for number, expert in enumerate(self._experts):
            if expert.weight_keyword is None:
                fitted[:, number] = largest[:, number]
        return fitted

    def _fits(self, given: Array, numbers: Sequence[int]) -> list[Fit | FitFailedError]:
        experts = [self._experts[number] for number in numbers]
        shares = [given[:, number] for number in numbers]
        return fits(experts, self._data, shares, self._folds, self._n_jobs)

    def _take_if_better(self, number: int, given: Array, fitted: Array, fit: Fit) -> None:
        old = self._outputs[:, number].copy()
        of_old = self._deviations[number].copy() if self._data.classes is None else None
        before = self._expected(number, given)
        part, self._outputs[:, number] = fit
        self._set_deviations(number, given)
        if self._expected(number, given) >= before:
            self._parts[number], self._given[number] = part, fitted
            return
        self._outputs[:, number] = old
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

    def gate(self, top_k: int | None = None) -> GatePart:
        """Return the gate as it is."""
        return replace(self._gate, top_k=top_k)

    def _set_gate(self, shares: Array, is_first: bool = False) -> None:
        weights = self._data.weights
        layers, activation = self._learner.fit(self._scaled, shares, weights)
        layers = (self._scale.before(layers[0]), *layers[1:])
        gate = GatePart(layers, tuple(self.names), activation=activation)
        log_gates = gate.log_weights(self._data.X)
        gain = weights @ (shares * (log_gates - self._log_gates)).sum(axis=1)
        if is_first or gain >= 0:
            self._gate, self._log_gates = gate, log_gates


def _one_hot(values: Array) -> Array:
    """Return 1 at the largest value of each row, the first of equal ones, and 0 elsewhere."""
    chosen = np.zeros_like(values)
    chosen[np.arange(len(values)), values.argmax(axis=1)] = 1.0
    return chosen
