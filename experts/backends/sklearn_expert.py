"""An expert that is a fitted scikit-learn estimator or pipeline.

The estimator gets rows of the mixture's dtype, and scikit-learn decides about all rounding: a row's
result equals the estimator's own up to the order in which BLAS adds up.

Dimension letters: P rows, F features, C classes of the mixture, N classes of the estimator.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from cluster.errors import CheckpointError
from experts.backends.classes import ClassMap
from experts.backends.errors import described
from experts.backends.skops_arrays import check_arrays, objects_in
from experts.backends.skops_file import read_estimator
from experts.checkpoint.mixture import Mixture
from experts.mixture.parts import ClassesCombine, SklearnExpert, VoteCombine


def sklearn_model(mixture: Mixture, key: str, part: SklearnExpert) -> SklearnModel:
    """Load a scikit-learn expert.

    Raises :class:`CheckpointError`, whose field has file and key, as :func:`read_estimator` does,
    for wrong indices in its arrays, and for an estimator without the method, of other features than
    the mixture's rows, of several outputs, or with a class that the mixture does not have.
    """
    where = f"{mixture.folder / part.file}: {key}"
    estimator, num_bytes = read_estimator(mixture.file(part.file), where)
    try:
        check_arrays(estimator)
    except Exception as error:  # an object that is not as it was fitted may raise anything
        raise CheckpointError(f"cannot be used: {described(error)}", where) from None
    for found in objects_in(estimator):
        if isinstance(found, BaseEstimator) and "n_jobs" in vars(found):
            found.n_jobs = None  # an actor starts no processes and threads of its own
    _check_features(estimator, math.prod(mixture.spec.rows_input.shape), where)
    if not hasattr(estimator, part.method):
        raise CheckpointError(f"{type(estimator).__name__} has no {part.method}", f"{where}.method")
    return SklearnModel(estimator, num_bytes, part, mixture.spec.combine, where)


def _check_features(estimator: BaseEstimator, num_features: int, where: str) -> None:
    fitted = getattr(estimator, "n_features_in_", num_features)  # some transformers take any
    if fitted != num_features:
        raise CheckpointError(
            f"takes {fitted} features, but the mixture's rows have {num_features} values", where
        )


class SklearnModel:
    """Calls one method of a fitted estimator."""

    def __init__(
        self,
        estimator: BaseEstimator,
        num_bytes: int,
        part: SklearnExpert,
        combine: object,
        where: str,
    ) -> None:
        """Take over an estimator; raises :class:`CheckpointError` for wrong classes."""
        self.num_bytes = num_bytes
        self._method = getattr(estimator, part.method)
        self._name = part.method
        self._votes = isinstance(combine, VoteCombine)
        self._map: ClassMap | None = None
        if isinstance(combine, ClassesCombine):
            self._map = ClassMap(combine.classes)
            self._labels = _classes_of(estimator, where)
            self._places = self._map.places(self._labels, where)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Map rows [P, *row shape] to outputs [P, *output shape].

        Under ``vote``, labels and scores become one 1 at the label, or at the largest score; a
        single score is that of the second class. Probabilities are spread over the mixture's
        classes.
        """
        # A copy, since a transformer with ``copy=False`` would write into the caller's rows.
        outputs: Any = self._method(np.array(rows.reshape(len(rows), -1)))
        if isinstance(outputs, list | tuple):
            raise TypeError(f"{self._name} returns {len(outputs)} arrays, one for each output")
        if self._map is None:
            return outputs[:, None] if outputs.ndim == 1 else outputs
        if self._name == "predict":
            return self._map.one_hot(outputs)
        if self._name == "predict_proba":
            return self._map.spread(outputs, self._places)
        return self._map.one_hot(self._labels[self._largest(outputs)])

    def _largest(self, scores: np.ndarray) -> np.ndarray:
        """Return the place of the largest score among the estimator's classes: [P]."""
        if scores.ndim == 1 and len(self._labels) == 2:
            return (scores > 0).astype(np.intp)
        if scores.ndim != 2 or scores.shape[1] != len(self._labels):
            raise ValueError(
                f"decision_function returns {list(scores.shape)} for {len(self._labels)} classes; "
                'a support vector machine needs decision_function_shape="ovr"'
            )
        return scores.argmax(axis=1)


def _classes_of(estimator: BaseEstimator, where: str) -> np.ndarray:
    """Return the labels [N] of a classifier; raises :class:`CheckpointError` for another kind."""
    classes = getattr(estimator, "classes_", None)
    if classes is None:
        raise CheckpointError(f"{type(estimator).__name__} has no classes_", where)
    if not isinstance(classes, np.ndarray) or classes.ndim != 1:
        raise CheckpointError("has several outputs, each with its own classes", where)
    return classes
