"""Experts of scikit-learn: the estimators' own predictions, and their classes in the mixture's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from joblib import parallel_config
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    BaggingClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingRegressor,
    VotingClassifier,
)
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, Matern, WhiteKernel
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, TweedieRegressor
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputClassifier, MultiOutputRegressor
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, SplineTransformer, StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from skops.io import dumps

from cluster.errors import CheckpointError, ExpertFailedError
from tests.unit.experts.backends.folders import RTOL, lone_expert, predicted, sklearn_expert

COUNTS = (0, 1, 2, 33, 90)
F = 5
ROWS = np.abs(np.random.default_rng(0).normal(size=(90, F)))
TARGETS = ROWS @ np.arange(1, F + 1) + 0.1 * np.random.default_rng(1).normal(size=90)
CLASSES = np.digitize(TARGETS, np.quantile(TARGETS, [0.4, 0.7]))  # 0, 1, 2
VALUE = {"kind": "mean", "shape": [1]}
VOTE = {"kind": "vote", "classes": [0, 1, 2]}
PROBABILITIES = {"kind": "probabilities", "classes": [0, 1, 2]}

REGRESSORS: dict[str, Any] = {
    "SVR": SVR(),
    "Ridge": Ridge(),
    "Tweedie": TweedieRegressor(power=1.5, link="log"),
    "tree": DecisionTreeRegressor(random_state=0),
    "forest": RandomForestRegressor(10, random_state=0, n_jobs=2),
    "gradient boosting": GradientBoostingRegressor(n_estimators=10, random_state=0),
    "histogram boosting": HistGradientBoostingRegressor(max_iter=10, categorical_features=[4]),
    "k-NN": KNeighborsRegressor(n_jobs=2),
    "k-NN, ball tree": KNeighborsRegressor(algorithm="ball_tree", metric="minkowski", p=3),
    "k-NN, brute force": KNeighborsRegressor(algorithm="brute", weights="distance"),
    "MLP": MLPRegressor(hidden_layer_sizes=(8,), max_iter=50, random_state=0),
    "Gaussian process": GaussianProcessRegressor(Matern() + WhiteKernel()),
    "isolation forest": IsolationForest(n_estimators=5, max_features=3, random_state=0),
    "pipeline": make_pipeline(StandardScaler(copy=False), PCA(3), SVR()),
    "stack": StackingRegressor([("a", Ridge()), ("b", DecisionTreeRegressor(max_depth=2))]),
    "target": TransformedTargetRegressor(Ridge(), func=np.log1p, inverse_func=np.expm1),
    "columns": make_pipeline(
        ColumnTransformer(
            [
                ("scaled", make_pipeline(SimpleImputer(), StandardScaler()), [0, 1]),
                ("category", OneHotEncoder(handle_unknown="ignore"), slice(4, 5)),
            ],
            remainder="passthrough",
        ),
        Ridge(),
    ),
    "spline": make_pipeline(SplineTransformer(extrapolation="linear"), Ridge()),
}
CLASSIFIERS: dict[str, Any] = {
    "SVC": SVC(),
    "LinearSVC": LinearSVC(random_state=0),
    "tree": DecisionTreeClassifier(random_state=0),
    "forest": RandomForestClassifier(10, random_state=0, n_jobs=-1),
    "gradient boosting": GradientBoostingClassifier(n_estimators=5, random_state=0),
    "histogram boosting": HistGradientBoostingClassifier(max_iter=5, categorical_features=[4]),
    "bagging": BaggingClassifier(n_estimators=5, max_features=3, random_state=0, n_jobs=2),
    "k-NN": KNeighborsClassifier(),
    "MLP": MLPClassifier(hidden_layer_sizes=(8,), max_iter=50, random_state=0),
    "Gaussian process": GaussianProcessClassifier(1.0 * RBF()),
    "naive Bayes": GaussianNB(),
    "calibrated": CalibratedClassifierCV(LinearSVC(random_state=0), cv=2),
    "voting": VotingClassifier([("a", GaussianNB()), ("b", LogisticRegression())], voting="soft"),
    "search": GridSearchCV(LogisticRegression(), {"C": [0.1, 1.0]}, cv=2),
}


@pytest.fixture(autouse=True)
def _no_processes_of_joblib() -> Iterator[None]:
    """Let the library's own `n_jobs` be threads: its processes take seconds to start."""
    with parallel_config("threading"):
        yield


def fitted(estimator: Any, targets: np.ndarray) -> Any:
    rows = ROWS.copy()
    rows[:, 4] = np.arange(len(rows)) % 4
    return clone(estimator).fit(rows, targets)


