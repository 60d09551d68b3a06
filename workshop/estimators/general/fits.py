"""Fits of experts that are scikit-learn estimators to shares of rows, whole or out of fold; folds.

Dimension letters: N rows, F features, W values of an output, D outputs of a regression, K classes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import clone
from sklearn.dummy import DummyClassifier
from sklearn.model_selection import KFold, StratifiedKFold, check_cv
from sklearn.pipeline import Pipeline
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import has_fit_parameter

from experts.backends.errors import described
from workshop.estimators.parts import Array, EstimatorPart
from workshop.estimators.starts import distinct

MAX_VALUE = 1e100
"""The largest feature, target or prediction, because deviations are sums of squares."""
MAX_RARE = 10
"""The most rows of a class that an expert may refuse."""
_MAX_ROUNDING = 1e-3
"""The most by which a row's probabilities may miss a sum of 1, as those in float32 do."""
_MIN_SHARE = 1e-10
"""Rows of a smaller share, relative to the largest weight, are left out of an expert's fit."""
Targets = npt.NDArray[Any]


@dataclass(frozen=True)
class Expert:
    """An expert to fit: its estimator, and the keyword of ``fit`` that takes weights, if any."""

    name: str
    estimator: Any

    @property
    def weight_keyword(self) -> str | None:
        """The keyword of ``fit`` that takes weights, that of a pipeline's last step included."""
        if isinstance(self.estimator, Pipeline):
            step, last = self.estimator.steps[-1]
            return f"{step}__sample_weight" if has_fit_parameter(last, "sample_weight") else None
        return "sample_weight" if has_fit_parameter(self.estimator, "sample_weight") else None

    def __str__(self) -> str:
        """Return the name and the class, for errors."""
        return f"expert {self.name!r} ({type(self.estimator).__name__})"


