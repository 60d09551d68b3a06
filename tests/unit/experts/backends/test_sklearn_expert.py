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
    AdaBoostRegressor,
    BaggingClassifier,
    ExtraTreesRegressor,
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
from sklearn.feature_selection import SelectKBest
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, Matern, WhiteKernel
from sklearn.impute import SimpleImputer
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    Ridge,
    SGDClassifier,
    TweedieRegressor,
)
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputClassifier, MultiOutputRegressor
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor, RadiusNeighborsRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    SplineTransformer,
    StandardScaler,
)
from sklearn.svm import SVC, SVR, LinearSVC, NuSVR
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
    "NuSVR": NuSVR(kernel="linear"),
    "LinearRegression": LinearRegression(),
    "Ridge": Ridge(),
    "Tweedie": TweedieRegressor(power=1.5, link="log"),
    "tree": DecisionTreeRegressor(random_state=0),
    "forest": RandomForestRegressor(10, random_state=0, n_jobs=2),
    "extra trees": ExtraTreesRegressor(10, random_state=0),
    "gradient boosting": GradientBoostingRegressor(n_estimators=10, random_state=0),
    "histogram boosting": HistGradientBoostingRegressor(max_iter=10, categorical_features=[4]),
    "AdaBoost": AdaBoostRegressor(n_estimators=5, random_state=0),
    "k-NN": KNeighborsRegressor(n_jobs=2),
    "k-NN, ball tree": KNeighborsRegressor(algorithm="ball_tree", metric="minkowski", p=3),
    "k-NN, brute force": KNeighborsRegressor(algorithm="brute", weights="distance"),
    "radius": RadiusNeighborsRegressor(radius=3.0),
    "MLP": MLPRegressor(hidden_layer_sizes=(8,), max_iter=50, random_state=0),
    "Gaussian process": GaussianProcessRegressor(Matern() + WhiteKernel()),
    "isolation forest": IsolationForest(n_estimators=5, max_features=3, random_state=0),
    "pipeline": make_pipeline(StandardScaler(copy=False), PCA(3), SVR()),
    "stack": StackingRegressor([("a", Ridge()), ("b", DecisionTreeRegressor(max_depth=2))]),
    "logarithm": make_pipeline(FunctionTransformer(np.log1p), LinearRegression()),
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
    "LogisticRegression": LogisticRegression(),
    "SGD": SGDClassifier(loss="log_loss", random_state=0),
    "tree": DecisionTreeClassifier(random_state=0),
    "forest": RandomForestClassifier(10, random_state=0, n_jobs=-1),
    "gradient boosting": GradientBoostingClassifier(n_estimators=5, random_state=0),
    "histogram boosting": HistGradientBoostingClassifier(max_iter=5, categorical_features=[4]),
    "bagging": BaggingClassifier(n_estimators=5, max_features=3, random_state=0, n_jobs=2),
    "k-NN": KNeighborsClassifier(),
    "k-NN, brute force": KNeighborsClassifier(algorithm="brute"),
    "MLP": MLPClassifier(hidden_layer_sizes=(8,), max_iter=50, random_state=0),
    "Gaussian process": GaussianProcessClassifier(1.0 * RBF()),
    "naive Bayes": GaussianNB(),
    "calibrated": CalibratedClassifierCV(LinearSVC(random_state=0), cv=2),
    "voting": VotingClassifier([("a", GaussianNB()), ("b", LogisticRegression())], voting="soft"),
    "search": GridSearchCV(LogisticRegression(), {"C": [0.1, 1.0]}, cv=2),
    "pipeline": make_pipeline(StandardScaler(), SelectKBest(k=3), LogisticRegression()),
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


def rows_as(dtype: str) -> np.ndarray:
    return ROWS.astype(dtype)


@functools.cache
def regressor(name: str) -> Any:
    return fitted(REGRESSORS[name], TARGETS)


@functools.cache
def classifier(name: str) -> Any:
    return fitted(CLASSIFIERS[name], CLASSES)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", REGRESSORS)
