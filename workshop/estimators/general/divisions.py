"""First divisions of the rows, which EM starts from."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans

from workshop.estimators.em import Array, Rows, design_of
from workshop.estimators.general.fits import Data
from workshop.estimators.iterative import MAX_SEED
from workshop.estimators.scale import Scale
from workshop.estimators.starts import distinct, regions

_NUM_KMEANS, _NUM_CUTS = 3, 64
_RIDGE = 0.01
_FLAT = 1e9
"""The ridge of lines, and that of constants, which take their place where rows are few."""


def divisions_of(
    data: Data, num_experts: int, count: int, source: np.random.RandomState
) -> list[Array]:
    """Return the shares [N, E] of several divisions, by k-means and by planes in turns.

    Equal rows count as one of their weights' sum, so that a weight is worth as many repetitions.
    """
    if num_experts == 1:
        return [np.ones((len(data.X), 1))]
    found = []
    for number in range(count):
        if number % 2:
            labels = _by_planes(data, num_experts, source)
        else:
            labels = _by_kmeans(data, num_experts, source, is_plain=number == 0)
        found.append(np.eye(num_experts)[labels])
    return found


def _by_kmeans(
    data: Data, num_experts: int, source: np.random.RandomState, is_plain: bool
) -> Array:
    """Return the cluster [N] of each scaled row.

    Unless it ``is_plain``, features count by random weights, and so do the targets of a regression.
    """
    columns = data.X
    if not is_plain and data.classes is None:
        columns = np.column_stack([data.X, data.targets])
    different, places = np.unique(columns, axis=0, return_inverse=True)
    places = places.reshape(-1)
    if len(different) <= num_experts:
        return places
    scaled = Scale.of(columns, data.weights)(different)
    if not is_plain:
        scaled = scaled * source.exponential(size=scaled.shape[1])
    kmeans = KMeans(num_experts, n_init=_NUM_KMEANS, random_state=source.randint(MAX_SEED))
    labels = kmeans.fit_predict(scaled, sample_weight=np.bincount(places, data.weights))
    found: Array = labels[places]
    return found


def _by_planes(data: Data, num_experts: int, source: np.random.RandomState) -> Array:
    """Return the region [N] of each row: planes cut where two lines leave few squares."""
    first, places = distinct(data.X, data.targets)
    weights: Array = np.bincount(places, data.weights).astype(np.float64)
    rows, targets = data.X[first], data.targets[first]
    if data.classes is not None:
        targets = np.eye(data.width)[targets]
    rows, targets = (Scale.of(values, weights)(values) for values in (rows, targets))
    num_features = rows.shape[1]
    has_lines = len(rows) >= 4 * num_experts * (num_features + 1)
    penalty = np.append(np.full(num_features, _RIDGE if has_lines else _FLAT), _RIDGE)
    rng = np.random.default_rng(source.randint(MAX_SEED))
    labels = np.zeros(len(rows), np.intp)
    scaled = Rows(design_of(rows), targets, weights)
    for number, region in enumerate(regions(scaled, num_experts, penalty, _NUM_CUTS, rng)):
        labels[region] = number
    return labels[places]
