"""Gates that learn the posteriors of EM, and become the layers of a served gate.

A gate is trained on rows whose features have mean 0 and deviation 1; the layers take raw rows.

Dimension letters: N rows, F features, E experts, W values of an output.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import nnls
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.utils.validation import has_fit_parameter

from experts.mixture.parts import Activation
from workshop.estimators.em import (
    ROUGH,
    SoftmaxProblem,
    ascend,
    design_of,
    penalty_of,
)
from workshop.estimators.parts import Array, Layers

HIDDEN_SIZES = (16,)
MLP_STEPS = 50
"""The hidden layers of the gate ``mlp``, and the steps of L-BFGS of one M step."""
MLP_ALPHA = 1e-3
MAX_STEPS = 100
"""The steps of Newton's method of the first M step of the gate ``linear``."""
BIAS_RIDGE = 1e-6
GATE_RIDGE = 0.1
"""The ridge of the gate ``linear`` on scaled features; without one it overfits noisy targets."""
_NUM_CHECKED = 64
"""The rows on which a classifier's decision is compared with that of its layer."""
_MIN_SHARE = 1e-6
"""The least share of a row that a gate's target gives an expert, so that none is forgotten."""
_FORGOTTEN = -30.0
"""The score of an expert that a classifier never saw among its labels."""
_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "tanh": "tanh", "logistic": "sigmoid"}


class LinearLearner:
    """Softmax regression on the posteriors, with a ridge.

    The first M step is exact. Each later one is a single Newton step, which raises the expected
    likelihood too and costs a fraction.
    """

    def __init__(self) -> None:
        """Begin at zeros."""
        self._coefficients: Array | None = None

    def fit(self, X: Array, shares: Array, weights: Array) -> tuple[Layers, Activation]:
        """Return one layer of scaled rows X [N, F] that scores the experts.

        ``shares`` [N, E] are the posteriors, ``weights`` [N] those of the rows.
        """
        targets = shares * weights[:, None]
        penalty = penalty_of(X.shape[1], GATE_RIDGE, BIAS_RIDGE)
        problem = SoftmaxProblem(design_of(X), targets, penalty)
        if self._coefficients is None:
            begun = np.zeros(problem.shape)
            self._coefficients, _ = ascend(problem, begun, MAX_STEPS)
        else:
            self._coefficients, _ = ascend(problem, self._coefficients, 1, tolerance=ROUGH)
        return ((self._coefficients[:-1].T.copy(), self._coefficients[-1].copy()),), "tanh"


class ClassifierLearner:
    """A scikit-learn classifier of experts, whose decision scores become the gate's.

    A classifier that takes ``sample_weight`` is fitted to a copy of each row for each expert, with
    the posterior as its weight. Another is fitted to the likeliest expert of each row.
    """

    def __init__(self, classifier: Any, is_partial: bool = False) -> None:
        """With ``is_partial`` each M step is a few steps on, and need not converge."""
        self._classifier = classifier
        self._is_partial = is_partial

    def fit(self, X: Array, shares: Array, weights: Array) -> tuple[Layers, Activation]:
        """Return the classifier's layers; raises ``ValueError`` as :func:`layers_of` does."""
        count = shares.shape[1]
        with warnings.catch_warnings():
            if self._is_partial:
                warnings.simplefilter("ignore", ConvergenceWarning)
            if has_fit_parameter(self._classifier, "sample_weight"):
                mixed = (1 - _MIN_SHARE) * shares + _MIN_SHARE / count
                self._classifier.fit(
                    np.tile(X, (count, 1)),
                    np.repeat(np.arange(count), len(X)),
                    sample_weight=(mixed * weights[:, None]).T.ravel(),
                )
            else:
                labels = shares.argmax(axis=1)
                if np.ptp(labels) == 0:  # no classifier is needed, and most would refuse
                    return ConstantLearner(np.eye(count)[labels[0]]).fit(X, shares, weights)
                self._classifier.fit(X, labels)
        layers, activation = layers_of(self._classifier, count)
        _check_decision(self._classifier, layers, X[:_NUM_CHECKED])
        return layers, activation


def _check_decision(classifier: Any, layers: Layers, X: Array) -> None:
    """Raise ``ValueError`` for a linear classifier whose layer does not make its decision.

    An ``SVC`` has a coefficient for each pair of classes, and a decision by votes.
    """
    if len(layers) > 1 or not hasattr(classifier, "decision_function"):
        return
    weight, bias = layers[0]
    labels = classifier.classes_
    scores = X @ weight[labels].T + bias[labels]
    if len(labels) == 2:
        scores = scores[:, 1] - scores[:, 0]
    decision = classifier.decision_function(X)
    if decision.shape != scores.shape or not np.allclose(decision, scores, rtol=1e-6, atol=1e-6):
        raise ValueError(
            f"gate: {type(classifier).__name__} does not decide by its coefficients, so it cannot "
            "be served as a gate"
        )