@functools.cache
def known(name: str) -> Any:
    kind, _, name = name.partition(": ")
    if kind == "regressor":
        return fitted(REGRESSORS[name], TARGETS)
    return fitted(CLASSIFIERS[name], CLASSES)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "name", [*(f"regressor: {n}" for n in REGRESSORS), *(f"classifier: {n}" for n in CLASSIFIERS)]
)
def test_estimators_predict_as_the_library_does(tmp_path: Path, name: str, dtype: str) -> None:
    estimator, rows = known(name), ROWS.astype(dtype)
    combines = {"predict": VALUE if name.startswith("regressor") else VOTE}
    if hasattr(estimator, "predict_proba"):
        combines["predict_proba"] = PROBABILITIES
    for method, combine in combines.items():
        expert = sklearn_expert(tmp_path, estimator, method, combine, dtype)
        for count in COUNTS:
            given = rows[:count].copy()
            ours = predicted(expert, given)
            np.testing.assert_array_equal(given, rows[:count])  # nothing writes into the rows
            assert ours.shape == (count, 1 if combine is VALUE else 3)
            own = getattr(estimator, method)(given) if count else np.empty((0, 3))
            if count and combine is VALUE:
                np.testing.assert_allclose(ours[:, 0], own, rtol=RTOL[dtype])
            elif count and combine is VOTE:
                np.testing.assert_array_equal(ours, np.eye(3)[own])
            else:
                np.testing.assert_allclose(ours, own.reshape(ours.shape), RTOL[dtype], RTOL[dtype])


def test_no_estimator_starts_processes_of_its_own(tmp_path: Path) -> None:
    bagging = fitted(BaggingClassifier(RandomForestClassifier(3, n_jobs=4), 2, n_jobs=4), CLASSES)
    expert = sklearn_expert(tmp_path, bagging, "predict", VOTE)
    model: Any = expert._model
    loaded = model._method.__self__
    members = [loaded, loaded.estimator, *loaded.estimators_]
    assert [member.n_jobs for member in members] == [None] * 4


@pytest.mark.parametrize(
    ("estimator", "targets", "method", "width"),
    [
        (LinearRegression(), np.stack([TARGETS, -TARGETS], 1), "predict", 2),
        (MultiOutputRegressor(SVR(), n_jobs=2), np.stack([TARGETS, -TARGETS], 1), "predict", 2),
        (LogisticRegression(), CLASSES == 2, "decision_function", 1),
        (SVC(), CLASSES, "decision_function", 3),
        (GaussianNB(), CLASSES, "predict_proba", 3),
    ],
)
def test_several_outputs_and_results_of_other_methods_may_be_a_value(
    tmp_path: Path, estimator: Any, targets: np.ndarray, method: str, width: int
) -> None:
    estimator = clone(estimator).fit(ROWS, targets)
    expert = sklearn_expert(tmp_path, estimator, method, {"kind": "mean", "shape": [width]})
    own = getattr(estimator, method)(ROWS[:7]).reshape(7, width)
    np.testing.assert_allclose(predicted(expert, ROWS[:7]), own, rtol=1e-12)


# The classes of an expert among those of the mixture.


def test_classes_are_put_in_the_mixtures_order_and_others_get_0(tmp_path: Path) -> None:
    names = np.array(["low", "mid", "high"])
    estimator = LogisticRegression().fit(ROWS, names[CLASSES])  # its classes are sorted
    combine = {"kind": "probabilities", "classes": ["none", "low", "mid", "high"]}
    ours = predicted(sklearn_expert(tmp_path, estimator, "predict_proba", combine), ROWS)
    own = estimator.predict_proba(ROWS)
    places = [list(estimator.classes_).index(name) for name in names]
    np.testing.assert_allclose(ours[:, 1:], own[:, places], rtol=1e-12)
    assert not ours[:, 0].any()
    votes = predicted(
        sklearn_expert(tmp_path, estimator, "predict", {**combine, "kind": "vote"}), ROWS
    )
    assert [combine["classes"][i] for i in votes.argmax(1)] == estimator.predict(ROWS).tolist()


