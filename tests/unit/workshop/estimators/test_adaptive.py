"""What adaptive mixtures find: the pieces, with the loss of 1991; balance, with that of 2017."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import log_loss

from tests.unit.workshop.estimators.adaptive_data import (
    NOISE,
    absolute,
    jump,
    quadrant,
    quadrants,
    sequences,
)
from workshop.estimators.estimators import AdaptiveMixtureClassifier, AdaptiveMixtureRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def separation(weights: np.ndarray, piece: np.ndarray) -> float:
    """Return how far two pieces have different experts: 0 for the same, 1 for none in common."""
    return 0.5 * float(np.abs(weights[piece].mean(axis=0) - weights[~piece].mean(axis=0)).sum())


def alone(mixture: AdaptiveMixtureRegressor, x: np.ndarray) -> np.ndarray:
    """Return the prediction [N] of each row's heaviest expert alone."""
    heaviest = mixture.responsibilities(x).argmax(axis=1)
    return mixture.mixture_.outputs(x)[np.arange(len(x)), heaviest, 0]


def test_competitive_experts_specialise_and_cooperative_ones_do_not() -> None:
    """Both losses fit the two pieces, from the same random weights; only one divides them."""
    x, y = jump()
    settings: dict[str, Any] = {
        "experts": "mlp", "hidden_layer_sizes": (3,), "init": "random", "alpha": 1e-2,
        "n_init": 1, "random_state": 0,
    }  # fmt: skip
    competitive = AdaptiveMixtureRegressor(2, **settings).fit(x, y)
    cooperative = AdaptiveMixtureRegressor(2, loss="cooperative", **settings).fit(x, y)
    is_right = x[:, 0] > 0

    assert competitive.score(x, y) > 0.98
    weights, posterior = competitive.responsibilities(x), competitive.responsibilities(x, y)
    assert np.mean(weights.max(axis=1)) > 0.97
    assert np.mean(posterior.max(axis=1)) > 0.98
    assert separation(weights, is_right) > 0.95
    assert separation(posterior, is_right) > 0.95
    assert np.median((alone(competitive, x) - y) ** 2) < NOISE**2

    assert cooperative.score(x, y) > 0.98
    weights = cooperative.responsibilities(x)
    assert np.mean(weights.max(axis=1)) < 0.9
    assert separation(weights, is_right) < 0.75
    assert np.median((alone(cooperative, x) - y) ** 2) > 10 * NOISE**2


@pytest.mark.parametrize("seed", range(2))
def test_one_start_finds_the_quadrants(seed: int) -> None:
    x, y = quadrants(400, seed)
    fitted = AdaptiveMixtureRegressor(4, alpha=1e-3, n_init=1, random_state=seed).fit(x, y)
    weights = fitted.responsibilities(x)
    of_quadrant = np.array([weights[quadrant(x) == number].mean(axis=0) for number in range(4)])
    assert sorted(of_quadrant.argmax(axis=1)) == [0, 1, 2, 3], "an expert each"
    assert of_quadrant.max(axis=1).min() > 0.9
    assert fitted.score(x, y) > 0.98


def test_a_classifier_divides_labels_that_no_line_divides() -> None:
    """Both experts are logistic regressions, and the labels are those of an exclusive or."""
    x = np.random.RandomState(0).uniform(-1, 1, (400, 2))
    labels = np.where((x[:, 0] > 0) ^ (x[:, 1] > 0), "odd", "even")
    settings: dict[str, Any] = {"n_init": 1, "random_state": 0}
    fitted = AdaptiveMixtureClassifier(2, **settings).fit(x, labels)
    assert fitted.score(x, labels) > 0.97
    assert fitted.classes_.tolist() == ["even", "odd"]
    sharp = AdaptiveMixtureClassifier(2, alpha=1e-6, **settings).fit(x, labels)
    assert sharp.predict_proba(x).max() <= 1
    assert log_loss(labels, sharp.predict_proba(x)) < 0.1
    assert AdaptiveMixtureClassifier(1, **settings).fit(x, labels).score(x, labels) < 0.7
    cooperative = AdaptiveMixtureClassifier(2, loss="cooperative", **settings).fit(x, labels)
    assert cooperative.score(x, labels) > 0.97


