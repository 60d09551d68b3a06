"""skops files that are damaged, hostile, or of another version of scikit-learn."""

from __future__ import annotations

import functools
import io
import json
import logging
import operator
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from scipy import interpolate
from scipy.sparse import csr_matrix
from sklearn.base import BaseEstimator
from sklearn.ensemble import (
    GradientBoostingRegressor,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestRegressor,
)
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, SplineTransformer
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeRegressor
from skops.io import dumps

from cluster.errors import CheckpointError
from experts.backends import skops_file
from experts.backends.skops_arrays import check_arrays, objects_in
from experts.backends.skops_file import read_estimator

ROWS = np.random.default_rng(0).normal(size=(60, 3))
TARGETS = ROWS.sum(1)
CLASSES = np.digitize(TARGETS, [-0.5, 0.5])
WHERE = "folder/e.skops: experts.e"
Schema = dict[str, Any]


def loaded(data: bytes) -> BaseEstimator:
    return read_estimator(data, WHERE)[0]


def fit(estimator: Any, targets: np.ndarray = TARGETS) -> Any:
    return estimator.fit(ROWS, targets)


def with_schema(data: bytes, change: Callable[[Schema], object]) -> bytes:
    """Return a skops file whose schema is changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "schema.json":
                schema = json.loads(content)
                change(schema)
                content = json.dumps(schema).encode()
            new.writestr(name, content)
    return buffer.getvalue()


def attribute(name: str, node: Schema) -> Callable[[Schema], object]:
    """Return a change that sets an attribute of the estimator."""
    return lambda schema: schema["content"]["content"].__setitem__(name, node)


class Watch:
    """The file that a hostile object would write."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "ran"
        self.command = f"touch {self.file}"

    def check(self) -> None:
        assert not self.file.exists()


@pytest.fixture
def watch(tmp_path: Path) -> Any:
    watch = Watch(tmp_path)
    yield watch
    watch.check()


def python_function(rows: np.ndarray) -> np.ndarray:
    os.system("touch /tmp/never")
    return rows


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            python_function,
            "not allowed: tests.unit.experts.backends.test_skops_file",
        ),
        (os.system, "types that are not allowed: posix.system"),
        (subprocess.getoutput, "types that are not allowed: subprocess.getoutput"),
        (functools.partial(os.system, "true"), "functools.partial of no function"),
        (functools.partial(subprocess.call, ["true"]), "not allowed: subprocess.call"),
        (LinearRegression().fit, "not allowed: sklearn.linear_model._base.LinearRegression"),
        (operator.methodcaller("dump", "x"), "not allowed: operator.methodcaller"),
        (operator.attrgetter("dump"), "not allowed: operator.attrgetter"),
        (np.load, "types that are not allowed: numpy.load"),
        (np.save, "types that are not allowed: numpy.save"),
        (eval, "types that are not allowed: builtins.eval"),
    ],
)
def test_a_transformer_may_not_bring_a_function(function: Any, words: str) -> None:
    data = dumps(make_pipeline(FunctionTransformer(function), LinearRegression()))
    with pytest.raises(CheckpointError, match=words) as caught:
        loaded(data)
    assert caught.value.field == WHERE


def test_ufuncs_may_be_functions() -> None:
    import scipy.special

    for function in (np.exp, scipy.special.expit):
        estimator = loaded(dumps(FunctionTransformer(function)))
        assert estimator.func is function


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (
            {"__class__": "system", "__module__": "posix", "__loader__": "TypeNode"},
            "types that are not allowed: posix.system",
        ),
        (
            {"__class__": "Popen", "__module__": "subprocess", "__loader__": "ObjectNode"},
            "types that are not allowed: subprocess.Popen",
        ),
        (
            {"__class__": "Popen", "__module__": "subprocess",
             "__loader__": "ConstructorFromReduceNode", "content": {}},
            r"not allowed: subprocess.Popen \('ConstructorFromReduceNode'\)",
        ),
        (
            {"__class__": "Popen", "__module__": "subprocess", "__loader__": "NoNode"},
            r"not allowed: subprocess.Popen \('NoNode'\)",
        ),
        (
            {"__class__": "CyHinge", "__module__": "evil", "__loader__": "LossNode",
             "__reduce__": {"args": {"__class__": "tuple", "__module__": "builtins",
                                     "__loader__": "TupleNode", "content": []}},
             "content": {"__class__": "str", "__module__": "builtins",
                         "__loader__": "JsonNode", "content": "null"}},
            "types that are not allowed: evil.CyHinge",
        ),
    ],
)  # fmt: skip
def test_no_other_type_is_made(node: Schema, words: str) -> None:
    data = with_schema(dumps(fit(LinearRegression())), attribute("extra_", node))
    with pytest.raises(CheckpointError, match=words):
        loaded(data)