def learner_of(gate: Any, num_experts: int, draw: Callable[[Any], Any]) -> GateLearner:
    """Return the learner of a parameter ``gate``.

    ``draw`` sets an estimator's random states. Raises ``ValueError`` for another value.
    """
    if num_experts == 1:
        return ConstantLearner(np.ones(1))
    if isinstance(gate, str) and gate == "linear":
        return LinearLearner()
    if isinstance(gate, str) and gate == "mlp":
        network = MLPClassifier(
            HIDDEN_SIZES, activation="tanh", solver="lbfgs", alpha=MLP_ALPHA, max_iter=MLP_STEPS,
            warm_start=True,
        )  # fmt: skip
        return ClassifierLearner(draw(network), is_partial=True)
    if isinstance(gate, BaseEstimator) and is_classifier(gate):
        return ClassifierLearner(draw(clone(gate)))
    raise ValueError(
        f'gate must be "linear", "mlp" or a scikit-learn classifier (given: {gate!r:.80})'
    )


class ConstantLearner:
    """A gate that learns nothing: all rows have the same weights of experts."""

    def __init__(self, weights_of_experts: Array) -> None:
        """Take the weights [E], of sum 1."""
        self._scores = np.log(np.maximum(weights_of_experts, np.exp(_FORGOTTEN)))

    def fit(self, X: Array, shares: Array, weights: Array) -> tuple[Layers, Activation]:
        """Return one layer, whose weight is 0."""
        return ((np.zeros((len(self._scores), X.shape[1])), self._scores),), "tanh"


GateLearner = LinearLearner | ClassifierLearner | ConstantLearner
"""The M step of a gate; keeps what it learnt for the next one."""


def least_squares_weights(errors: Array, weights: Array) -> Array:
    """Return weights [E] of experts, not negative and of sum 1, whose mean has the least squares.

    ``errors`` [N, E, W] are those of the experts' outputs, ``weights`` [N] those of the rows.
    Breiman 1996, "Stacked regressions".
    """
    squares = np.einsum("n,new,nfw->ef", weights, errors, errors)
    scale = np.trace(squares)
    count = len(squares)
    if scale <= 0:
        return np.full(count, 1 / count)
    values, vectors = np.linalg.eigh(squares / scale)
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    # The best sum of these least squares is below 1, and their direction is that of sum 1.
    solution, _ = nnls(np.vstack([root, np.ones(count)]), np.append(np.zeros(count), 1.0))
    found: Array = solution / solution.sum()
    return found


def layers_of(classifier: Any, num_experts: int) -> tuple[Layers, Activation]:
    """Return a fitted classifier of the numbers of experts as layers that score each expert.

    Raises ``ValueError`` for a classifier whose decision is no linear function and no MLP.
    """
    activation: Activation = "tanh"
    if hasattr(classifier, "coefs_") and hasattr(classifier, "intercepts_"):
        layers = [
            (weight.T, bias)
            for weight, bias in zip(classifier.coefs_, classifier.intercepts_, strict=True)
        ]
        if classifier.activation == "identity":
            layers = [_product(layers)]
        else:
            activation = _ACTIVATIONS[classifier.activation]
    elif hasattr(classifier, "coef_") and hasattr(classifier, "intercept_"):
        layers = [(np.atleast_2d(classifier.coef_), np.atleast_1d(classifier.intercept_))]
    else:
        raise ValueError(
            f"gate: the decision of {type(classifier).__name__} is neither linear nor an MLP, so "
            "it cannot be served as a gate"
        )
    weight, bias = layers[-1]
    bias = np.broadcast_to(bias, len(weight))
    labels = classifier.classes_
    if len(labels) == 2 and len(weight) == 1:
        # The one score is that of the second class against the first.
        weight, bias = np.vstack([0 * weight, weight]), np.append(0.0, bias)
    if len(weight) != len(labels):
        raise ValueError(
            f"gate: {type(classifier).__name__} has {len(weight)} scores for {len(labels)} classes"
        )
    full_weight = np.zeros((num_experts, weight.shape[1]))
    full_bias = np.full(num_experts, _FORGOTTEN)
    full_weight[labels], full_bias[labels] = weight, bias
    return (*((np.array(w), np.array(b)) for w, b in layers[:-1]), (full_weight, full_bias)), (
        activation
    )


def _product(layers: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Return linear layers without a function between them as one."""
    weight, bias = layers[0]
    for next_weight, next_bias in layers[1:]:
        weight, bias = next_weight @ weight, next_weight @ bias + next_bias
    return weight, bias
