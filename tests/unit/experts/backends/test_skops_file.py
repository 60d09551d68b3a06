"""skops files that are damaged, hostile, or of another version of scikit-learn."""

from __future__ import annotations

import functools
import io
import json
import logging
import operator
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import scipy.special
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
from experts.backends.skops_arrays import check_arrays
from experts.backends.skops_file import read_estimator
from tests.unit.bomb import EXECUTED, Bomb, pickled_bomb

ROWS = np.random.default_rng(0).normal(size=(60, 3))
TARGETS = ROWS.sum(1)
CLASSES = np.digitize(TARGETS, [-0.5, 0.5])
WHERE = "folder/e.skops: experts.e"
Schema = dict[str, Any]


def loaded(data: bytes) -> BaseEstimator:
    return read_estimator(data, WHERE)[0]


def fit(estimator: Any, targets: np.ndarray = TARGETS) -> Any:
    return estimator.fit(ROWS, targets)


def replaced(data: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    """Return a skops file with a changed member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.namelist():
            content = old.read(member)
            new.writestr(member, change(content) if member == name else content)
    return buffer.getvalue()


def with_schema(data: bytes, change: Callable[[Schema], object]) -> bytes:
    """Return a skops file whose schema is changed."""

    def changed(content: bytes) -> bytes:
        schema = json.loads(content)
        change(schema)
        return json.dumps(schema).encode()

    return replaced(data, "schema.json", changed)


def refused(data: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        loaded(data)
    assert caught.value.field == WHERE


def python_function(rows: np.ndarray) -> np.ndarray:
    os.system("touch /tmp/never")
    return rows


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (python_function, "not allowed: tests.unit.experts.backends.test_skops_file"),
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
def test_a_transformer_may_not_bring_a_function_but_a_ufunc(function: Any, words: str) -> None:
    refused(dumps(make_pipeline(FunctionTransformer(function), LinearRegression())), words)
    for ufunc in (np.exp, scipy.special.expit):
        assert loaded(dumps(FunctionTransformer(ufunc))).func is ufunc


def node(name: str, loader: str, **more: Any) -> Schema:
    module, _, kind = name.rpartition(".")
    return {"__class__": kind, "__module__": module, "__loader__": loader, **more}


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (node("posix.system", "TypeNode"), "types that are not allowed: posix.system"),
        (node("subprocess.Popen", "ObjectNode"), "types that are not allowed: subprocess.Popen"),
        (node("subprocess.Popen", "ConstructorFromReduceNode", content={}),
         r"not allowed: subprocess.Popen \('ConstructorFromReduceNode'\)"),
        (node("subprocess.Popen", "NoNode"), r"not allowed: subprocess.Popen \('NoNode'\)"),
        (node("evil.CyHinge", "LossNode",
              __reduce__={"args": node("builtins.tuple", "TupleNode", content=[])},
              content=node("builtins.str", "JsonNode", content="null")),
         "types that are not allowed: evil.CyHinge"),
    ],
)  # fmt: skip
def test_no_other_type_is_made(made: Schema, words: str) -> None:
    estimator = fit(LinearRegression())
    change = {"extra_": made}
    refused(with_schema(dumps(estimator), lambda s: s["content"]["content"].update(change)), words)
    estimator.extra_ = np.array([1, os.getcwd], object)
    refused(dumps(estimator), r"not allowed: posix\.getcwd")


def test_a_name_in_the_state_of_a_random_generator_is_checked() -> None:
    estimator = fit(LinearRegression())
    estimator.generator_ = np.random.default_rng(0)
    assert loaded(dumps(estimator)).generator_.random() == estimator.generator_.random()

    def rename(schema: Schema) -> None:
        state = schema["content"]["content"]["generator_"]["content"]["bit_generator"]["content"]
        state["bit_generator"]["content"] = '"set_state"'

    refused(with_schema(dumps(estimator), rename), r"not allowed: numpy\.random")


@pytest.mark.parametrize("how", ["pickle", "joblib", "npy"])
def test_pickles_are_never_opened(how: str, tmp_path: Path) -> None:
    data = pickled_bomb()
    if how == "joblib":
        joblib.dump(Bomb(), tmp_path / "j")
        data = (tmp_path / "j").read_bytes()
    elif how == "npy":
        array, buffer = np.array([Bomb()], object), io.BytesIO()
        np.save(buffer, array)
        whole = dumps(fit(LinearRegression()))
        names = zipfile.ZipFile(io.BytesIO(whole)).namelist()
        member = next(name for name in names if name.endswith(".npy"))
        data = replaced(whole, member, lambda _: buffer.getvalue())
    refused(data, r"is not a complete skops file|cannot be loaded")
    assert EXECUTED == []


WHOLE = dumps(fit(LinearRegression()))


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not a complete skops file"),
        *((WHOLE[:-count], "is not a complete skops file") for count in (1, 100, 500)),
        (with_schema(WHOLE, lambda s: s.pop("protocol")), "protocol None; must be at least 1"),
        *((with_schema(WHOLE, lambda s, given=given: s.update(protocol=given)),
           f"protocol {given}; must be at least 1") for given in (0, True)),
        (with_schema(WHOLE, lambda s: s.update(protocol=999)), "cannot be loaded: ValueError"),
        (replaced(WHOLE, "schema.json", lambda _: DEEP), "cannot be loaded: RecursionError"),
        *((dumps(other), "not an estimator") for other in ({"n": np.ones(2)}, [1, 2], np.ones(3))),
        (dumps(SVR().fit(csr_matrix(ROWS), TARGETS)), "csr_matrix"),
    ],
    ids=lambda value: value if isinstance(value, str) else "data",
)  # fmt: skip
def test_other_bytes_and_objects_are_refused(data: bytes, words: str) -> None:
    refused(data, words)


def test_archives_that_unpack_to_much_more_are_refused() -> None:
    estimator = fit(LinearRegression())
    estimator.extra_ = np.zeros(10_000_000)
    data = dumps(estimator, compression=zipfile.ZIP_DEFLATED)
    assert len(data) < 200_000
    refused(data, "unpacks to more than 64 times its")
    estimator.extra_ = np.zeros(100_000)

    def repeat(schema: Schema) -> None:
        content = schema["content"]["content"]
        for number in range(80):
            content[f"extra{number}_"] = {**content["extra_"], "__id__": number}

    refused(with_schema(dumps(estimator), repeat), "unpacks to more than 64 times its")


def test_compressed_files_are_read() -> None:
    estimator = fit(RandomForestRegressor(5, random_state=0))
    data = dumps(estimator, compression=zipfile.ZIP_DEFLATED)
    read, num_bytes = read_estimator(data, WHERE)
    np.testing.assert_array_equal(read.predict(ROWS), estimator.predict(ROWS))
    assert num_bytes > len(data)


def test_another_version_of_scikit_learn_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    skops_file._warn_of_version.cache_clear()
    loaded(dumps(fit(make_pipeline(LinearRegression()))))
    assert caplog.messages == []
    change = {"content": '"1.2.0"'}
    data = with_schema(WHOLE, lambda s: s["content"]["content"]["_sklearn_version"].update(change))
    for _ in range(3):
        assert isinstance(loaded(data), LinearRegression)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "saved by scikit-learn 1.2.0 and are loaded by" in caplog.messages[0]


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
    rows = np.ones((60, 3))  # a feature that was constant
    constant = SplineTransformer().fit(rows)
    read: Any = loaded(dumps(constant))
    np.testing.assert_array_equal(read.transform(rows), constant.transform(rows))


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
    refused(with_splines(SCIPYS["1.16"], **changes)[0], "cannot be loaded: (Value|Type)Error")


def test_another_object_in_a_splines_place_is_refused() -> None:
    data, _ = with_splines(lambda **_: BSpline(whole=(np.ones(3), np.empty(0))))
    refused(data, "a spline has no knots")


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