def test_items_of_object_arrays_are_checked_too() -> None:
    estimator = fit(LinearRegression())
    estimator.extra_ = np.array([1, os.getcwd], object)
    with pytest.raises(CheckpointError, match=r"not allowed: posix\.getcwd"):
        loaded(dumps(estimator))


def test_a_name_in_the_state_of_a_random_generator_is_checked() -> None:
    estimator = fit(LinearRegression())
    estimator.generator_ = np.random.default_rng(0)
    assert loaded(dumps(estimator)).generator_.random() == estimator.generator_.random()

    def rename(schema: Schema) -> None:
        state = schema["content"]["content"]["generator_"]["content"]["bit_generator"]["content"]
        state["bit_generator"]["content"] = '"set_state"'

    data = with_schema(dumps(estimator), rename)
    with pytest.raises(CheckpointError, match=r"not allowed: numpy\.random"):
        loaded(data)


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["pickle", "joblib", "npy"])
def test_pickles_are_never_opened(watch: Watch, how: str, tmp_path: Path) -> None:
    hostile = Hostile(watch.command)
    if how == "pickle":
        data = pickle.dumps(hostile)
    elif how == "joblib":
        joblib.dump(hostile, tmp_path / "j")
        data = (tmp_path / "j").read_bytes()
    else:
        array, buffer = np.empty(1, object), io.BytesIO()
        array[0] = hostile
        np.save(buffer, array)
        whole = dumps(fit(LinearRegression()))
        names = zipfile.ZipFile(io.BytesIO(whole)).namelist()
        member = next(name for name in names if name.endswith(".npy"))
        data = replaced(whole, member, buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"is not a complete skops file|cannot be loaded"):
        loaded(data)


def replaced(data: bytes, name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.namelist():
            new.writestr(member, content if member == name else old.read(member))
    return buffer.getvalue()


@pytest.mark.parametrize("count", [0, 1, 100, 2000])
def test_truncated_files_are_refused(count: int) -> None:
    whole = dumps(fit(RandomForestRegressor(3)))
    with pytest.raises(CheckpointError, match="is not a complete skops file"):
        loaded(whole[:-count] if count else b"")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("protocol"), "protocol None; must be at least 1"),
        (lambda s: s.__setitem__("protocol", 0), "protocol 0; must be at least 1"),
        (lambda s: s.__setitem__("protocol", True), "protocol True; must be at least 1"),
        (lambda s: s.__setitem__("protocol", 999), "cannot be loaded: ValueError"),
    ],
)
def test_schemas_of_another_form_are_refused(
    change: Callable[[Schema], object], words: str
) -> None:
    data = with_schema(dumps(fit(LinearRegression())), change)
    with pytest.raises(CheckpointError, match=words):
        loaded(data)


def test_a_schema_that_nests_deeply_is_refused() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    with pytest.raises(CheckpointError, match="cannot be loaded: RecursionError"):
        loaded(replaced(dumps(fit(LinearRegression())), "schema.json", deep))


def test_archives_that_unpack_to_much_more_are_refused() -> None:
    estimator = fit(LinearRegression())
    estimator.extra_ = np.zeros(10_000_000)
    data = dumps(estimator, compression=zipfile.ZIP_DEFLATED)
    assert len(data) < 200_000
    with pytest.raises(CheckpointError, match="unpacks to more than 64 times its"):
        loaded(data)


def test_an_array_that_many_objects_name_counts_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = fit(LinearRegression())
    estimator.extra_ = np.zeros(100_000)
    whole = dumps(estimator)

    def repeat(schema: Schema) -> None:
        content = schema["content"]["content"]
        for number in range(80):
            content[f"extra{number}_"] = {**content["extra_"], "__id__": number}

    with pytest.raises(CheckpointError, match="unpacks to more than 64 times its"):
        loaded(with_schema(whole, repeat))


def test_compressed_files_are_read() -> None:
    estimator = fit(RandomForestRegressor(5, random_state=0))
    data = dumps(estimator, compression=zipfile.ZIP_DEFLATED)
    read, num_bytes = read_estimator(data, WHERE)
    np.testing.assert_array_equal(read.predict(ROWS), estimator.predict(ROWS))
    assert num_bytes > len(data)


@pytest.mark.parametrize("other", [{"n": np.ones(2)}, [1, 2], np.ones(3)])
def test_anything_but_an_estimator_is_refused(other: Any) -> None:
    with pytest.raises(CheckpointError, match="not an estimator"):
        loaded(dumps(other))


