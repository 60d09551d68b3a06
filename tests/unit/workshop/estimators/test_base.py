"""What the estimators have in common: their checks, predictions and records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

from tests.unit.workshop.estimators.planted import (
    FEATURES,
    PlantedClassifier,
    PlantedRegressor,
    layers_of,
    recurrent_part,
    torch_rnn,
    tree,
)
from workshop.estimators.base import progress
from workshop.estimators.parts import FittedMixture, GatePart

SOURCE = np.random.default_rng(0)
ROWS = SOURCE.normal(size=(30, FEATURES))
VALUES = SOURCE.normal(size=(30, 2))
LABELS = np.array(["red", "green", "blue"])[np.arange(30) % 3]
PROBABILITIES = tree(1, kind="probabilities", width=3)


def sequences() -> FittedMixture:
    gate = GatePart(layers_of(np.random.default_rng(2), FEATURES, 2), ("a", "b"), pool="mean")
    experts = {name: recurrent_part("gru", torch_rnn("gru")) for name in "ab"}
    shape, deviations = (-1, FEATURES), np.ones((2, 2))
    return FittedMixture("top", {"top": gate}, experts, "density", shape, 2, deviations)


def test_a_regressor_predicts_the_combination() -> None:
    for mixture, values in ((tree(0), VALUES), (tree(0, width=1), VALUES[:, 0])):
        predicted = PlantedRegressor.of(mixture).fit(ROWS, values).predict(ROWS)
        expected = mixture.combine(ROWS)
        np.testing.assert_array_equal(predicted, expected if values.ndim > 1 else expected[:, 0])


def test_the_records_are_weighted_means_without_rows_of_weight_zero() -> None:
    mixture = tree(0)
    weights = np.where(np.arange(30) < 10, 0.0, 2.0)
    weights[20:] = 1.0
    fitted = PlantedRegressor.of(mixture).fit(ROWS, VALUES, weights)
    again = np.concatenate([np.arange(10, 20), np.arange(10, 20), np.arange(20, 30)])
    expected = PlantedRegressor.of(mixture).fit(ROWS[again], VALUES[again])
    np.testing.assert_allclose(fitted.expert_usage_, expected.expert_usage_)
    assert fitted.log_likelihood_ == pytest.approx(expected.log_likelihood_)
    assert fitted.expert_usage_.sum() == pytest.approx(1)


def test_a_classifier_predicts_labels_in_the_order_of_classes() -> None:
    fitted = PlantedClassifier.of(PROBABILITIES).fit(ROWS, LABELS)
    assert fitted.classes_.tolist() == ["blue", "green", "red"]
    shares = fitted.predict_proba(ROWS)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert fitted.predict(ROWS).tolist() == fitted.classes_[shares.argmax(axis=1)].tolist()


def test_the_posterior_needs_targets_of_the_fitted_kind() -> None:
    fitted = PlantedClassifier.of(PROBABILITIES).fit(ROWS, LABELS)
    weights = fitted.responsibilities(ROWS)
    given = fitted.responsibilities(ROWS, LABELS)
    likelihoods = fitted.mixture_.outputs(ROWS)[
        np.arange(30)[:, None], np.arange(3), np.searchsorted(fitted.classes_, LABELS)[:, None]
    ]
    joint = weights * likelihoods
    np.testing.assert_allclose(given, joint / joint.sum(axis=1, keepdims=True), rtol=1e-9)
    with pytest.raises(ValueError, match=r"'black'.*not one of classes_"):
        fitted.responsibilities(ROWS[:1], ["black"])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        fitted.responsibilities(ROWS, LABELS[:3])
    regressor = PlantedRegressor.of(tree(0)).fit(ROWS, VALUES)
    with pytest.raises(ValueError, match="y has 1 outputs, and PlantedRegressor was fitted to 2"):
        regressor.responsibilities(ROWS, VALUES[:, 0])


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 classes; y has 1 class, 'red'"):
        PlantedClassifier.of(PROBABILITIES).fit(ROWS, ["red"] * 30)
    with pytest.raises(ValueError, match="Unknown label type"):
        PlantedClassifier.of(PROBABILITIES).fit(ROWS, VALUES[:, 0])


def test_nothing_is_predicted_before_a_fit() -> None:
    for method in ("predict", "responsibilities", "plot_experts", "save"):
        with pytest.raises(NotFittedError):
            getattr(PlantedRegressor(), method)(ROWS)


def test_sequences_have_three_axes() -> None:
    rows = SOURCE.normal(size=(30, 4, FEATURES))
    estimator = PlantedRegressor.of(sequences())
    tags = estimator.__sklearn_tags__().input_tags
    assert (tags.two_d_array, tags.three_d_array) == (False, True)
    fitted = estimator.fit(rows, VALUES)
    assert fitted.n_features_in_ == FEATURES
    assert fitted.predict(rows[:, :2]).shape == (30, 2)
    wrong = {
        r"takes rows \[T, F\]": ROWS,
        "X has 2 features": rows[:, :, :2],
        "NaN": np.full_like(rows, np.nan),
    }
    for words, X in wrong.items():
        with pytest.raises(ValueError, match=words):
            fitted.predict(X)


def test_the_bar_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (0, 1):
        with progress(verbose, 2, "fit") as advance:
            advance("1.0")
            advance("2.5")
        shown = capsys.readouterr()
        assert shown.out == ""
        assert [words in shown.err for words in ("fit", "2/2", "2.5")] == [bool(verbose)] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros((30, 1, 1))}, "dim 3"),
        ({"sample_weight": -np.ones(30)}, "Negative values in data"),
        ({"sample_weight": np.zeros(30)}, "at least one"),
    ],
)
def test_wrong_data_that_scikit_learn_does_not_check_are_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PlantedRegressor.of(tree(0)).fit(**{"X": ROWS, "y": VALUES, **change})
