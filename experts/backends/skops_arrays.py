"""Arrays of fitted estimators that scikit-learn's compiled code follows without a check.

A wrong index in them would read beyond an array and end the process at the first prediction. So
indices are checked when an estimator is loaded: the nodes of decision trees and of histogram
gradient boosting, the k-d trees and ball trees of neighbours and their classes, and the support
vectors of libsvm.

Letters: N nodes, F features, S support vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.ensemble._bagging import BaseBagging
from sklearn.ensemble._forest import BaseForest
from sklearn.ensemble._gb import BaseGradientBoosting
from sklearn.ensemble._hist_gradient_boosting.gradient_boosting import BaseHistGradientBoosting
from sklearn.neighbors import BallTree, KDTree, KNeighborsClassifier, RadiusNeighborsClassifier
from sklearn.svm._base import BaseLibSVM
from sklearn.tree import BaseDecisionTree

_LEAF = -1


def objects_in(estimator: BaseEstimator) -> Iterator[object]:
    """Yield an estimator and every object that its attributes and their items lead to.

    Modules are left out, which lead to everything; a spline of SciPy 1.18 has some.
    """
    seen: set[int] = set()
    waiting: list[Any] = [estimator]
    while waiting:
        found = waiting.pop()
        is_leaf = found is None or isinstance(found, str | int | float | type | ModuleType)
        if is_leaf or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        if isinstance(found, dict):
            waiting.extend(found.values())
        elif isinstance(found, list | tuple | set):
            waiting.extend(found)
        elif isinstance(found, np.ndarray):
            waiting.extend(found.flat if found.dtype == object else ())
        else:
            waiting.extend(getattr(found, "__dict__", {}).values())


def check_arrays(estimator: BaseEstimator) -> None:
    """Check the indices in a fitted estimator.

    Raises ``ValueError`` for a wrong one, and any error of the library for an object that lacks an
    attribute of a fitted one.
    """
    for found in objects_in(estimator):
        for kinds, check in _CHECKS.items():
            if isinstance(found, kinds):
                check(found)


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _check_children(left: np.ndarray, right: np.ndarray, inner: np.ndarray) -> None:
    """Check that the children of inner nodes [N] follow them, so that every path ends."""
    places = np.arange(len(inner))[inner]
    for children in (left[inner].astype(np.int64), right[inner].astype(np.int64)):
        _require(
            np.all(children > places) and np.all(children < len(inner)),
            "a tree node has a child that does not come after it",
        )


def _check_features(features: np.ndarray, num_features: int) -> None:
    _require(
        np.all(features >= 0) and np.all(features < num_features),
        f"a tree node tests a feature beyond the {num_features}",
    )


def _check_tree(estimator: Any) -> None:
    tree = getattr(estimator, "tree_", None)
    if tree is None:  # a parameter, not fitted
        return
    _require(
        tree.n_features == estimator.n_features_in_ and tree.node_count > 0,
        "a tree has no nodes, or other features than its estimator",
    )
    inner = tree.children_left != _LEAF
    _check_children(tree.children_left, tree.children_right, inner)
    _check_features(tree.feature[inner], tree.n_features)


def _check_same_width(trees: Any, num_features: int) -> None:
    """Check the widths of trees that get rows without a check of their own."""
    for tree in trees:
        _require(
            isinstance(tree, BaseDecisionTree) and tree.n_features_in_ == num_features,
            "a tree of an ensemble has other features than the ensemble",
        )


def _check_forest(forest: Any) -> None:
    _check_same_width(getattr(forest, "estimators_", ()), getattr(forest, "n_features_in_", 0))


def _check_bagging(bagging: Any) -> None:
    if not hasattr(bagging, "estimators_"):
        return
    pairs = zip(bagging.estimators_, bagging.estimators_features_, strict=True)
    for member, features in pairs:
        if isinstance(member, BaseDecisionTree):
            _check_same_width([member], len(features))


def _check_boosting(boosting: Any) -> None:
    if not hasattr(boosting, "estimators_"):
        return
    trees = boosting.estimators_
    _require(
        trees.ndim == 2 and trees.shape[1] == boosting.n_trees_per_iteration_,
        "gradient boosting declares a different number of trees per iteration",
    )
    _check_same_width(trees.flat, boosting.n_features_in_)
    _require(
        all(tree.tree_.value.shape[1:] == (1, 1) for tree in trees.flat),
        "a gradient boosting tree has several outputs",
    )


def _check_hist_boosting(boosting: Any) -> None:
    if not hasattr(boosting, "_predictors"):
        return
    num_features, preprocessor = boosting.n_features_in_, boosting._preprocessor
    if preprocessor is not None:  # it moves categories to the front
        encoded = preprocessor.transform(np.zeros((1, num_features)))
        _require(encoded.shape == (1, num_features), "encoded rows have other features")
    categorical = boosting._bin_mapper.is_categorical_
    _require(len(categorical) == num_features, "features must be all categorical or all not")
    for tree in (tree for trees in boosting._predictors for tree in trees):
        nodes, bitsets = tree.nodes, tree.raw_left_cat_bitsets
        inner = nodes["is_leaf"] == 0
        _check_children(nodes["left"], nodes["right"], inner)
        features = nodes["feature_idx"][inner]
        _check_features(features, num_features)
        of_categories = nodes["is_categorical"][inner] != 0
        _require(
            np.all(categorical[features[of_categories]])
            and np.all(nodes["bitset_idx"][inner][of_categories] < len(bitsets))
            and bitsets.shape[1:] == (8,),
            "a tree node tests the categories of another feature",
        )


def _check_space_tree(tree: Any) -> None:
    (data, places, nodes, bounds, _, _, num_nodes, *_, metric, weights) = tree.__getstate__()
    size, num_features = data.shape
    _require(
        len(places) == size and np.all(places >= 0) and np.all(places < size),
        "a neighbours tree has an index beyond its points",
    )
    starts, ends = nodes["idx_start"], nodes["idx_end"]
    _require(
        len(nodes) == num_nodes
        and np.all(starts >= 0)
        and np.all(starts <= ends)
        and np.all(ends <= size)
        and bounds.shape == (1 if isinstance(tree, BallTree) else 2, num_nodes, num_features)
        and (weights is None or len(weights) == size),
        "a neighbours tree node leads beyond its points",
    )
    inner = np.flatnonzero(nodes["is_leaf"] == 0)
    _require(np.all(2 * inner + 2 < num_nodes), "a neighbours tree node lacks a child")
    is_weighted = type(metric).__name__.startswith("Minkowski")
    _require(
        not is_weighted or len(metric.__getstate__()[1]) in (0, num_features),
        "a neighbours tree's distance has weights of another width",
    )


def _check_neighbours(neighbours: Any) -> None:
    """Check the classes of the points, which a brute-force search counts in compiled code."""
    if not hasattr(neighbours, "_fit_X"):
        return
    labels = np.asarray(neighbours._y)
    columns = labels.reshape(len(labels), -1).T
    classes = neighbours.classes_
    sizes = [len(classes)] if labels.ndim == 1 else [len(column) for column in classes]
    _require(
        len(labels) == neighbours._fit_X.shape[0] == neighbours.n_samples_fit_
        and len(sizes) == len(columns)
        and all(np.all((c >= 0) & (c < n)) for c, n in zip(columns, sizes, strict=True)),
        "a point of a neighbours classifier has no class",
    )


def _check_libsvm(machine: Any) -> None:
    if not hasattr(machine, "support_"):
        return
    _require(not machine._sparse, "a support vector machine is fitted on sparse rows")
    size, counts = len(machine.support_), machine._n_support
    num_pairs = len(counts) * (len(counts) - 1) // 2
    _require(
        machine.shape_fit_[1] == machine.n_features_in_
        and machine._dual_coef_.shape == (len(counts) - 1, size)
        and len(machine._intercept_) >= num_pairs > 0
        and all(len(p) == 0 or len(p) >= num_pairs for p in (machine._probA, machine._probB))
        and (machine._impl not in ("c_svc", "nu_svc") or counts.sum() == size)
        and np.all(counts >= 0),
        "a support vector machine has arrays of other lengths than it declares",
    )
    if machine.kernel == "precomputed":
        points = machine.support_
        _require(
            np.all(points >= 0) and np.all(points < machine.n_features_in_),
            "a support vector machine reads a value beyond its rows",
        )
    else:
        _require(
            machine.support_vectors_.shape == (size, machine.n_features_in_),
            "a support vector machine has support vectors of another shape than declared",
        )


_CHECKS: Mapping[Any, Callable[[Any], None]] = {
    BaseDecisionTree: _check_tree,
    BaseForest: _check_forest,
    BaseBagging: _check_bagging,
    BaseGradientBoosting: _check_boosting,
    BaseHistGradientBoosting: _check_hist_boosting,
    (KDTree, BallTree): _check_space_tree,
    (KNeighborsClassifier, RadiusNeighborsClassifier): _check_neighbours,
    BaseLibSVM: _check_libsvm,
}