def test_sparse_matrices_are_refused_by_name() -> None:
    estimator = SVR().fit(csr_matrix(ROWS), TARGETS)
    with pytest.raises(CheckpointError, match="csr_matrix"):
        loaded(dumps(estimator))


def test_another_version_of_scikit_learn_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    skops_file._warn_of_version.cache_clear()

    def age(schema: Schema) -> None:
        schema["content"]["content"]["_sklearn_version"]["content"] = '"1.2.0"'

    data = with_schema(dumps(fit(LinearRegression())), age)
    for _ in range(3):
        assert isinstance(loaded(data), LinearRegression)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "saved by scikit-learn 1.2.0 and are loaded by" in caplog.messages[0]


def test_the_same_version_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    loaded(dumps(fit(make_pipeline(LinearRegression()))))
    assert caplog.messages == []


# Splines, which versions of SciPy keep in other ways.


class _BSpline:
    def __init__(self, **state: Any) -> None:
        vars(self).update(state)


class BSpline(_BSpline):
    def __getstate__(self) -> Any:
        return vars(self).get("whole", vars(self))


def asarray(values: Any) -> Any:
    """Stand in for the function that a spline of SciPy 1.17 has."""


SCIPYS: dict[str, Callable[..., BSpline]] = {
    "1.16": BSpline,
    "1.17": lambda t, c, **rest: BSpline(_t=t, _c=c, **rest, _asarray=asarray),
    "1.18": lambda **state: BSpline(whole=(_BSpline(**state, _delegate_to=None), np.empty(0))),
}


def with_splines(make: Callable[..., Any], **changes: Any) -> tuple[bytes, np.ndarray]:
    """Return the file of a spline transformer, its splines changed, and its results before that."""
    estimator = fit(SplineTransformer())
    results = estimator.transform(ROWS)
    names = ("t", "c", "k", "extrapolate", "axis")
    estimator.bsplines_ = [
        make(**{name: getattr(spline, name) for name in names} | changes)
        for spline in estimator.bsplines_
    ]

    def rename(schema: Schema) -> None:
        for node in skops_file._nodes(schema):
            if node.get("__module__") == __name__:
                is_array_api = node["__class__"] == "asarray"
                node["__module__"] = (
                    "scipy._lib.array_api_compat.numpy._aliases"
                    if is_array_api
                    else "scipy.interpolate._bsplines"
                )

    return with_schema(dumps(estimator), rename), results


@pytest.mark.parametrize("version", SCIPYS)
def test_splines_of_every_version_of_scipy_are_read(version: str) -> None:
    data, results = with_splines(SCIPYS[version])
    estimator: Any = loaded(data)
    assert {type(spline) for spline in estimator.bsplines_} == {interpolate.BSpline}
    np.testing.assert_array_equal(estimator.transform(ROWS), results)


def test_splines_of_a_feature_that_was_constant_are_read() -> None:
    rows = np.ones((60, 3))
    estimator = SplineTransformer().fit(rows)
    read: Any = loaded(dumps(estimator))
    np.testing.assert_array_equal(read.transform(rows), estimator.transform(rows))


@pytest.mark.parametrize(
    "changes",
    [
        {"c": np.eye(3)},
        {"c": np.eye(7).astype(complex)},
        {"k": -1, "c": np.eye(11)},
        {"k": 6},
        {"k": 3.0},
        {"t": np.arange(11.0)[::-1].copy()},
        {"t": np.full(11, np.nan)},
        {"t": np.ones((11, 2))},
    ],
)
def test_a_spline_whose_arrays_do_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be loaded: (Value|Type)Error"):
        loaded(with_splines(SCIPYS["1.16"], **changes)[0])


def test_modules_are_not_objects_of_an_estimator() -> None:
    estimator = fit(LinearRegression())
    estimator.module_ = np
    assert not any(found is np for found in objects_in(estimator))


def test_another_object_in_a_splines_place_is_refused() -> None:
    data, _ = with_splines(lambda **_: BSpline(whole=(np.ones(3), np.empty(0))))
    with pytest.raises(CheckpointError, match="a spline has no knots"):
        loaded(data)


# Indices that compiled code follows: each of these would read beyond an array.


def set_tree(**fields: int) -> Callable[[Any], None]:
    def change(estimator: Any) -> None:
        trees = getattr(estimator, "estimators_", [estimator])
        tree = np.ravel(trees)[0].tree_
        state = tree.__getstate__()
        for field, value in fields.items():
            state["nodes"][field][0] = value
        tree.__setstate__(state)

    return change


def set_predictor(**fields: int) -> Callable[[Any], None]:
    def change(estimator: Any) -> None:
        for field, value in fields.items():
            estimator._predictors[0][0].nodes[field][0] = value

    return change


