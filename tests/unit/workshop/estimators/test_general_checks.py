"""Experts, gates, folds and data that a mixture of given experts cannot take, or only just."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import HistGradientBoostingRegressor, StackingRegressor
from sklearn.exceptions import FitFailedWarning
from sklearn.linear_model import LinearRegression, Ridge, RidgeClassifier
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    LeaveOneOut,
    PredefinedSplit,
    RepeatedKFold,
    ShuffleSplit,
    StratifiedKFold,
)
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeRegressor

from cluster.errors import CheckpointError
from tests.unit.workshop.estimators.adaptive_data import two_pieces, two_rules
from workshop.estimators.estimators import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor
from workshop.estimators.general.fits import MAX_RARE, Data, Expert, FitFailedError, fitted_part

ROWS, VALUES = two_pieces(0, 40)
LABELS = two_rules(0, 40)[1]
QUICK: dict[str, Any] = {"n_init": 1, "max_iter": 4, "random_state": 0}
PAIR = [("line", LinearRegression()), ("tree", DecisionTreeRegressor(max_depth=2))]
FOLDS = np.arange(40) % 4


class Constant(RegressorMixin, BaseEstimator):
    """Predicts what it is given."""

    def __init__(self, outputs: Any = 0.0) -> None:
        self.outputs = outputs

    def fit(self, X: np.ndarray, y: np.ndarray) -> Constant:
        return self

    def predict(self, X: np.ndarray) -> Any:
        return np.full((len(X), *np.shape(self.outputs)), self.outputs)


class Shares(ClassifierMixin, BaseEstimator):
    """Has the classes and the probabilities that it is given."""

    def __init__(self, classes: tuple[str, ...], shares: tuple[float, ...]) -> None:
        self.classes = classes
        self.shares = shares

    def fit(self, X: np.ndarray, y: np.ndarray) -> Shares:
        self.classes_ = np.array(self.classes)
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return np.tile(self.shares, (len(X), 1))


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (Constant((0.0, 1.0)), r"'constant' \(Constant\) predicts the shape \[4, 2\]"),
        (Constant(np.inf), "not finite, or too large"),
        (Constant(1e300), "not finite, or too large"),
        (Constant("a"), "'constant'.*cannot predict: ValueError"),
        (SVR(), "'svr'.*1d array"),
    ],
)
def test_a_regressor_of_wrong_predictions_is_named(expert: Any, message: str) -> None:
    values = np.column_stack([VALUES, VALUES]) if isinstance(expert, SVR) else VALUES
    with pytest.raises(FitFailedError, match=message):
        MixtureOfExpertsRegressor([expert, Ridge()]).fit(ROWS, values)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_later_fit_without_folds_keeps_no_choice_of_an_earlier_one() -> None:
    fitted = MixtureOfExpertsRegressor(PAIR, cv=3, **QUICK).fit(ROWS, VALUES)
    assert fitted.chosen_ in fitted.cv_losses_
    fitted.set_params(cv=None).fit(ROWS, VALUES)
    assert not {"cv_losses_", "chosen_"} & set(vars(fitted))


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (Shares(("other", "same"), (-1.0, 2.0)), "negative or do not add up to 1"),
        (Shares(("other", "same"), (0.5, 0.6)), "negative or do not add up to 1"),
        (Shares(("other", "some"), (0.5, 0.5)), "its classes_ are .*not those of its rows"),
        (Shares(("other", "same", "zero"), (0.5, 0.5, 0.0)), "not those of its rows"),
    ],
)
def test_a_classifier_of_wrong_probabilities_is_named(expert: Any, message: str) -> None:
    with pytest.raises(FitFailedError, match=message):
        MixtureOfExpertsClassifier([expert, GaussianNB()]).fit(ROWS, LABELS)


@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        (ROWS[:, :, None], VALUES, "dim 3"),
        (ROWS[:1], VALUES[:1], "n_samples=1 should be at least the number of experts"),
        (ROWS * 1e200, VALUES, r"X has values above 1e\+100"),
        (ROWS, VALUES * 1e200, r"y has values above 1e\+100"),
    ],
)
def test_rows_and_targets_that_no_mixture_takes(rows: Any, values: Any, message: str) -> None:
    """Others are refused by scikit-learn's own checks."""
    experts = [HistGradientBoostingRegressor(), HistGradientBoostingRegressor()]
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsRegressor(experts).fit(rows, values)


