"""What estimators of all kinds have in common beside scikit-learn's own checks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experts.checkpoint.mixture import open_mixture
from tests.local_mixture import LocalMixture
from tests.unit.workshop.estimators.adaptive_data import absolute
from workshop.estimators import estimators

ONCE: dict[str, Any] = {"n_init": 1, "random_state": 0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "adaptive": ("AdaptiveMixture", {"n_experts": 2}),
    "hierarchical": ("HierarchicalMixture", {"branching": (2,)}),
    "of experts": ("MixtureOfExperts", {"cv": None}),
    "of experts, by folds": ("MixtureOfExperts", {"cv": 3}),
}
EM = ("hierarchical", "of experts")
X, Y = absolute(60)
LABELS = np.where(Y > 0.5, "high", "low")
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def of_kind(kind: str, task: str, **parameters: Any) -> Any:
    name, own = KINDS[kind]
    return getattr(estimators, name + task)(**{**ONCE, **own, **parameters})


@pytest.mark.parametrize(
    ("kind", "grid", "best"),
    [
        ("adaptive", {"n_experts": [1, 2]}, {"n_experts": 2}),
        ("hierarchical", {"branching": [(1,), (2,)]}, {"branching": (2,)}),
    ],
)
def test_a_search_of_a_pipeline_finds_that_one_line_is_no_absolute_value(
    kind: str, grid: dict[str, Any], best: dict[str, Any]
) -> None:
    x, y = absolute(120)
    mixture = of_kind(kind, "Regressor")
    pipeline = make_pipeline(StandardScaler(), mixture).set_output(transform="default")
    prefix = f"{type(mixture).__name__.lower()}__"
    search = GridSearchCV(pipeline, {prefix + name: of for name, of in grid.items()}, cv=2)
    search.fit(x, y)
    assert search.best_params_ == {prefix + name: value for name, value in best.items()}
    assert search.best_score_ > 0.95
    copied = clone(search.best_estimator_)[-1]
    assert copied.get_params() == search.best_estimator_[-1].get_params()
    assert not hasattr(copied, "mixture_")


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_fit_leaves_the_estimator_as_it_was(kind: str) -> None:
    fitted = of_kind(kind, "Classifier").fit(X, LABELS)
    before, attributes = fitted.predict_proba(X), dict(vars(fitted))
    with pytest.raises(ValueError, match="at least 2 classes"):
        fitted.fit(np.tile(X, 2), np.full(60, "none"))
    assert vars(fitted) == attributes
    fitted.set_params(max_iter=1, early_stopping=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        with pytest.raises(ConvergenceWarning):  # after attributes of the fit are set
            fitted.fit(X[:40], LABELS[:40])
        with pytest.raises(ConvergenceWarning):
            (fresh := clone(fitted)).fit(X, LABELS)
    assert set(vars(fitted)) == set(attributes)
    assert np.array_equal(fitted.predict_proba(X), before)
    assert fitted.classes_.tolist() == ["high", "low"]
    with pytest.raises(NotFittedError):
        fresh.predict(X)


@pytest.mark.parametrize("kind", EM)
def test_a_later_fit_keeps_no_validation_scores(kind: str) -> None:
    fitted = of_kind(kind, "Regressor", early_stopping=True).fit(X, Y)
    assert hasattr(fitted, "validation_scores_")
    assert not hasattr(fitted.set_params(early_stopping=False).fit(X, Y), "validation_scores_")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verbose", [0, 1])
def test_a_bar_shows_the_iterations_when_asked_for(
    kind: str, verbose: int, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = of_kind(kind, "Regressor", verbose=verbose).fit(X, Y)
    shown = capsys.readouterr()
    assert shown.out == ""
    for words in (type(fitted).__name__, "objective" if kind in EM[:1] else "log likelihood"):
        assert (words in shown.err) == bool(verbose)


@pytest.mark.parametrize("kind", list(KINDS)[:3])
@pytest.mark.parametrize("task", ["Regressor", "Classifier"])
def test_a_saved_mixture_is_loaded_served_and_goes_on(kind: str, task: str, tmp_path: Path) -> None:
    y = Y if task == "Regressor" else LABELS
    fitted = of_kind(kind, task, warm_start=True, max_iter=8).fit(X, y)
    fitted.save(tmp_path / "mixture")
    loaded = type(fitted).load(tmp_path / "mixture")
    predicted = "predict" if task == "Regressor" else "predict_proba"
    expected = getattr(fitted, predicted)(X)
    np.testing.assert_array_equal(getattr(loaded, predicted)(X), expected)
    np.testing.assert_allclose(
        loaded.responsibilities(X, y), fitted.responsibilities(X, y), rtol=1e-12
    )
    assert (repr(loaded), loaded.n_iter_) == (repr(fitted), fitted.n_iter_)
    np.testing.assert_array_equal(loaded.log_likelihoods_, fitted.log_likelihoods_)
    mixture = open_mixture(tmp_path / "mixture")
    served = LocalMixture(mixture).predict({mixture.spec.rows_input.name: X})
    name = next(name for name in ("probabilities", "mean", "value") if name in served)
    np.testing.assert_allclose(served[name].reshape(expected.shape), expected, atol=1e-12)
    if task == "Classifier":
        assert served["label"][:, 0].tolist() == fitted.predict(X).tolist()
    before = fitted.log_likelihoods_[-1] - (1e-9 if kind in EM else 1e-3)
    for again in (fitted, loaded):
        again.set_params(max_iter=3).fit(X, y)
        assert again.log_likelihoods_[-1] >= before
    np.testing.assert_allclose(loaded.log_likelihoods_, fitted.log_likelihoods_, rtol=1e-6)
