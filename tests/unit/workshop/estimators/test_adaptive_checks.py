"""scikit-learn's contract, by its own checks and tools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.workshop.estimators.adaptive_data import absolute, sequences
from workshop.estimators.estimators import AdaptiveMixtureClassifier, AdaptiveMixtureRegressor

FAST: dict[str, Any] = {"n_experts": 2, "n_init": 1, "max_iter": 10, "random_state": 0}
RECURRENT: dict[str, Any] = {"experts": "rnn", "hidden_layer_sizes": (3,)}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"n_experts": 0}, "n_experts"),
        ({"experts": "svm"}, "experts"),
        ({"experts": "mlp", "hidden_layer_sizes": ()}, "hidden_layer_sizes must have a size"),
        ({"gate_hidden_layer_sizes": (0,)}, "gate_hidden_layer_sizes must be integers"),
        ({"experts": "rnn", "hidden_layer_sizes": (3, 4)}, "must be equal"),
        ({"top_k": 3}, "top_k=3 must be at most n_experts=2"),
        ({"noisy_gate": True, "solver": "lbfgs"}, "solver='lbfgs' needs a loss without noise"),
        ({"noisy_gate": True, "top_k": 1}, "top_k must be at least 2"),
        ({"load_weight": 0.1, "top_k": 1}, "load_weight needs noisy_gate=True"),
        ({"load_weight": 0.1, "noisy_gate": True}, "a top_k below n_experts"),
        ({"deviation": 0.0}, "deviation"),
    ],
)
def test_wrong_parameters_are_refused_by_name(parameters: dict[str, Any], words: str) -> None:
    x, y = absolute(20)
    with pytest.raises(ValueError, match=words):
        AdaptiveMixtureRegressor(**{**FAST, **parameters}).fit(x, y)


def test_fewer_rows_than_experts_are_refused_with_both_numbers() -> None:
    x, y = absolute(5)
    with pytest.raises(ValueError, match=r"n_samples=5 .* n_experts=6"):
        AdaptiveMixtureRegressor(6).fit(x, y)
    with pytest.raises(ValueError, match=r"n_samples=2 .* n_experts=3"):
        AdaptiveMixtureRegressor(3).fit(x, y, sample_weight=[1, 0, 1, 0, 0])


def test_nan_and_rows_of_other_axes_are_refused() -> None:
    x, y, _ = sequences(20)
    recurrent = AdaptiveMixtureRegressor(**FAST, **RECURRENT)
    broken = x.copy()
    broken[3, 2, 1] = np.nan
    for mixture, rows, words in (
        (recurrent, x[:, 0], "3 axes"),
        (recurrent, broken, "NaN"),
        (AdaptiveMixtureRegressor(**FAST), x, "dim"),
    ):
        with pytest.raises(ValueError, match=words):
            mixture.fit(rows, y)
    with pytest.raises(ValueError, match="3 features, but"):
        recurrent.fit(x, y).predict(np.zeros((2, 6, 3)))


@pytest.mark.parametrize("experts", ["linear", "mlp"])
@pytest.mark.parametrize("factor", [1e-300, 1e-200, 1e160, 1e300])
def test_the_size_of_values_changes_nothing(experts: str, factor: float) -> None:
    """Their squares are infinite or 0."""
    x, y = absolute(60)
    plain = AdaptiveMixtureRegressor(**FAST, experts=experts).fit(x, y)
    scaled = AdaptiveMixtureRegressor(**FAST, experts=experts).fit(factor * x, factor * y)
    np.testing.assert_allclose(scaled.predict(factor * x) / factor, plain.predict(x), rtol=1e-6)


def test_a_number_is_the_size_of_one_layer() -> None:
    x, y = absolute(40)
    one, other = (
        AdaptiveMixtureRegressor(
            **FAST, experts="mlp", hidden_layer_sizes=experts, gate_hidden_layer_sizes=gate
        ).fit(x, y)
        for experts, gate in (((4,), (3,)), (4, 3))
    )
    assert np.array_equal(one.predict(x), other.predict(x))


def test_rows_that_early_stopping_cannot_hold_out_are_refused_with_the_reason() -> None:
    x = np.arange(8.0)[:, None]
    early: dict[str, Any] = {**FAST, "early_stopping": True}
    with pytest.raises(ValueError, match=r"early_stopping cannot hold out .* only 1 member"):
        AdaptiveMixtureClassifier(**early).fit(x, [0] * 7 + [1])
    with pytest.raises(ValueError, match=r"n_samples=1 .* to train on .* n_experts=2"):
        AdaptiveMixtureRegressor(**early).fit(x[:2], [0.0, 1.0])
