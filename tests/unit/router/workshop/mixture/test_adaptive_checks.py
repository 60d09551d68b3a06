"""scikit-learn's contract, by its own checks and tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from router.workshop.mixture.estimators import AdaptiveMixtureClassifier, AdaptiveMixtureRegressor
from tests.unit.router.workshop.mixture.adaptive_data import absolute, sequences
from tests.unit.router.workshop.mixture.contract import contract_of

FAST: dict[str, Any] = {"n_experts": 2, "n_init": 1, "max_iter": 10, "random_state": 0}
RECURRENT: dict[str, Any] = {"experts": "rnn", "hidden_layer_sizes": (3,)}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@contract_of(
    AdaptiveMixtureRegressor(**FAST),
    AdaptiveMixtureClassifier(**FAST),
    AdaptiveMixtureRegressor(**FAST, **RECURRENT),
    AdaptiveMixtureClassifier(**FAST, **RECURRENT),
)
def test_estimator_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


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