@pytest.mark.filterwarnings("ignore:The number of unique classes:UserWarning")
def test_labels_that_are_all_different_are_refused() -> None:
    with pytest.raises(ValueError, match="two folds need at least two different rows of one class"):
        MixtureOfExpertsClassifier().fit(ROWS, list(map(str, range(40))))


def test_tables_and_labels_of_any_kind_are_taken() -> None:
    table = pd.DataFrame(ROWS, columns=["u", "v"])
    kinds = (pd.Series(LABELS, dtype="category"), LABELS.astype(object), LABELS == "same")
    for labels in kinds:
        fitted = MixtureOfExpertsClassifier([GaussianNB()]).fit(table, labels)
        assert fitted.feature_names_in_.tolist() == ["u", "v"]
        assert set(fitted.predict(table)) <= set(labels)
        with pytest.raises(ValueError, match="feature names"):
            fitted.predict(table[["v", "u"]])


@pytest.mark.parametrize(
    ("gate", "num_experts", "message"),
    [
        (SVC(kernel="linear"), 3, "SVC does not decide by its coefficients"),
        (SVC(), 2, "SVC is neither linear nor an MLP"),
        (SVC, 2, "gate must be"),
    ],
)
def test_a_gate_that_is_no_layer_is_refused(gate: Any, num_experts: int, message: str) -> None:
    mixture = MixtureOfExpertsRegressor([Ridge() for _ in range(num_experts)], gate=gate, cv=None)
    with pytest.raises(ValueError, match=message):
        mixture.fit(ROWS, VALUES)


@pytest.mark.parametrize(
    ("gate", "least"), [(RidgeClassifier(), 0.25), (SVC(kernel="linear"), 0.8)]
)
def test_a_gate_of_one_score_is_a_layer(gate: Any, least: float) -> None:
    fitted = MixtureOfExpertsRegressor(gate=gate, cv=None, random_state=0).fit(ROWS, VALUES)
    assert fitted.score(ROWS, VALUES) > least


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_an_expert_that_refuses_a_rare_class_is_fitted_without_it() -> None:
    labels = LABELS.astype("U8")
    labels[:3] = "rare"
    calibrated = CalibratedClassifierCV(SVC(), cv=5)
    mixture = MixtureOfExpertsClassifier([calibrated, GaussianNB()], cv=3, **QUICK)
    with pytest.warns(FitFailedWarning, match=r"so few rows of \['rare'\].*fitted without them"):
        fitted = mixture.fit(ROWS, labels)
    places = [part.class_places.tolist() for part in fitted.mixture_.experts.values()]
    assert places == [[0, 2], [0, 1, 2]]
    np.testing.assert_allclose(fitted.predict_proba(ROWS).sum(axis=1), 1)


@pytest.mark.parametrize("num_rare", [MAX_RARE, MAX_RARE + 1])
def test_an_expert_may_refuse_a_class_of_few_rows_alone(num_rare: int) -> None:
    numbers = np.repeat([0, 1], [40 - num_rare, num_rare])
    numbers[:14] = 2
    data = Data(ROWS, numbers, np.ones(40), np.array(["a", "b", "c"]))
    expert = Expert("calibrated", CalibratedClassifierCV(SVC(), cv=12))
    if num_rare <= MAX_RARE:
        assert fitted_part(expert, data, np.ones(40)).class_places.tolist() == [0, 2]
    else:
        with pytest.raises(FitFailedError, match="cannot be fitted to 40 of 40 rows"):
            fitted_part(expert, data, np.ones(40))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_an_expert_whose_method_appears_when_fitted_is_taken() -> None:
    stack = StackingRegressor([("ridge", Ridge())], cv=2)
    fitted = MixtureOfExpertsRegressor([stack, Ridge()], cv=2, **QUICK)
    assert np.isfinite(fitted.fit(ROWS, VALUES).predict(ROWS)).all()