@dataclass(frozen=True)
class Data:
    """The rows to fit: X [N, F], targets, weights [N]; ``classes`` [K] of a classification.

    ``targets`` are values [N, D], or the numbers [N] of classes.
    """

    X: Array
    targets: Targets
    weights: Array
    classes: npt.NDArray[Any] | None

    @property
    def width(self) -> int:
        """The values W of an expert's output."""
        return self.targets.shape[1] if self.classes is None else len(self.classes)

    @property
    def least_share(self) -> float:
        """The weight at and below which a row is left out of an expert's fit."""
        return _MIN_SHARE * float(self.weights.max())

    def y(self, rows: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
        """Return the targets of some rows as an estimator takes them."""
        if self.classes is not None:
            return self.classes[self.targets[rows]]
        targets = self.targets[rows]
        return targets[:, 0] if targets.shape[1] == 1 else targets

    def of(self, rows: Rows | slice) -> Data:
        """Return some of the rows."""
        return Data(self.X[rows], self.targets[rows], self.weights[rows], self.classes)


class FitFailedError(ValueError):
    """An expert's fit, or its prediction, fails on the rows that the gate gives it."""


def fitted_part(expert: Expert, data: Data, shares: Array) -> EstimatorPart:
    """Fit an expert to its ``shares`` [N] of the rows.

    Where all of its rows have one class, a constant classifier stands in for the expert. A
    classifier that refuses its rows is fitted without its rarest classes, as few of them as it
    takes, if each has at most :data:`MAX_RARE` rows: one that calibrates by folds wants as many
    rows of each class. Raises :class:`FitFailedError`, which names the expert, for any other error
    of the estimator, and where it has no rows.
    """
    rows = shares > data.least_share
    if not rows.any():
        raise FitFailedError(f"{expert} has none of {len(rows)} rows to be fitted to")
    try:
        return _fitted_to(expert, data, shares, rows)
    except FitFailedError:
        for fewer in _without_rare(data, rows):
            with contextlib.suppress(FitFailedError):
                return _fitted_to(expert, data, shares, fewer)
        raise


def _without_rare(data: Data, rows: npt.NDArray[np.bool_]) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield the rows without the rarest class, then without the two rarest, and so on."""
    if data.classes is None:
        return
    counts = np.bincount(data.targets[rows], minlength=len(data.classes))
    for rarest in np.unique(counts[(counts > 0) & (counts <= MAX_RARE)]):
        is_kept = counts > rarest
        if is_kept.sum() < 2:
            return
        yield rows & is_kept[data.targets]


def _fitted_to(
    expert: Expert, data: Data, shares: Array, rows: npt.NDArray[np.bool_]
) -> EstimatorPart:
    y = data.y(rows)
    estimator = clone(expert.estimator)
    keywords: dict[str, Any] = {}
    if data.classes is not None and len(np.unique(y)) == 1:
        estimator = DummyClassifier(strategy="most_frequent")
    elif (keyword := expert.weight_keyword) is not None:
        keywords[keyword] = shares[rows]
    try:
        estimator.fit(data.X[rows], y, **keywords)
        if data.classes is None:
            return EstimatorPart(estimator)
        places = np.searchsorted(data.classes, estimator.classes_)
        if not np.array_equal(data.classes[places % data.width], estimator.classes_):
            raise ValueError(f"its classes_ are {estimator.classes_!r:.80}, not those of its rows")
        return EstimatorPart(estimator, "predict_proba", places, data.width)
    except Exception as error:  # an estimator may raise anything
        raise FitFailedError(
            f"{expert} cannot be fitted to {rows.sum()} of {len(rows)} rows: {described(error)}"
        ) from error


def outputs_of(expert: Expert, part: EstimatorPart, data: Data, rows: Any = slice(None)) -> Array:
    """Return the outputs [N, W] of a fitted expert for some rows.

    Raises :class:`FitFailedError` for any error of the estimator, and for wrong outputs.
    """
    X = data.X[rows]
    try:
        outputs = part(X)
    except Exception as error:  # an estimator may raise anything
        raise FitFailedError(f"{expert} cannot predict: {described(error)}") from error
    if outputs.shape != (len(X), data.width):
        raise FitFailedError(
            f"{expert} predicts the shape {list(outputs.shape)}, where {data.width} values of each "
            f"of {len(X)} rows are needed"
        )
    if not (np.abs(outputs) <= MAX_VALUE).all():
        raise FitFailedError(f"{expert} predicts values that are not finite, or too large")
    if data.classes is not None:
        missed = np.abs(outputs.sum(axis=1) - 1).max(initial=0.0)
        if outputs.min(initial=0.0) < 0 or missed > _MAX_ROUNDING:
            raise FitFailedError(
                f"{expert} predicts probabilities that are negative or do not add up to 1"
            )
    return outputs


Fit = tuple[EstimatorPart | None, Array]
"""An expert, ``None`` where only folds of it were fitted, and its outputs [N, W]."""


def fits(
    experts: Sequence[Expert],
    data: Data,
    shares: Sequence[Array],
    folds: Sequence[Fold],
    n_jobs: int | None,
) -> list[Fit | FitFailedError]:
    """Fit experts to their ``shares`` [N] of the rows, at once in ``n_jobs`` jobs.

    With ``folds`` the outputs of a row are those of a fit to the other folds. An error is a value
    of the list, so that it does not end the fits of the other experts.
    """
    parts: Sequence[Fold | None] = folds or [None]
    results = Parallel(n_jobs=n_jobs)(
        delayed(_fit)(expert, data, share, fold)
        for expert, share in zip(experts, shares, strict=True)
        for fold in parts
    )
    found: list[Fit | FitFailedError] = []
    for first in range(0, len(results), len(parts)):
        of_expert = results[first : first + len(parts)]
        error = next((one for one in of_expert if isinstance(one, FitFailedError)), None)
        if error is not None or not folds:
            found.append(error or of_expert[0])
            continue
        outputs = np.empty((len(data.X), data.width))
        for (_, test), (_, of_fold) in zip(folds, of_expert, strict=True):
            outputs[test] = of_fold
        found.append((None, outputs))
    return found


def _fit(expert: Expert, data: Data, shares: Array, fold: Fold | None) -> Fit | FitFailedError:
    """Fit an expert to its shares of all rows, or of the other folds to predict a fold."""
    train, test = fold or (slice(None), slice(None))
    try:
        part = fitted_part(expert, data.of(train), shares[train])
        return part if fold is None else None, outputs_of(expert, part, data, test)
    except FitFailedError as error:
        return error


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
