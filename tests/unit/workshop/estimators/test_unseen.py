"""Mixtures that are chosen and fitted by out-of-fold predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import FitFailedWarning
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.tree import DecisionTreeRegressor

from tests.unit.workshop.estimators.adaptive_data import two_pieces, two_rules
from workshop.estimators.estimators import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor
from workshop.estimators.general.ensemble import EnsembleEM
from workshop.estimators.general.fits import Data, Expert, folds_of, given_folds, merged
from workshop.estimators.general.gates import learner_of, least_squares_weights
from workshop.estimators.general.unseen import UnseenSearch, losses_of

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def test_an_expert_that_memorises_does_not_take_all_rows() -> None:
    source = np.random.default_rng(0)
    X = source.normal(size=(150, 3))
    y = X @ [1.0, -2.0, 0.5] + source.normal(size=150)
    unseen = source.normal(size=(500, 3))
    truth = unseen @ [1.0, -2.0, 0.5]
    experts = [LinearRegression(), KNeighborsRegressor(1)]

    def error(cv: int | None) -> float:
        fitted = MixtureOfExpertsRegressor(experts, cv=cv, random_state=0).fit(X, y)
        return float(np.mean((fitted.predict(unseen) - truth) ** 2))

    with pytest.warns(FitFailedWarning, match="'kneighborsregressor'.*has none of 60 rows"):
        errors = {5: error(5)}
    errors[None] = error(None)
    alone = np.mean((LinearRegression().fit(X, y).predict(unseen) - truth) ** 2)
    assert errors[5] < alone + 0.05
    assert errors[None] > 5 * errors[5]


@settings(max_examples=8, derandomize=True)
@given(seed=st.integers(0, 1000), is_tree=st.booleans())
def test_the_out_of_fold_objective_never_falls(seed: int, is_tree: bool) -> None:
    X, y = two_pieces(seed, 60)
    first = DecisionTreeRegressor(random_state=0) if is_tree else Ridge()
    experts = [Expert("a", first), Expert("b", LinearRegression())]
    data = Data(X, y[:, None], np.ones(60), None)
    folds = folds_of(X, y[:, None], 4, False, seed)
    em = EnsembleEM(experts, learner_of("linear", 2, lambda gate: gate), data, None, folds)
    em.start(None)
    objectives = [em.step() for _ in range(6)]
    assert (np.diff(objectives) >= -1e-9).all()


def test_an_expert_is_not_fitted_again_to_the_shares_of_its_latest_fit() -> None:
    class Counted(LinearRegression):
        fits = 0

        def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: Any = None) -> Any:
            Counted.fits += 1
            return super().fit(X, y, sample_weight)

    X, y = two_pieces(6, 60)
    data = Data(X, y[:, None], np.ones(60), None)
    experts = [Expert("a", Counted()), Expert("b", Counted())]
    folds = folds_of(X, y[:, None], 3, False, 0)
    em = EnsembleEM(experts, learner_of("linear", 2, lambda gate: gate), data, None, folds)
    em.start(np.eye(2)[(X[:, 0] > 0.7).astype(int)])
    assert Counted.fits == 6
    for _ in range(30):
        em.step()
    fits_so_far = Counted.fits
    assert 6 < fits_so_far < 6 * 31, "fitted in each iteration"
    em.step()
    assert Counted.fits == fits_so_far, "the shares have settled"


@pytest.mark.parametrize(
    ("of_folds", "is_taken"),
    [
        ([0.0, 0.0, 0.0, 0.0], False),  # no gain: out at once
        ([0.5, 0.5, 0.5, 0.5], True),
        ([0.5, 0.5, 0.5, -1.5], False),  # the last fold judges too
        ([0.04, -0.3, 0.5, 0.5], False),  # out after the second
    ],
)
def test_folds_judge_em_until_it_cannot_win(
    of_folds: list[float], is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = two_pieces(7, 80)
    y = np.random.default_rng(7).normal(size=80)
    judged = []

    def losses(search: UnseenSearch, mixture: object, fold: tuple) -> np.ndarray:
        number = next(n for n, other in enumerate(search._folds_of_em) if other[1] is fold[1])
        judged.append(number)
        noise = np.where(np.arange(len(fold[1])) % 2, 0.1, -0.1)
        return beaten[fold[1]] - of_folds[number] + noise

    def kept(self: UnseenSearch, found: np.ndarray) -> object:
        nonlocal beaten
        beaten = found
        return winner(self, found)

    beaten = np.empty(0)
    winner = UnseenSearch._winner
    monkeypatch.setattr(UnseenSearch, "_winner", kept)
    monkeypatch.setattr(UnseenSearch, "_judged", losses)
    experts = [LinearRegression(), Ridge(10.0)]
    fitted = MixtureOfExpertsRegressor(experts, cv=4, n_init=1, random_state=0).fit(X, y)
    assert (fitted.chosen_ == "EM") == is_taken
    first_loss = next((n for n, gain in enumerate(of_folds) if gain <= 0), 3)
    assert max(judged) == first_loss


def noisy_lines(seed: int, bend: float) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [N, 2] and a target that is a line, bent or not, with much noise."""
    source = np.random.default_rng(seed)
    X = source.normal(size=(120, 2))
    return X, X @ [1.0, -1.0] + bend * X[:, 0] * X[:, 1] + source.normal(size=120)


