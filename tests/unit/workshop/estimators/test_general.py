"""Mixtures of any scikit-learn estimators: EM's promise, scikit-learn's contract, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joblib import parallel_config
from scipy.stats import norm
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone, is_regressor
from sklearn.datasets import make_blobs
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.exceptions import FitFailedWarning
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from tests.unit.workshop.estimators.adaptive_data import two_pieces, two_rules
from workshop.estimators.estimators import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor
from workshop.estimators.general.ensemble import FLOOR_MASS, FitFailedError

# A few folds, starts and steps: for tests of what does not depend on how many there are.
QUICK: dict[str, Any] = {"cv": 3, "n_init": 1, "max_iter": 5, "random_state": 0}
LOGISTIC = LogisticRegression(solver="newton-cholesky")
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
keeps_going = pytest.mark.filterwarnings("ignore::sklearn.exceptions.FitFailedWarning")


def in_sample(kind: Any, *args: Any, **kwargs: Any) -> Any:
    """Return an estimator whose EM is judged by the rows that it is fitted to."""
    return kind(*args, cv=None, **kwargs)


def test_linear_experts_find_the_pieces() -> None:
    X, y = two_pieces(0)
    fitted = in_sample(MixtureOfExpertsRegressor, random_state=0).fit(X, y)
    slopes = sorted(part.estimator.coef_.tolist() for part in fitted.mixture_.experts.values())
    np.testing.assert_allclose(slopes, [[-2, 1], [3, 0]], atol=0.05)
    np.testing.assert_allclose(fitted.mixture_.deviations, 0.05, atol=0.015)
    shares = fitted.responsibilities(X, y)
    far = np.abs(X[:, 0]) > 0.3
    assert np.abs(shares[far] - shares[far].round()).mean() < 0.05
    assert fitted.score(X, y) > 0.99
    assert LinearRegression().fit(X, y).score(X, y) < 0.7
    assert fitted.expert_usage_ == pytest.approx([0.5, 0.5], abs=0.1)
    np.testing.assert_allclose(fitted.log_likelihoods_[-1], fitted.log_likelihood_, rtol=1e-9)
    assert len(fitted.log_likelihoods_) == fitted.n_iter_


def test_logistic_experts_find_the_rules() -> None:
    X, y = two_rules(0)
    fitted = MixtureOfExpertsClassifier(cv=4, random_state=0).fit(X, y)
    assert fitted.score(X, y) > 0.9
    assert LogisticRegression().fit(X, y).score(X, y) < 0.7


def test_one_expert_is_that_expert_with_the_likeliest_noise() -> None:
    X, y = two_pieces(1)
    fitted = in_sample(MixtureOfExpertsRegressor, [Ridge(0.5)]).fit(X, y)
    alone = Ridge(0.5).fit(X, y)
    np.testing.assert_allclose(fitted.predict(X), alone.predict(X))
    deviation = np.sqrt(np.mean((y - alone.predict(X)) ** 2))
    expected = norm.logpdf(y, alone.predict(X), deviation).mean()
    assert fitted.log_likelihood_ == pytest.approx(expected)
    np.testing.assert_array_equal(fitted.responsibilities(X), 1)


REGRESSORS = st.lists(
    st.sampled_from(
        [
            LinearRegression(),
            DecisionTreeRegressor(max_depth=2, random_state=0),
            make_pipeline(StandardScaler(), Ridge()),
            KNeighborsRegressor(9),
            SVR(),
        ]
    ),
    min_size=2,
    max_size=4,
)
CLASSIFIERS = st.lists(
    st.sampled_from(
        [LOGISTIC, GaussianNB(), DecisionTreeClassifier(max_depth=2), KNeighborsClassifier(7)]
    ),
    min_size=2,
    max_size=4,
)
GATES = st.sampled_from(["linear", "mlp", LOGISTIC])


@pytest.mark.parametrize(
    "experts", [[KNeighborsRegressor(7), KNeighborsRegressor(9)], [LinearRegression(), Ridge()]]
)
def test_hard_em_counts_the_likeliest_expert_alone(experts: list[Any]) -> None:
    X, y = two_pieces(2)
    fitted = in_sample(MixtureOfExpertsRegressor, experts, random_state=0).fit(X, y)
    joint = fitted.mixture_.log_gates(X) + fitted.mixture_.log_likelihoods(X, y[:, None])
    is_hard = isinstance(experts[0], KNeighborsRegressor)
    rows = joint.max(axis=1) if is_hard else np.log(np.exp(joint).sum(axis=1))
    assert fitted.log_likelihoods_[-1] == pytest.approx(rows.mean())
    assert np.unique(fitted.log_likelihoods_).size > 1, "nothing was learnt"


def test_a_part_that_would_lower_the_objective_is_not_taken() -> None:
    class Worse(RegressorMixin, BaseEstimator):
        """Fits well once, and from the second fit on predicts far off."""

        count = 0

        def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: Any = None) -> Any:
            Worse.count += 1
            self.offset_ = 0.0 if Worse.count == 1 else 1e3
            self.inner_ = LinearRegression().fit(X, y, sample_weight)
            return self

        def predict(self, X: np.ndarray) -> np.ndarray:
            return self.inner_.predict(X) + self.offset_

    X, y = two_pieces(3)
    experts = [Worse(), LinearRegression()]
    fitted = in_sample(MixtureOfExpertsRegressor, experts, n_init=1, random_state=0).fit(X, y)
    assert Worse.count > 2
    assert fitted.mixture_.experts["worse"].estimator.offset_ == 0
    assert (np.diff(fitted.log_likelihoods_) >= -1e-9).all()


def test_an_mlp_gate_takes_what_a_linear_gate_cannot() -> None:
    source = np.random.default_rng(2)
    X = source.normal(size=(300, 2))
    y = np.where((X**2).sum(axis=1) < 1, 5.0 + X[:, 0], -X[:, 0])
    scores = {
        gate: in_sample(MixtureOfExpertsRegressor, gate=gate, random_state=0).fit(X, y).score(X, y)
        for gate in ("linear", "mlp")
    }
    assert scores["mlp"] > 0.85
    assert scores["mlp"] > scores["linear"] + 0.1


def test_top_k_is_for_prediction_alone() -> None:
    X, y = two_pieces(6)
    experts = [LinearRegression(), Ridge(), Ridge(10.0)]
    settings: dict[str, Any] = {**QUICK, "cv": None}
    whole = MixtureOfExpertsRegressor(experts, **settings).fit(X, y)
    pruned = MixtureOfExpertsRegressor(experts, top_k=1, **settings).fit(X, y)
    np.testing.assert_array_equal(whole.log_likelihoods_, pruned.log_likelihoods_)
    weights = pruned.responsibilities(X)
    np.testing.assert_array_equal(weights, np.eye(3)[whole.responsibilities(X).argmax(axis=1)])
    rows = np.arange(len(X))
    outputs = whole.mixture_.outputs(X)[rows, weights.argmax(axis=1), 0]
    np.testing.assert_allclose(pruned.predict(X), outputs)


def test_a_class_that_an_expert_never_saw_has_probability_zero_and_a_floor_in_likelihoods() -> None:
    X, y = make_blobs([20, 20, 20], centers=[[-9, 0], [9, 0], [9, 3]], random_state=0)
    experts = [KNeighborsClassifier(3), KNeighborsClassifier(5)]
    fitted = in_sample(MixtureOfExpertsClassifier, experts, random_state=0).fit(X, y)
    parts = {
        part.class_places.tolist().__repr__(): part for part in fitted.mixture_.experts.values()
    }
    assert sorted(parts) == ["[0]", "[1, 2]"]
    assert isinstance(parts["[0]"].estimator, DummyClassifier), "one class needs no neighbours"
    assert fitted.score(X, y) > 0.9
    shares = fitted.predict_proba(X)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    places = {name: list(part.class_places) for name, part in fitted.mixture_.experts.items()}
    likelihoods = np.exp(fitted.mixture_.log_likelihoods(X, np.zeros(60, int)))
    for number, seen in enumerate(places.values()):
        expected = 1 - FLOOR_MASS + FLOOR_MASS / 3 if seen == [0] else FLOOR_MASS / 3
        np.testing.assert_allclose(likelihoods[:, number], expected)
    given_other = fitted.responsibilities(X[:1], [2])
    assert np.isfinite(given_other).all()


class Picky(ClassifierMixin, BaseEstimator):
    """Refuses fewer rows than it wants, and says so."""

    def __init__(self, wanted: int = 30) -> None:
        self.wanted = wanted

    def fit(self, X: np.ndarray, y: np.ndarray) -> Picky:
        if len(X) < self.wanted:
            raise RuntimeError(f"{self.wanted} rows are wanted")
        self.inner_ = KNeighborsClassifier(3).fit(X, y)
        self.classes_ = self.inner_.classes_
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return self.inner_.predict_proba(X)


def test_an_expert_that_cannot_take_its_first_rows_is_named() -> None:
    X, y = two_rules(7, 40)
    with pytest.raises(FitFailedError, match=r"expert 'picky' \(Picky\).*39 rows are wanted"):
        in_sample(MixtureOfExpertsClassifier, [Picky(39), LOGISTIC], random_state=0).fit(X, y)


def test_an_expert_that_cannot_take_its_later_rows_keeps_its_fit() -> None:
    X, y = two_rules(8, 60)

    class Later(Picky):
        fits = 0

        def fit(self, X: np.ndarray, y: np.ndarray) -> Picky:
            Later.fits += 1
            self.wanted = 1 if Later.fits == 1 else 10**6
            return super().fit(X, y)

    with pytest.warns(FitFailedWarning, match=r"'later' \(Later\).*it keeps its earlier fit"):
        fitted = in_sample(
            MixtureOfExpertsClassifier, [Later(), LOGISTIC], n_init=1, random_state=5
        ).fit(X, y)
    assert Later.fits > 1
    assert (np.diff(fitted.log_likelihoods_) >= -1e-9).all()


class Broken(DummyRegressor):
    """Predicts what is no number."""

    def predict(self, X: np.ndarray) -> np.ndarray:
        return np.full(len(X), np.nan)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (MixtureOfExpertsRegressor((Ridge(), Ridge())), "'experts' parameter"),
        (MixtureOfExpertsRegressor([]), "at least one is needed"),
        (MixtureOfExpertsRegressor([("a", Ridge()), ("a", Ridge())]), "'a' is taken"),
        (MixtureOfExpertsRegressor([("gate", Ridge())]), "'gate' is taken"),
        (MixtureOfExpertsRegressor([("a b", Ridge())]), "must be a name"),
        (MixtureOfExpertsRegressor([("a", StandardScaler())]), "'a'.*has no predict"),
        (MixtureOfExpertsRegressor([("a", Ridge)]), "'a' is the class Ridge"),
        (MixtureOfExpertsRegressor(gate="round"), 'gate must be "linear", "mlp" or'),
        (MixtureOfExpertsRegressor(gate=Ridge()), "gate must be"),
        (MixtureOfExpertsRegressor(gate=GaussianNB()), "GaussianNB is neither linear nor an MLP"),
        (MixtureOfExpertsRegressor(top_k=3), "top_k=3 is more than the 2 experts"),
        (MixtureOfExpertsRegressor(top_k=0), "'top_k' parameter"),
        (MixtureOfExpertsRegressor(max_iter=0), "'max_iter' parameter"),
        (MixtureOfExpertsRegressor(validation_fraction=1.0), "'validation_fraction' parameter"),
        (MixtureOfExpertsRegressor([Broken()]), r"'broken' \(Broken\).*not finite"),
        (MixtureOfExpertsRegressor([Ridge()] * 31), "n_samples=30 should be at least.*31"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused(estimator: Any, message: str) -> None:
    X, y = two_pieces(9, 30)
    with pytest.raises(ValueError, match=message):
        estimator.fit(X, y)


def test_a_classifier_without_probabilities_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'svc' \(SVC\) has no predict_proba; wrap it in Calib"):
        MixtureOfExpertsClassifier([SVC()]).fit(*two_rules(9))


def test_weights_are_for_experts_that_take_them() -> None:
    X, y = two_pieces(10, 60)
    weights = np.arange(len(X)) % 3
    with pytest.raises(ValueError, match=r"'kneighborsregressor'.*takes no sample_weight"):
        MixtureOfExpertsRegressor([KNeighborsRegressor(), Ridge()]).fit(X, y, weights)
    piped = [make_pipeline(StandardScaler(), LinearRegression()) for _ in range(2)]
    once = MixtureOfExpertsRegressor(piped, **QUICK).fit(X, y, weights)
    again = np.repeat(np.arange(len(X)), weights)
    repeated = MixtureOfExpertsRegressor(piped, **QUICK).fit(X[again], y[again])
    np.testing.assert_allclose(once.predict(X), repeated.predict(X), rtol=1e-6, atol=1e-8)


def test_equal_rows_are_shared_by_all_experts() -> None:
    X, y = np.ones((6, 2)), np.arange(6.0)
    fitted = MixtureOfExpertsRegressor(random_state=0).fit(X, y)
    np.testing.assert_allclose(fitted.predict(X[:1]), 2.5)


def test_the_tools_of_scikit_learn_take_mixtures() -> None:
    X, y = two_pieces(11, 120)
    settings: dict[str, Any] = {**QUICK, "cv": None}
    named = MixtureOfExpertsRegressor([("low", Ridge()), ("high", Ridge())], **settings)
    assert clone(named).get_params()["low__alpha"] == 1.0
    search = GridSearchCV(named, {"low__alpha": [1e-3, 1e3], "top_k": [None, 1]}, cv=2).fit(X, y)
    assert search.best_params_["low__alpha"] == 1e-3
    replaced = clone(named).set_params(high=LinearRegression(), gate="mlp")
    assert isinstance(dict(replaced.experts)["high"], LinearRegression)
    assert isinstance(dict(named.experts)["high"], Ridge), "a clone has parameters of its own"
    unnamed = MixtureOfExpertsRegressor([make_pipeline(StandardScaler(), Ridge())] * 2, **settings)
    assert set(unnamed.fit(X, y).mixture_.experts) == {"pipeline-1", "pipeline-2"}


def test_jobs_and_repetitions_give_the_same() -> None:
    X, y = two_pieces(12, 60)
    settings: dict[str, Any] = {**QUICK, "n_init": 2, "max_iter": 3}
    experts = [DecisionTreeRegressor(max_depth=2, max_features=1) for _ in range(3)]

    def fitted(seed: Any, **changes: Any) -> MixtureOfExpertsRegressor:
        changed = {**settings, "random_state": seed, **changes}
        return MixtureOfExpertsRegressor(experts, **changed).fit(X, y)

    alone = fitted(3)
    with parallel_config("threading"):  # processes take seconds to start
        together = fitted(3, n_jobs=2)
    again = fitted(np.random.RandomState(3))
    for other in (together, again):
        np.testing.assert_array_equal(other.predict(X), alone.predict(X))
    assert (fitted(4).predict(X) != alone.predict(X)).any()


def test_a_warm_start_goes_on() -> None:
    X, y = two_pieces(13)
    settings: dict[str, Any] = {"cv": None, "tol": 0.0, "random_state": 0}
    whole = MixtureOfExpertsRegressor(max_iter=6, **settings).fit(X, y)
    warm = MixtureOfExpertsRegressor(max_iter=3, warm_start=True, **settings)
    first = warm.fit(X, y).log_likelihoods_
    second = warm.fit(X, y).log_likelihoods_
    np.testing.assert_allclose([*first, *second], whole.log_likelihoods_, rtol=1e-6)
    with pytest.raises(ValueError, match="X has 1 features"):
        warm.fit(X[:, :1], y)
    with pytest.raises(ValueError, match="the experts are ridge, and those fitted before are"):
        warm.set_params(experts=[Ridge()]).fit(X, y)


@keeps_going
@settings(max_examples=30, derandomize=True)
@given(experts=REGRESSORS | CLASSIFIERS, gate=GATES, seed=st.integers(0, 1000), wide=st.booleans())
def test_the_objective_never_falls(experts: list[Any], gate: Any, seed: int, wide: bool) -> None:
    is_regression = hasattr(experts[0], "alpha") or is_regressor(experts[0])
    X, y = (two_pieces if is_regression else two_rules)(seed, 60)
    if is_regression and wide and not any(isinstance(expert, SVR) for expert in experts):
        y = np.column_stack([y, X[:, 0] ** 2])
    kind = MixtureOfExpertsRegressor if is_regression else MixtureOfExpertsClassifier
    estimator = in_sample(kind, experts, gate=gate, n_init=1, random_state=seed)
    objectives = estimator.set_params(max_iter=6, n_iter_no_change=6).fit(X, y).log_likelihoods_
    assert len(objectives) == 6
    assert (np.diff(objectives) >= -1e-9 * np.abs(objectives[:-1])).all()


def test_early_stopping_keeps_the_best_mixture_for_rows_held_out() -> None:
    X, y = two_pieces(2, 80)
    y += np.random.default_rng(2).normal(size=80)
    stopped = in_sample(MixtureOfExpertsRegressor,
        [DecisionTreeRegressor(max_depth=4) for _ in range(3)],
        early_stopping=True, validation_fraction=0.3, n_iter_no_change=4, n_init=1, random_state=0,
    ).fit(X, y)  # fmt: skip
    scores = stopped.validation_scores_
    best = int(scores.argmax())
    assert (len(scores), stopped.n_iter_) == (best + 5, best + 5)
    assert stopped.n_samples_fit_ == 56
    ended = clone(stopped).set_params(max_iter=best + 1).fit(X, y)
    np.testing.assert_array_equal(stopped.predict(X), ended.predict(X))