BALANCED: dict[str, Any] = {"importance_weight": 1.0, "load_weight": 1.0}


def test_without_the_balancing_losses_an_expert_starves_and_with_them_none() -> None:
    x, y = quadrants(300)
    settings: dict[str, Any] = {
        "experts": "mlp", "hidden_layer_sizes": (8,), "top_k": 2, "noisy_gate": True,
        "init": "random", "n_init": 1, "max_iter": 80, "random_state": 0,
    }  # fmt: skip
    unbalanced = AdaptiveMixtureRegressor(8, **settings).fit(x, y)
    balanced = AdaptiveMixtureRegressor(8, **settings, **BALANCED).fit(x, y)
    for fitted in (unbalanced, balanced):
        is_chosen = fitted.responsibilities(x) > 0
        assert (is_chosen.sum(axis=1) == 2).all(), "prediction is as sparse as the gate"
    shares = (unbalanced.responsibilities(x) > 0).mean(axis=0)
    assert shares.min() == 0, "of 300 rows an expert has none"
    assert unbalanced.expert_usage_.min() == 0
    shares = (balanced.responsibilities(x) > 0).mean(axis=0)
    assert shares.min() > 0.5 * 2 / 8, "half of an equal share"
    assert balanced.expert_usage_.min() > 0.04
    assert balanced.score(x, y) > 0.8


@pytest.mark.parametrize("cell", ["plain", "gru", "lstm"])
def test_recurrent_experts_divide_sequences(cell: str) -> None:
    x, y, piece = sequences()
    fitted = AdaptiveMixtureRegressor(
        2, experts="rnn", cell=cell, hidden_layer_sizes=(5,), n_init=1, max_iter=60,
        random_state=0,
    ).fit(x, y)  # fmt: skip
    assert fitted.score(x, y) > 0.98
    assert separation(fitted.responsibilities(x), piece.astype(bool)) > 0.9
    shorter = fitted.predict(x[:, 2:])
    assert np.corrcoef(shorter, y)[0, 1] > 0.9, "a gate that pools takes any length"


def test_an_mlp_gate_finds_a_piece_inside_another() -> None:
    source = np.random.RandomState(0)
    x = source.uniform(-1, 1, (400, 2))
    is_inside = (x**2).sum(axis=1) < 0.4
    y = np.where(is_inside, 2 + x[:, 0], -x[:, 1]) + 0.05 * source.randn(400)
    fitted = AdaptiveMixtureRegressor(
        2, gate_hidden_layer_sizes=(8,), n_init=1, random_state=0
    ).fit(x, y)
    assert separation(fitted.responsibilities(x), is_inside) > 0.9
    assert fitted.score(x, y) > 0.98


def test_outputs_of_different_scales_share_a_deviation_in_their_own_units() -> None:
    x, y = absolute()
    both = np.column_stack([y, 1000 * y + 5])
    fitted = AdaptiveMixtureRegressor(2, n_init=1, random_state=0).fit(x, both)
    assert fitted.predict(x).shape == (300, 2)
    assert fitted.score(x, both) > 0.99
    deviations = fitted.mixture_.deviations
    np.testing.assert_allclose(deviations[:, 1], 1000 * deviations[:, 0])
    np.testing.assert_allclose(deviations[:, 0], NOISE, rtol=0.1)


def test_deviations_are_given_or_fitted_for_each_expert() -> None:
    x, _ = absolute()
    source = np.random.RandomState(1)
    noise = np.where(x[:, 0] > 0, 0.1, 0.01) * source.randn(300)
    y = np.where(x[:, 0] > 0, 3 - x[:, 0], x[:, 0]) + noise
    settings: dict[str, Any] = {"n_init": 1, "random_state": 0}
    fitted = AdaptiveMixtureRegressor(2, deviation="expert", **settings).fit(x, y)
    expert = fitted.responsibilities(np.array([[0.5], [-0.5]])).argmax(axis=1)
    np.testing.assert_allclose(fitted.mixture_.deviations[expert, 0], [0.1, 0.01], rtol=0.15)
    given = AdaptiveMixtureRegressor(2, deviation=0.25, **settings).fit(x, y)
    np.testing.assert_allclose(given.mixture_.deviations, 0.25, rtol=1e-12)