@pytest.mark.parametrize("is_close", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_one_expert_or_constant_weights_by_the_loss_of_other_rows(
    seed: int, is_close: bool
) -> None:
    X, y = noisy_lines(seed, 2.0 * is_close)
    tree = DecisionTreeRegressor(max_depth=3, random_state=0)
    experts = [("other", KNeighborsRegressor(9) if is_close else tree), ("line", Ridge())]
    folds = list(KFold(4, shuffle=True, random_state=seed).split(X))
    fitted = MixtureOfExpertsRegressor(experts, cv=folds, n_init=1, max_iter=5, random_state=0)
    fitted.fit(X, y)
    unseen = np.stack([cross_val_predict(expert, X, y, cv=folds) for _, expert in experts])
    whole = [expert.fit(X, y).predict(X) for _, expert in experts]

    def best_weight(rows: np.ndarray) -> float:
        def squares(weight: float) -> float:
            mixed = weight * unseen[0] + (1 - weight) * unseen[1]
            return float(np.mean((mixed - y)[rows] ** 2))

        return float(minimize_scalar(squares, bounds=(0, 1), options={"xatol": 1e-10}).x)

    mean = np.empty(len(y))
    for train, test in folds:
        weight = best_weight(train)
        mean[test] = weight * unseen[0, test] + (1 - weight) * unseen[1, test]
    of_candidates = {"other alone": unseen[0], "line alone": unseen[1], "mean": mean}
    losses = {name: np.mean((of - y) ** 2) / y.var() for name, of in of_candidates.items()}
    for name, loss in losses.items():
        assert fitted.cv_losses_[name] == pytest.approx(loss, rel=1e-5)
    assert fitted.chosen_ == min(losses, key=lambda name: losses[name])
    weights = {"other alone": 1.0, "line alone": 0.0, "mean": best_weight(np.arange(len(y)))}
    weight = weights[fitted.chosen_]
    expected = weight * whole[0] + (1 - weight) * whole[1]
    np.testing.assert_allclose(fitted.predict(X), expected, atol=1e-5)


def test_a_gate_over_experts_of_all_rows_is_taken_where_it_clearly_wins() -> None:
    source = np.random.default_rng(8)
    X = source.uniform(-1, 1, (300, 2))
    y = np.where(X[:, 0] > 0, 4 * X[:, 1], 0.0) + 0.1 * source.normal(size=300)
    experts = [("slope", Sloped(4.0)), ("zero", Sloped(0.0))]
    fitted = MixtureOfExpertsRegressor(experts, random_state=0).fit(X, y)
    assert fitted.chosen_ == "stacked"
    is_slope = fitted.responsibilities(X)[:, 0] > 0.5
    assert np.mean(is_slope == (X[:, 0] > 0)) > 0.97


class Sloped(RegressorMixin, BaseEstimator):
    """Predicts a multiple of the second feature, whatever its rows are."""

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: Any = None) -> Any:
        self.is_fitted_ = True
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        return self.slope * X[:, 1]


