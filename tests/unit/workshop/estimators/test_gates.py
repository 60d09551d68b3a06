"""Gates that learn posteriors: the layers of classifiers, soft targets, raw rows.

Dimension letters: N rows, E experts.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from sklearn.utils.validation import has_fit_parameter

from workshop.estimators.general.gates import (
    ClassifierLearner,
    LinearLearner,
    layers_of,
    learner_of,
)
from workshop.estimators.parts import GatePart
from workshop.estimators.scale import Scale

SOURCE = np.random.default_rng(0)
ROWS = SOURCE.normal(size=(120, 3))
PLACES = np.argmax(ROWS + 0.5 * SOURCE.normal(size=ROWS.shape), axis=1)
ONES = np.ones(len(ROWS))


def weights_of(fitted: tuple, rows: np.ndarray = ROWS) -> np.ndarray:
    layers, activation = fitted
    names = tuple(map(str, range(len(layers[-1][1]))))
    return np.exp(GatePart(layers, names, activation=activation).log_weights(rows))


def same(estimator: Any) -> Any:
    return estimator


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("num_experts", [2, 3])
@pytest.mark.parametrize(
    "classifier",
    [
        LogisticRegression(C=3.0),
        LinearDiscriminantAnalysis(),
        *(
            MLPClassifier((5, 4), activation=activation, max_iter=15, random_state=0)
            for activation in ("relu", "tanh", "logistic", "identity")
        ),
    ],
)
def test_the_gate_weighs_as_the_classifier_does(classifier: Any, num_experts: int) -> None:
    classifier.fit(ROWS, np.minimum(PLACES, num_experts - 1))
    np.testing.assert_allclose(
        weights_of(layers_of(classifier, num_experts)),
        classifier.predict_proba(ROWS),
        rtol=1e-9,
        atol=1e-12,
    )


def test_an_expert_that_a_classifier_never_saw_has_hardly_any_weight() -> None:
    classifier = LogisticRegression().fit(ROWS, np.where(PLACES == 0, 3, 1))
    weights = weights_of(layers_of(classifier, 4))
    np.testing.assert_allclose(weights[:, [1, 3]], classifier.predict_proba(ROWS), rtol=1e-6)
    assert weights[:, [0, 2]].max() < 1e-6


@pytest.mark.parametrize("gate", ["linear", LogisticRegression(C=1e3, tol=1e-10, max_iter=10_000)])
def test_soft_targets_are_learnt_as_their_cross_entropy_says(gate: Any) -> None:
    shares = np.random.default_rng(1).dirichlet([1, 2, 3], size=len(ROWS))
    weights = np.arange(1.0, 1 + len(ROWS))
    got = weights_of(learner_of(gate, 3, same).fit(ROWS, shares, weights))

    def loss(flat: np.ndarray) -> float:
        scores = ROWS @ flat[:9].reshape(3, 3).T + flat[9:]
        logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return -float(weights @ (shares * logs).sum(axis=1)) / weights.sum()

    flat = minimize(loss, np.zeros(12), tol=1e-12).x
    expected = np.exp(ROWS @ flat[:9].reshape(3, 3).T + flat[9:])
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_a_classifier_without_weights_learns_the_likeliest_expert() -> None:
    shares = np.random.default_rng(2).dirichlet([1, 1, 1], size=len(ROWS))
    learner = ClassifierLearner(LinearDiscriminantAnalysis())
    expected = LinearDiscriminantAnalysis().fit(ROWS, shares.argmax(axis=1))
    got = weights_of(learner.fit(ROWS, shares, ONES))
    np.testing.assert_allclose(got, expected.predict_proba(ROWS), rtol=1e-9)
    alone = weights_of(learner.fit(ROWS, np.tile([0.2, 0.7, 0.1], (len(ROWS), 1)), ONES))
    np.testing.assert_allclose(alone, np.tile([0, 1, 0], (len(ROWS), 1)), atol=1e-12)


def test_a_network_goes_on_where_it_was_and_says_nothing_of_it() -> None:
    shares = np.eye(3)[PLACES]
    learner = learner_of("mlp", 3, lambda network: network.set_params(random_state=0))
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        for _ in range(3):
            weights = weights_of(learner.fit(ROWS, shares, ONES))
            losses.append(-np.log(weights[np.arange(len(ROWS)), PLACES]).mean())
    if has_fit_parameter(MLPClassifier(), "sample_weight"):
        assert losses[0] > losses[1] > losses[2]
    else:  # scikit-learn before 1.7: each M step begins anew, since a label may be missing
        assert losses[0] == losses[1] == losses[2]


def test_layers_take_raw_rows() -> None:
    rows = ROWS * [1e3, 1e-3, 1.0] + [5e3, 0.0, -2.0]
    rows[:, 2] = 7.0
    scale = Scale.of(rows, ONES)
    scaled = scale(rows)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled.std(axis=0), [1, 1, 0], atol=1e-12)
    for learner in (LinearLearner(), learner_of("mlp", 3, same)):
        layers, activation = learner.fit(scaled, np.eye(3)[PLACES], ONES)
        np.testing.assert_allclose(
            weights_of(((scale.before(layers[0]), *layers[1:]), activation), rows),
            weights_of((layers, activation), scaled),
            rtol=1e-8,
        )


def test_weights_of_rows_count_as_repetitions_in_the_scale() -> None:
    weights = np.arange(len(ROWS)) % 4 + 1
    repeated = np.repeat(ROWS, weights, axis=0)
    got, expected = Scale.of(ROWS, weights), Scale.of(repeated, np.ones(len(repeated)))
    np.testing.assert_allclose(got.mean, expected.mean, atol=1e-14)
    np.testing.assert_allclose(got.deviation, expected.deviation, rtol=1e-12)


def test_a_learner_leaves_the_users_classifier_alone() -> None:
    given = SGDClassifier(loss="log_loss", random_state=0)
    learner_of(given, 3, same).fit(ROWS, np.eye(3)[PLACES], ONES)
    assert not hasattr(given, "coef_")


def test_a_score_for_each_pair_of_classes_is_refused() -> None:
    labels = np.arange(len(ROWS)) % 5
    with pytest.raises(ValueError, match="SVC has 10 scores for 5 classes"):
        layers_of(SVC(kernel="linear").fit(ROWS, labels), 5)