@pytest.mark.parametrize("labels", [np.array([0.0, 1.0, 2.0]), np.array([0, 1, 2], object)])
def test_equal_labels_of_another_type_are_the_same_class(
    tmp_path: Path, labels: np.ndarray
) -> None:
    estimator = GaussianNB().fit(ROWS, CLASSES)
    estimator.classes_ = labels
    votes = predicted(sklearn_expert(tmp_path, estimator, "predict", VOTE), ROWS)
    np.testing.assert_array_equal(votes.argmax(1), estimator.predict(ROWS).astype(int))


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("estimator", [SVC(), LogisticRegression(), LinearSVC(), GaussianNB()])
def test_a_decision_function_votes_for_the_predicted_class_and_probabilities_as_they_are(
    tmp_path: Path, estimator: Any, num_classes: int
) -> None:
    labels = np.array([2, 0, 1])[CLASSES] if num_classes == 3 else np.where(CLASSES > 1, 0, 2)
    estimator = clone(estimator).fit(ROWS, labels)
    if isinstance(estimator, GaussianNB):
        votes = predicted(sklearn_expert(tmp_path, estimator, "predict_proba", VOTE), ROWS)
        right = estimator.predict_proba(ROWS)
        np.testing.assert_allclose(votes[:, estimator.classes_], right, rtol=1e-12)
    else:
        votes = predicted(sklearn_expert(tmp_path, estimator, "decision_function", VOTE), ROWS)
        np.testing.assert_array_equal(votes, np.eye(3)[estimator.predict(ROWS)])


SEVERAL = np.stack([CLASSES, CLASSES == 1], 1)


@pytest.mark.parametrize(
    ("estimator", "targets", "method", "combine", "words"),
    [
        (GaussianNB(), CLASSES + 1, "predict", VOTE, "has the class 3, which combine.classes"),
        (GaussianNB(), CLASSES.astype(str), "predict", VOTE, "has the class '0', which"),
        (Ridge(), TARGETS, "predict", VOTE, "Ridge has no classes_"),
        (KMeans(2, n_init=1), None, "predict", VOTE, "KMeans has no classes_"),
        (SVC(), CLASSES, "predict_proba", PROBABILITIES, "SVC has no predict_proba"),
        (MultiOutputClassifier(GaussianNB()), SEVERAL, "predict_proba", PROBABILITIES,
         "has several outputs"),
    ],
)  # fmt: skip
def test_estimators_that_do_not_fit_are_refused(
    tmp_path: Path, estimator: Any, targets: Any, method: str, combine: Any, words: str
) -> None:
    estimator = clone(estimator).fit(ROWS, targets)
    with pytest.raises(CheckpointError, match=words) as caught:
        sklearn_expert(tmp_path, estimator, method, combine)
    assert caught.value.field.startswith(f"{tmp_path / 'e.skops'}: experts.e")
    part, files = {"kind": "sklearn", "file": "e.skops"}, {"e.skops": dumps(estimator)}
    with pytest.raises(CheckpointError, match="takes 5 features, but the mixture's rows have 6"):
        lone_expert(tmp_path, part, files, [2, 3], VALUE)


# Errors of an expert while it computes.


def test_an_error_of_the_library_fails_the_rows_and_names_the_expert(tmp_path: Path) -> None:
    encoder = make_pipeline(OneHotEncoder(), Ridge()).fit(np.eye(F), np.arange(F))
    expert = sklearn_expert(tmp_path, encoder, "predict", VALUE)
    with pytest.raises(ExpertFailedError, match="ValueError: Found unknown categories") as caught:
        predicted(expert, ROWS[:2])
    assert caught.value.field == "e"
    assert caught.value.message.isprintable()
    assert len(caught.value.message) <= 301
    own = encoder.predict(np.eye(F))
    np.testing.assert_allclose(predicted(expert, np.eye(F))[:, 0], own, rtol=1e-12)


@pytest.mark.parametrize(
    ("estimator", "targets", "method", "combine", "words"),
    [
        (Ridge(), CLASSES, "predict", {"kind": "mean", "shape": [2]},
         r"shape \[4, 1\] for 4 rows, not \[4,"),
        (SVC(), CLASSES, "decision_function", VALUE, r"the shape \[4, 3\] for 4 rows"),
        (SVC(decision_function_shape="ovo"), np.arange(90) % 4, "decision_function",
         {"kind": "vote", "classes": [0, 1, 2, 3]},
         r"returns \[4, 6\] for 4 classes; .* needs decision_function_shape"),
        (GaussianNB(), CLASSES.astype(str), "predict", VALUE, "values of dtype <U1"),
        (MultiOutputClassifier(GaussianNB()), SEVERAL, "predict_proba",
         {"kind": "mean", "shape": [3]}, "predict_proba returns 2 arrays"),
    ],
)  # fmt: skip
def test_outputs_of_another_shape_or_dtype_fail_the_rows(
    tmp_path: Path, estimator: Any, targets: Any, method: str, combine: Any, words: str
) -> None:
    expert = sklearn_expert(tmp_path, clone(estimator).fit(ROWS, targets), method, combine)
    with pytest.raises(ExpertFailedError, match=words):
        predicted(expert, ROWS[:4])
