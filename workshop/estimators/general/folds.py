"""The folds of out-of-fold predictions.

Dimension letters: N rows, F features, D outputs of a regression.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import KFold, StratifiedKFold, check_cv

from workshop.estimators.base import distinct
from workshop.estimators.parts import Array

Rows = npt.NDArray[np.intp]
Fold = tuple[Rows, Rows]
"""The numbers of the rows to fit to, and of those to predict."""


def folds_of(
    X: Array, targets: npt.NDArray[Any], num_folds: int, is_classification: bool, seed: int
) -> list[Fold]:
    """Divide rows X [N, F] into folds, those of a classification with equal shares of classes.

    ``targets`` are values [N, D], or the numbers [N] of classes. Equal rows of equal targets share
    a fold, so that none is predicted by a fit to its copy, and a weight is worth as many copies.
    There are fewer folds, under a ``UserWarning``, where that leaves too few different rows: in a
    classification, of the most frequent class. Raises ``ValueError`` where two folds are too many.
    """
    first, places = distinct(X, targets)
    own = targets[first]
    largest = int(np.bincount(own).max()) if is_classification else len(first)
    if largest < 2:
        where = "of one class " if is_classification else ""
        raise ValueError(
            f"cv={num_folds}: two folds need at least two different rows {where}"
            f"(n_samples={len(X)}); cv=None needs none"
        )
    if largest < num_folds:
        warnings.warn(
            f"cv={num_folds}: {largest} folds instead, as there are only {largest} different rows"
            + (" of the most frequent class" if is_classification else ""),
            UserWarning,
            stacklevel=4,
        )
        num_folds = largest
    kind = StratifiedKFold if is_classification else KFold
    with warnings.catch_warnings():
        # A class of fewer rows than folds is in some folds only, which the experts' fits allow.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        splits = list(kind(num_folds, shuffle=True, random_state=seed).split(X[first], own))
    return [
        (np.flatnonzero(np.isin(places, train)), np.flatnonzero(np.isin(places, test)))
        for train, test in splits
    ]


def _numbers(part: Any, num_rows: int) -> Rows:
    """Return the numbers of the rows of a split's part, which may be a mask of the rows."""
    rows = np.asarray(part)
    if rows.dtype == bool:
        if rows.shape != (num_rows,):
            raise ValueError(f"cv has a mask of {rows.size} rows; there are {num_rows}")
        return np.flatnonzero(rows)
    if rows.size and (rows.min() < 0 or rows.max() >= num_rows):
        raise ValueError(f"cv has rows that are not among 0 to {num_rows - 1}")
    return rows.astype(np.intp)


def given_folds(cv: Any, X: Any, y: Any, numbers: Rows) -> list[Fold]:
    """Return the folds of a splitter, or of an iterable of pairs of rows, as scikit-learn has them.

    ``numbers`` [N] are those of the rows to fit among the rows X, as ``cv`` counts them. Raises
    ``ValueError`` for numbers of no rows, and unless each row to fit is in one fold, and in none
    that is fitted to predict it.
    """
    places = np.full(int(numbers.max()) + 1, -1)
    places[numbers] = np.arange(len(numbers))
    folds = []
    count = np.zeros(len(numbers), np.intp)
    for split in check_cv(cv).split(X, y):
        train, test = (_numbers(part, len(y)) for part in split)
        train, test = (rows[rows < len(places)] for rows in (train, test))
        train, test = (places[rows][places[rows] >= 0] for rows in (train, test))
        if np.intersect1d(train, test).size:
            raise ValueError("cv: a row is in both parts of a split")
        np.add.at(count, test, 1)
        folds.append((train, test))
    folds = [(train, test) for train, test in folds if len(test)]
    if len(folds) < 2 or (count != 1).any():
        raise ValueError("cv must put each row into one of at least two folds")
    return folds


def merged(folds: Sequence[Fold], most: int) -> list[Fold]:
    """Return at most so many folds, each of some neighbours among ``folds``."""
    groups = np.array_split(np.arange(len(folds)), min(most, len(folds)))
    return [
        (
            reduce(np.intersect1d, [folds[number][0] for number in group]),
            np.sort(np.concatenate([folds[number][1] for number in group])),
        )
        for group in groups
    ]
