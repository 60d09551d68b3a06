"""First divisions of the rows, which EM starts from.

Dimension letters: N rows, F features, E experts, P columns of a design, D values of a target,
R directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans

from workshop.estimators.base import distinct
from workshop.estimators.em import design_of
from workshop.estimators.general.fits import Data
from workshop.estimators.parts import Array
from workshop.estimators.scale import Scale

_NUM_KMEANS = 3
_MAX_ROWS = 2000
"""The different rows that choose planes; of more, a random part is taken."""
_NUM_DIRECTIONS = 32
_MAX_MIXED = 3
"""A random direction has one, two or three features."""
_LEVELS = (0.2, 0.35, 0.5, 0.65, 0.8)
"""The shares of a cell's rows that lie below a plane."""
_RIDGE = 1e-6


def divisions_of(
    data: Data, num_experts: int, count: int, source: np.random.RandomState
) -> list[Array]:
    """Return the shares [N, E] of several divisions, by k-means and by planes in turns.

    Equal rows count as one of their weights' sum, so that a weight is worth as many repetitions.
    """
    if num_experts == 1:
        return [np.ones((len(data.X), 1))]
    return [
        _by_planes(data, num_experts, source)
        if number % 2
        else _by_kmeans(data, num_experts, source, is_plain=number == 0)
        for number in range(count)
    ]


def _by_kmeans(
    data: Data, num_experts: int, source: np.random.RandomState, is_plain: bool
) -> Array:
    """Return the division by k-means of the scaled rows.

    Unless it ``is_plain``, features count by random weights, and so do the targets of a regression.
    """
    columns = data.X
    if not is_plain and data.classes is None:
        columns = np.column_stack([data.X, data.targets])
    distinct, places = np.unique(columns, axis=0, return_inverse=True)
    places = places.reshape(-1)
    if len(distinct) <= num_experts:
        return np.eye(num_experts)[places]
    scaled = Scale.of(columns, data.weights)(distinct)
    if not is_plain:
        scaled = scaled * source.exponential(size=scaled.shape[1])
    kmeans = KMeans(num_experts, n_init=_NUM_KMEANS, random_state=source.randint(2**31 - 1))
    labels = kmeans.fit_predict(scaled, sample_weight=np.bincount(places, data.weights))
    shares: Array = np.eye(num_experts)[labels[places]]
    return shares


def _by_planes(data: Data, num_experts: int, source: np.random.RandomState) -> Array:
    """Return the division by planes that leaves lines, one a cell, few squares.

    It grows as a tree does: the best cut of a cell comes first. The planes to cut by have random
    directions. Where there are too few rows for lines, constants take their place.
    """
    first, places = distinct(data.X, data.targets)
    weights: Array = np.bincount(places, data.weights).astype(np.float64)
    if len(first) > _MAX_ROWS:
        drawn = source.permutation(len(first))[:_MAX_ROWS]
        first, weights = first[drawn], weights[drawn]
    scale = Scale.of(data.X, data.weights)
    rows, targets = scale(data.X[first]), data.targets[first]
    if data.classes is not None:
        targets = np.eye(data.width)[targets]
    has_lines = len(rows) >= 4 * num_experts * (rows.shape[1] + 1)
    design = design_of(rows if has_lines else rows[:, :0])
    directions = _directions(rows.shape[1], source)
    lines = _Lines(design, Scale.of(targets, weights)(targets), weights, rows @ directions.T)
    heights = scale(data.X) @ directions.T
    cells, labels = [np.arange(len(rows))], np.zeros(len(data.X), np.intp)
    cuts = [lines.best_cut(cells[0])]
    while len(cells) < num_experts:
        number = max(range(len(cells)), key=lambda place: cuts[place].gain)
        cut, cell = cuts[number], cells[number]
        if cut.gain == -np.inf:
            break  # no cell has rows enough for two
        is_above = lines.heights[cell, cut.direction] > cut.threshold
        labels[(labels == number) & (heights[:, cut.direction] > cut.threshold)] = len(cells)
        cells[number] = cell[~is_above]
        cells.append(cell[is_above])
        cuts[number] = lines.best_cut(cells[number])
        cuts.append(lines.best_cut(cells[-1]))
    shares: Array = np.eye(num_experts)[labels]
    return shares


def _directions(num_features: int, source: np.random.RandomState) -> Array:
    """Return random directions [R, F] of one, two or three features."""
    directions = np.zeros((_NUM_DIRECTIONS, num_features))
    for number, direction in enumerate(directions):
        size = min(number % _MAX_MIXED + 1, num_features)
        features = source.permutation(num_features)[:size]
        direction[features] = source.normal(size=size)
    return directions


@dataclass(frozen=True)
class _Cut:
    """The plane that cuts a cell: rows whose height along a direction is above the threshold."""

    gain: float
    direction: int
    threshold: float


@dataclass(frozen=True)
class _Lines:
    """Least squares in cells: a design [N, P], targets [N, D], weights, heights [N, R]."""

    design: Array
    targets: Array
    weights: Array
    heights: Array

    def best_cut(self, cell: np.ndarray) -> _Cut:
        """Return the cut of some rows that lowers their squares the most.

        Its gain is -inf where no cut leaves rows enough on both sides.
        """
        best = _Cut(-np.inf, 0, 0.0)
        weights = self.weights[cell]
        if not len(cell):
            return best
        before = self._squares(cell)
        for direction in range(self.heights.shape[1]):
            heights = self.heights[cell, direction]
            order = np.argsort(heights, kind="stable")
            below = np.cumsum(weights[order]) / weights.sum()
            for level in _LEVELS:
                threshold = float(heights[order[np.searchsorted(below, level)]])
                is_above = heights > threshold
                gain = before - self._squares(cell[is_above]) - self._squares(cell[~is_above])
                if gain > best.gain:
                    best = _Cut(gain, direction, threshold)
        return best

    def _squares(self, cell: np.ndarray) -> float:
        """Return the squares that a fit to some rows leaves, by generalised cross-validation.

        They grow with the coefficients a row, so that no cell is too small; inf where a cell has
        fewer than two rows a coefficient.
        """
        num_columns = self.design.shape[1]
        if len(cell) < 2 * num_columns:
            return np.inf
        design, targets = self.design[cell], self.targets[cell]
        weighted = design * self.weights[cell, None]
        moments, products = weighted.T @ design, weighted.T @ targets
        moments[np.diag_indices(num_columns)] += _RIDGE * np.trace(moments)
        residuals = targets - design @ np.linalg.solve(moments, products)
        squares = float(self.weights[cell] @ (residuals**2).sum(axis=1))
        return squares * (len(cell) / (len(cell) - num_columns)) ** 2