def test_the_loss_of_a_classification_is_that_of_its_probabilities() -> None:
    data = Data(np.zeros((2, 1)), np.array([0, 2]), np.ones(2), np.array(["a", "b", "c"]))
    outputs = np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]])
    np.testing.assert_allclose(losses_of(outputs, data), [0.09 + 0.04 + 0.01, 0.25 + 0.25 + 1])


def test_the_weights_of_least_squares_are_those_of_a_general_solver() -> None:
    source = np.random.default_rng(1)
    of_experts = source.normal(size=(50, 3, 2)) * [[[1.0], [2.0], [0.8]]]
    errors = of_experts + source.normal(size=(50, 1, 2))
    weights = source.uniform(size=50)
    result = minimize(
        lambda w: weights @ (np.einsum("e,new->nw", w, errors) ** 2).sum(axis=1),
        np.full(3, 1 / 3), bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, tol=1e-12,
    )  # fmt: skip
    np.testing.assert_allclose(least_squares_weights(errors, weights), result.x, atol=1e-4)
    np.testing.assert_allclose(least_squares_weights(0 * errors, weights), 1 / 3)


def test_copies_of_a_row_share_a_fold() -> None:
    X, y = two_pieces(2, 20)
    again = np.repeat(np.arange(20), 3)
    for train, test in folds_of(X[again], y[again, None], 5, False, 0):
        assert not set(again[train]) & set(again[test])


def test_neighbouring_folds_are_merged_into_fewer() -> None:
    X, y = two_pieces(3, 50)
    folds = folds_of(X, y[:, None], 10, False, 0)
    few = merged(folds, 4)
    assert [len(test) for _, test in few] == [15, 15, 10, 10]
    for train, test in few:
        assert sorted([*train, *test]) == list(range(50))
    assert np.array_equal(few[0][1], np.sort(np.concatenate([test for _, test in folds[:3]])))
    for (train, test), fold in zip(merged(folds[:3], 4), folds[:3], strict=True):
        assert np.array_equal(train, fold[0])
        assert np.array_equal(test, fold[1])


def test_a_class_of_fewer_rows_than_folds_is_allowed_and_fewer_folds_are_a_warning() -> None:
    X, y = two_rules(3, 60)
    y = y.astype("U8")
    y[0] = "rare"
    experts = [KNeighborsClassifier(3)] * 2
    fitted = MixtureOfExpertsClassifier(experts, n_init=1, max_iter=3, random_state=0).fit(X, y)
    assert fitted.predict_proba(X).shape == (60, 3)
    with pytest.warns(UserWarning, match="cv=10: 3 folds instead"):
        MixtureOfExpertsRegressor([Ridge()]).fit(X[:3], [1.0, 2.0, 4.0])


def test_given_folds_count_rows_of_weight_zero_and_must_be_whole() -> None:
    X, y = two_pieces(4, 40)
    weights = np.ones(40)
    weights[::4] = 0
    quick: dict[str, Any] = {"n_init": 1, "max_iter": 3, "random_state": 0}
    fitted = MixtureOfExpertsRegressor(cv=KFold(4), **quick).fit(X, y, weights)
    assert fitted.n_samples_fit_ == 30
    with pytest.raises(ValueError, match="each row into one"):
        given_folds([(np.arange(20), np.arange(20, 40))], X, y, np.arange(40))
    with pytest.raises(ValueError, match="both parts"):
        given_folds([(np.arange(30), np.arange(20, 40))], X, y, np.arange(40))
    with pytest.raises(ValueError, match="'cv' parameter"):
        MixtureOfExpertsRegressor(cv=1).fit(X, y)


def test_a_warm_start_with_folds_begins_with_the_gate() -> None:
    X, y = two_pieces(5)
    fitted = MixtureOfExpertsRegressor(cv=4, n_init=2, random_state=0, warm_start=True).fit(X, y)
    before = fitted.score(X, y)
    assert fitted.fit(X, y).score(X, y) > before - 0.01