def test_an_expert_may_change_its_rows_and_warn() -> None:
    class Greedy(LinearRegression):
        def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: Any = None) -> Any:
            warnings.warn("greedy", UserWarning, stacklevel=1)
            fitted = super().fit(X, y, sample_weight)
            X[:], y[:] = 0, 0
            return fitted

    rows, values = ROWS.copy(), VALUES.copy()
    with pytest.warns(UserWarning, match="greedy"):
        fitted = MixtureOfExpertsRegressor([Greedy()]).fit(rows, values)
    np.testing.assert_array_equal(rows, ROWS)
    np.testing.assert_array_equal(values, VALUES)
    alone = LinearRegression().fit(ROWS, VALUES)
    np.testing.assert_allclose(fitted.predict(ROWS), alone.predict(ROWS))


@pytest.mark.parametrize(
    ("cv", "message"),
    [
        (ShuffleSplit(3), "each row into one of at least two folds"),
        (RepeatedKFold(), "each row into one of at least two folds"),
        (GroupKFold(3), "groups"),
        ([(np.arange(20), np.arange(20, 60)), (np.arange(20, 40), np.arange(20))], "0 to 39"),
        ([(FOLDS[:30] > 0, FOLDS[:30] == 0)], "mask of 30 rows; there are 40"),
    ],
)
def test_folds_that_do_not_divide_the_rows_are_refused(cv: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsRegressor([Ridge()], cv=cv).fit(ROWS, VALUES)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_masks_and_numbers_are_the_same_folds_and_one_weight_is_that_of_all_rows() -> None:
    numbers = list(PredefinedSplit(FOLDS).split())
    masks = [(fold != FOLDS, fold == FOLDS) for fold in range(4)]
    weights = np.where(np.arange(40) < 8, 0.0, 2.0)
    losses = [
        MixtureOfExpertsRegressor(PAIR, cv=cv, **QUICK).fit(ROWS, VALUES, sample_weight).cv_losses_
        for sample_weight in (weights, None, 3.0)
        for cv in (numbers, masks)
    ]
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]
    for name in ("mean", "line alone", "tree alone"):  # a weight counts against the gate's ridge
        assert losses[4][name] == pytest.approx(losses[2][name])
    assert losses[0] != losses[2]


@pytest.mark.parametrize(
    "cv",
    [
        KFold(4, shuffle=True, random_state=3),
        StratifiedKFold(3),
        LeaveOneOut(),
        PredefinedSplit(FOLDS),
    ],
)
def test_a_splitter_is_saved_by_its_parameters(cv: Any, tmp_path: Path) -> None:
    fitted = MixtureOfExpertsRegressor([Ridge()], cv=4).fit(ROWS, VALUES)
    fitted.set_params(cv=cv).save(tmp_path / "m")
    loaded = MixtureOfExpertsRegressor.load(tmp_path / "m").cv
    assert type(loaded) is type(cv)
    labels = FOLDS % 2
    for mine, other in zip(loaded.split(ROWS, labels), cv.split(ROWS, labels), strict=True):
        np.testing.assert_array_equal(mine[1], other[1])


def test_another_splitter_is_not_saved(tmp_path: Path) -> None:
    fitted = MixtureOfExpertsRegressor([Ridge()], cv=4).fit(ROWS, VALUES)
    with pytest.raises(CheckpointError, match=r"GroupKFold cannot be saved.*StratifiedKFold"):
        fitted.set_params(cv=GroupKFold(4)).save(tmp_path / "m")
    state = KFold(4, shuffle=True, random_state=np.random.RandomState(0))
    with pytest.raises(CheckpointError, match="RandomState cannot be saved"):
        fitted.set_params(cv=state).save(tmp_path / "m")