def test_regressors_predict_as_the_library_does(tmp_path: Path, name: str, dtype: str) -> None:
    estimator = regressor(name)
    expert = sklearn_expert(tmp_path, estimator, "predict", VALUE, dtype)
    rows = rows_as(dtype)
    for count in COUNTS:
        ours = predicted(expert, rows[:count])
        assert ours.shape == (count, 1)
        if count:
            own = estimator.predict(rows[:count].copy())
            np.testing.assert_allclose(ours[:, 0], own, rtol=RTOL[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_predict_as_the_library_does(tmp_path: Path, name: str, dtype: str) -> None:
    estimator = classifier(name)
    rows = rows_as(dtype)
    combines = {"predict": VOTE}
    if hasattr(estimator, "predict_proba"):
        combines["predict_proba"] = PROBABILITIES
    for method, combine in combines.items():
        expert = sklearn_expert(tmp_path, estimator, method, combine, dtype)
        for count in COUNTS:
            ours = predicted(expert, rows[:count])
            assert ours.shape == (count, 3)
            if count and method == "predict":
                np.testing.assert_array_equal(ours, np.eye(3)[estimator.predict(rows[:count])])
            elif count:
                own = estimator.predict_proba(rows[:count])
                np.testing.assert_allclose(ours, own, rtol=RTOL[dtype], atol=RTOL[dtype])


def test_a_pipeline_does_not_write_into_the_rows(tmp_path: Path) -> None:
    estimator = make_pipeline(StandardScaler(copy=False), Ridge()).fit(ROWS.copy(), TARGETS)
    expert = sklearn_expert(tmp_path, estimator, "predict", VALUE)
    rows = ROWS[:4].copy()
    predicted(expert, rows)
    np.testing.assert_array_equal(rows, ROWS[:4])


def test_no_estimator_starts_processes_of_its_own(tmp_path: Path) -> None:
    bagging = fitted(BaggingClassifier(RandomForestClassifier(3, n_jobs=4), 2, n_jobs=4), CLASSES)
    expert = sklearn_expert(tmp_path, bagging, "predict", VOTE)
    model: Any = expert._model
    loaded = model._method.__self__
    members = [loaded, loaded.estimator, *loaded.estimators_]
    assert [member.n_jobs for member in members] == [None] * 4


def test_several_outputs_of_a_regressor_are_the_value(tmp_path: Path) -> None:
    targets = np.stack([TARGETS, -TARGETS], 1)
    for estimator in (LinearRegression(), MultiOutputRegressor(SVR(), n_jobs=2)):
        estimator.fit(ROWS, targets)
        expert = sklearn_expert(tmp_path, estimator, "predict", {"kind": "mean", "shape": [2]})
        np.testing.assert_allclose(
            predicted(expert, ROWS[:7]), estimator.predict(ROWS[:7]), rtol=1e-12
        )


def test_decision_function_and_probabilities_may_be_a_value(tmp_path: Path) -> None:
    binary = LogisticRegression().fit(ROWS, CLASSES == 2)
    expert = sklearn_expert(tmp_path, binary, "decision_function", VALUE)
    own = binary.decision_function(ROWS)
    np.testing.assert_allclose(predicted(expert, ROWS)[:, 0], own, rtol=1e-12)
    svc = SVC().fit(ROWS, CLASSES)
    expert = sklearn_expert(tmp_path, svc, "decision_function", {"kind": "mean", "shape": [3]})
    np.testing.assert_allclose(predicted(expert, ROWS), svc.decision_function(ROWS), rtol=1e-12)


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
@pytest.mark.parametrize("estimator", [SVC(), LogisticRegression(), LinearSVC()])
def test_a_decision_function_votes_for_the_predicted_class(
    tmp_path: Path, estimator: Any, num_classes: int
) -> None:
    labels = np.array([2, 0, 1])[CLASSES] if num_classes == 3 else np.where(CLASSES > 1, 0, 2)
    estimator = clone(estimator).fit(ROWS, labels)
    votes = predicted(sklearn_expert(tmp_path, estimator, "decision_function", VOTE), ROWS)
    right = estimator.classes_[(estimator.decision_function(ROWS) > 0).astype(int)] \
        if num_classes == 2 else estimator.decision_function(ROWS).argmax(1)  # fmt: skip
    np.testing.assert_array_equal(votes, np.eye(3)[right])


def test_probabilities_vote_as_they_are(tmp_path: Path) -> None:
    estimator = GaussianNB().fit(ROWS, CLASSES)
    votes = predicted(sklearn_expert(tmp_path, estimator, "predict_proba", VOTE), ROWS)
    np.testing.assert_allclose(votes, estimator.predict_proba(ROWS), rtol=1e-12)


@pytest.mark.parametrize(
    ("estimator", "targets", "method", "combine", "words"),
    [
        (GaussianNB(), CLASSES + 1, "predict", VOTE, "has the class 3, which combine.classes"),
        (GaussianNB(), CLASSES.astype(str), "predict", VOTE, "has the class '0', which"),
        (Ridge(), TARGETS, "predict", VOTE, "Ridge has no classes_"),
        (KMeans(2, n_init=1), None, "predict", VOTE, "KMeans has no classes_"),
        (SVC(), CLASSES, "predict_proba", PROBABILITIES, "SVC has no predict_proba"),
        (
            MultiOutputClassifier(GaussianNB()),
            np.stack([CLASSES, CLASSES == 1], 1),
            "predict_proba",
            PROBABILITIES,
            "has several outputs",
        ),
    ],
)
def test_estimators_that_do_not_fit_are_refused(
    tmp_path: Path, estimator: Any, targets: Any, method: str, combine: Any, words: str
) -> None:
    estimator = clone(estimator).fit(ROWS, targets)
    with pytest.raises(CheckpointError, match=words) as caught:
        sklearn_expert(tmp_path, estimator, method, combine)
    assert caught.value.field.startswith(f"{tmp_path / 'e.skops'}: experts.e")


def test_an_estimator_of_other_features_than_the_rows_is_refused(tmp_path: Path) -> None:
    files = {"e.skops": dumps(Ridge().fit(ROWS, TARGETS))}
    part = {"kind": "sklearn", "file": "e.skops"}
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
    ("estimator", "method", "combine", "words"),
    [
        (
            Ridge(),
            "predict",
            {"kind": "mean", "shape": [2]},
            r"shape \[4, 1\] for 4 rows, not \[4,",
        ),
        (SVC(), "decision_function", VALUE, r"the shape \[4, 3\] for 4 rows"),
        (
            SVC(decision_function_shape="ovo"),
            "decision_function",
            {"kind": "vote", "classes": [0, 1, 2, 3]},
            r"returns \[4, 6\] for 4 classes; .* needs decision_function_shape",
        ),
        (GaussianNB(), "predict", {"kind": "mean", "shape": [1]}, "values of dtype <U1"),
    ],
)
def test_outputs_of_another_shape_or_dtype_fail_the_rows(
    tmp_path: Path, estimator: Any, method: str, combine: Any, words: str
) -> None:
    targets: Any = CLASSES
    if len(combine.get("classes", ())) == 4:
        targets = np.arange(90) % 4
    elif isinstance(estimator, GaussianNB):
        targets = CLASSES.astype(str)
    expert = sklearn_expert(tmp_path, clone(estimator).fit(ROWS, targets), method, combine)
    with pytest.raises(ExpertFailedError, match=words):
        predicted(expert, ROWS[:4])


def test_a_list_of_probabilities_fails_the_rows(tmp_path: Path) -> None:
    targets = np.stack([CLASSES, CLASSES == 1], 1)
    estimator = MultiOutputClassifier(GaussianNB()).fit(ROWS, targets)
    expert = sklearn_expert(tmp_path, estimator, "predict_proba", {"kind": "mean", "shape": [3]})
    with pytest.raises(ExpertFailedError, match="predict_proba returns 2 arrays"):
        predicted(expert, ROWS[:4])
