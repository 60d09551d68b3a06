"""scikit-learn's contract, by its own checks and tools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cluster.errors import NotFiniteError
from tests.unit.workshop.estimators.adaptive_data import absolute, sequences
from workshop.estimators.estimators import AdaptiveMixtureClassifier, AdaptiveMixtureRegressor

FAST: dict[str, Any] = {"n_experts": 2, "n_init": 1, "max_iter": 10, "random_state": 0}
RECURRENT: dict[str, Any] = {"experts": "rnn", "hidden_layer_sizes": (3,)}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def test_tags_say_which_rows_are_taken() -> None:
    flat = AdaptiveMixtureRegressor().__sklearn_tags__()
    assert (flat.input_tags.two_d_array, flat.input_tags.three_d_array) == (True, False)
    recurrent = AdaptiveMixtureClassifier(experts="rnn").__sklearn_tags__()
    assert (recurrent.input_tags.two_d_array, recurrent.input_tags.three_d_array) == (False, True)
    assert recurrent.estimator_type == "classifier"
    assert flat.target_tags.multi_output


def test_pipeline_search_and_clone() -> None:
    x, y = absolute(120)
    pipeline = make_pipeline(StandardScaler(), AdaptiveMixtureRegressor(**FAST))
    pipeline.set_output(transform="default")
    name = "adaptivemixtureregressor__n_experts"
    search = GridSearchCV(pipeline, {name: [1, 2]}, cv=2).fit(x, y)
    assert search.best_params_ == {name: 2}, "one line is no |x|"
    copied = clone(search.best_estimator_)
    assert copied[-1].get_params() == search.best_estimator_[-1].get_params()
    assert not hasattr(copied[-1], "mixture_")


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
    with pytest.raises(ValueError, match="3 axes"):
        recurrent.fit(x[:, 0], y)
    broken = x.copy()
    broken[3, 2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        recurrent.fit(broken, y)
    with pytest.raises(ValueError, match="dim"):
        AdaptiveMixtureRegressor(**FAST).fit(x, y)
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


def test_a_failed_fit_leaves_the_estimator_as_it_was() -> None:
    x, y = absolute(40)
    labels = np.where(y > 0.5, "high", "low")
    fitted = AdaptiveMixtureClassifier(**FAST).fit(x, labels)
    before = fitted.predict(x)
    with pytest.raises(ValueError, match="at least 2 classes"):
        fitted.fit(np.tile(x, 2), np.full(40, "none"))
    assert np.array_equal(fitted.predict(x), before)
    assert fitted.classes_.tolist() == ["high", "low"]
    wild = AdaptiveMixtureRegressor(**FAST, solver="adam", learning_rate=1e200)
    with pytest.raises(NotFiniteError):
        wild.fit(x, y)
    with pytest.raises(NotFittedError):
        wild.predict(x)


def test_a_number_is_the_size_of_one_layer() -> None:
    x, y = absolute(40)
    settings: dict[str, Any] = {**FAST, "experts": "mlp"}
    pairs = [
        AdaptiveMixtureRegressor(
            **settings, hidden_layer_sizes=experts, gate_hidden_layer_sizes=gate
        ).fit(x, y)
        for experts, gate in (((4,), (3,)), (4, 3))
    ]
    assert np.array_equal(pairs[0].predict(x), pairs[1].predict(x))


def test_rows_that_early_stopping_cannot_hold_out_are_refused_with_the_reason() -> None:
    x = np.arange(8.0)[:, None]
    early: dict[str, Any] = {**FAST, "early_stopping": True}
    with pytest.raises(ValueError, match=r"early_stopping cannot hold out .* only 1 member"):
        AdaptiveMixtureClassifier(**early).fit(x, [0] * 7 + [1])
    with pytest.raises(ValueError, match=r"n_samples=1 .* to train on .* n_experts=2"):
        AdaptiveMixtureRegressor(**early).fit(x[:2], [0.0, 1.0])