def set_attribute(name: str, value: Any) -> Callable[[Any], None]:
    def change(estimator: Any) -> None:
        old = getattr(estimator, name)
        setattr(estimator, name, value(old) if callable(value) else value)

    return change


def set_space_tree(place: int, change_of: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(estimator: Any) -> None:
        state = list(estimator._tree.__getstate__())
        state[place] = change_of(np.array(state[place]))
        estimator._tree.__setstate__(tuple(state))

    return change


def with_value(value: Any, field: str | None = None) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        (array if field is None else array[field])[0] = value
        return array

    return change


def shorter(array: np.ndarray) -> np.ndarray:
    return array[:-1].copy()


TREE, FOREST = DecisionTreeRegressor(), RandomForestRegressor(3)
BOOSTING, HISTOGRAM = GradientBoostingRegressor(n_estimators=3), HistGradientBoostingRegressor()
NEIGHBOURS = KNeighborsRegressor(algorithm="kd_tree", leaf_size=5)
BRUTE = KNeighborsClassifier(algorithm="brute")


@pytest.mark.parametrize(
    ("estimator", "change", "words"),
    [
        (TREE, set_tree(left_child=10_000), "child that does not come after it"),
        (TREE, set_tree(right_child=0), "child that does not come after it"),
        (TREE, set_tree(left_child=-7), "child that does not come after it"),
        (TREE, set_tree(feature=3), "feature beyond the 3"),
        (TREE, set_tree(feature=-1), "feature beyond the 3"),
        (TREE, set_attribute("n_features_in_", 9), "other features than its estimator"),
        (FOREST, set_tree(feature=50), "feature beyond the 3"),
        (FOREST, set_attribute("n_features_in_", 9), "other features than the ensemble"),
        (BOOSTING, set_tree(left_child=10_000), "child that does not come after it"),
        (BOOSTING, set_attribute("n_trees_per_iteration_", 2), "number of trees per iteration"),
        (IsolationForest(n_estimators=3, max_features=2),
         set_attribute("estimators_features_", lambda old: [np.array([0])] * len(old)),
         "other features than the ensemble"),
        (HISTOGRAM, set_predictor(left=10_000), "child that does not come after it"),
        (HISTOGRAM, set_predictor(right=0), "child that does not come after it"),
        (HISTOGRAM, set_predictor(feature_idx=3), "feature beyond the 3"),
        (HISTOGRAM, set_predictor(is_categorical=1), "categories of another feature"),
        (NEIGHBOURS, set_space_tree(1, with_value(60)), "index beyond its points"),
        (NEIGHBOURS, set_space_tree(1, shorter), "index beyond its points"),
        (NEIGHBOURS, set_space_tree(2, with_value(61, "idx_end")), "leads beyond its points"),
        (NEIGHBOURS, set_space_tree(2, with_value(-1, "idx_start")), "leads beyond its points"),
        (NEIGHBOURS, set_space_tree(2, shorter), "leads beyond its points"),
        (NEIGHBOURS, set_space_tree(3, lambda bounds: bounds[:1].copy()), "leads beyond"),
        (NEIGHBOURS, set_space_tree(
            2, lambda nodes: np.array([(a, b, 0, d) for a, b, _, d in nodes.tolist()], nodes.dtype)
        ), "lacks a child"),
        (BRUTE, set_attribute("_y", with_value(3)), "has no class"),
        (BRUTE, set_attribute("_y", shorter), "has no class"),
        (SVR(), set_attribute("support_vectors_", shorter), "another shape than declared"),
        (SVR(), set_attribute("_dual_coef_", lambda old: old[:, 1:].copy()), "other lengths"),
        (SVC(), set_attribute("_intercept_", shorter), "other lengths"),
        (SVC(), set_attribute("_n_support", with_value(1_000)), "other lengths"),
        (SVC(), set_attribute("_probA", np.ones(1)), "other lengths"),
        (SVC(), set_attribute("_sparse", True), "fitted on sparse rows"),
    ],
)  # fmt: skip
def test_wrong_indices_are_refused_before_a_prediction(
    estimator: Any, change: Callable[[Any], None], words: str
) -> None:
    estimator = fit(estimator, CLASSES if isinstance(estimator, SVC | type(BRUTE)) else TARGETS)
    check_arrays(loaded(dumps(estimator)))
    change(estimator)
    with pytest.raises(ValueError, match=words):
        check_arrays(loaded(dumps(estimator)))


def test_an_object_without_the_attributes_of_a_fitted_one_is_refused() -> None:
    estimator = fit(HistGradientBoostingRegressor())
    del estimator._predictors[0][0].nodes
    with pytest.raises(AttributeError):
        check_arrays(estimator)
