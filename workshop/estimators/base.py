"""The estimators' common part: checks of data, predictions, records, the folder, the picture.

Dimension letters: N rows, E experts, D outputs of a regression, K classes, T steps, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_feature_names,
    _check_sample_weight,
    check_array,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from router.observability.progress import bar
from workshop.estimators.parts import Array, FittedMixture, Rows, posterior
from workshop.estimators.scale import Scale
from workshop.estimators.sequences import Sequences, check_columns, sequences_of

Targets = npt.NDArray[Any]
"""Values [N, D] of a regression, or the numbers [N] of classes."""


class MixtureEstimator(BaseEstimator):
    """A mixture of experts; ``fit`` of a subclass sets the attributes.

    Attributes of a fitted estimator:

    - ``mixture_``: the gates and experts, a :class:`FittedMixture`;
    - ``n_iter_``: the iterations of the latest fit;
    - ``log_likelihood_``: the mean log likelihood of a training row, by weight, at the end;
      ``log_likelihoods_`` [n_iter_]: after each iteration;
    - ``expert_usage_`` [E]: the mean gate weight of each expert over the training rows;
    - ``n_samples_fit_``: the training rows, without those of weight 0;
    - ``n_features_in_``: F, and ``feature_names_in_`` where the columns have names.
    """

    early_stopping: bool
    validation_fraction: float
    mixture_: FittedMixture
    n_iter_: int
    n_features_in_: int

    @property
    def _row_axes(self) -> int:
        """The axes of a row: 1 for [F], 2 for sequences [T, F]."""
        return 1

    def __sklearn_tags__(self) -> Any:
        """Return scikit-learn's tags; sequences need arrays of three axes."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = self._row_axes == 1
        tags.input_tags.three_d_array = self._row_axes == 2
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        """Return whether there is a mixture; checks of data set other attributes before."""
        return hasattr(self, "mixture_")

    def responsibilities(self, X: Any, y: Any = None) -> Array:
        """Return the weight [N, E] of each expert for each row.

        Without ``y`` it is the gate's. With ``y`` it is the posterior, the probability that the
        expert made the target. Raises ``ValueError`` for ``y`` of a mixture without a likelihood.
        """
        X = self._check_rows(X)
        log_gates = self.mixture_.log_gates(X)
        if y is None:
            return np.exp(log_gates)
        targets = self._check_targets(y)
        check_consistent_length(X, targets)
        return posterior(log_gates, self.mixture_.log_likelihoods(X, targets))

    def save(self, folder: str | Path) -> None:
        """Write the served format, with a card, into a new or empty folder, whole or not at all.

        :func:`workshop.estimators.saved.folder.save` has the errors.
        """
        check_is_fitted(self)
        from workshop.estimators.saved.folder import save

        save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Return the fitted estimator that :meth:`save` wrote.

        Raises :class:`CheckpointError` as :func:`workshop.estimators.saved.folder.load` does, and
        ``TypeError`` for a folder of an estimator of another class.
        """
        from workshop.estimators.saved.folder import load

        loaded = load(Path(folder))
        if not isinstance(loaded, cls):
            raise TypeError(f"{folder} has a {type(loaded).__name__}, not a {cls.__name__}")
        return loaded

    def plot_experts(
        self, X: Any, ax: Any = None, features: tuple[int | str, int | str] | None = None
    ) -> Any:
        """Draw which expert takes which of the rows; returns matplotlib's axes.

        Needs ``expertmesh[plots]``; :func:`workshop.estimators.plots.plot_experts` has the
        kinds of pictures.
        """
        X = self._check_rows(X)
        from workshop.estimators.plots import plot_experts

        names = getattr(self, "feature_names_in_", None)
        return plot_experts(self.mixture_, X, None if names is None else list(names), ax, features)

    def _check_rows(self, X: Any) -> Rows:
        """Return rows to predict for, as float64; raises ``ValueError`` as scikit-learn does."""
        check_is_fitted(self)
        X = self._checked_rows(X, reset=False)
        steps = self.mixture_.row_shape[0]
        if X.ndim == 3 and steps not in (-1, X.shape[1]):
            given = X.lengths[X.lengths != steps][0] if isinstance(X, Sequences) else X.shape[1]
            raise ValueError(f"sequences must have {steps} steps (given: {given})")
        return X

    def _checked_rows(self, X: Any, reset: bool) -> Rows:
        if self._row_axes == 1:
            flat: Array = validate_data(self, X, dtype=np.float64, reset=reset, order="C")
            return flat
        named = check_columns(X) if isinstance(X, list | tuple) else X
        _check_feature_names(self, named, reset=reset)
        rows: Rows = sequences_of(X)
        if not isinstance(rows, Sequences):
            rows = check_array(rows, dtype=np.float64, ensure_2d=False, allow_nd=True, order="C")
        if rows.ndim != 3 or 0 in rows.shape:
            raise ValueError(
                f"{type(self).__name__} with recurrent experts takes rows [T, F]: an array of 3 "
                f"axes, or a list of arrays of 2 (given: {rows.ndim} axes, shape {rows.shape})"
            )
        if reset:
            self.n_features_in_ = rows.shape[2]
        elif rows.shape[2] != self.n_features_in_:
            raise ValueError(
                f"X has {rows.shape[2]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        return rows

    def _check_fit(
        self, X: Any, y: Any, sample_weight: Any, reset: bool = True
    ) -> tuple[Any, Targets, Array]:
        """Return the rows, targets and weights [N] to fit, without the rows of weight 0.

        ``reset`` is false for a warm start, whose features, outputs and classes stay. Raises
        ``ValueError`` as scikit-learn does, and for weights that are negative or all 0.
        """
        if y is None:
            raise ValueError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y "
                "is None"
            )
        X = self._checked_rows(X, reset)
        if reset:
            self._set_targets(y)
        targets = self._check_targets(y)
        check_consistent_length(X, targets)
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        is_used = weights > 0
        if not is_used.any():
            raise ValueError("sample_weight: at least one row must have a weight above 0")
        if is_used.all():
            return X, targets, weights
        return X[is_used], targets[is_used], weights[is_used]

    @contextmanager
    def _as_before_on_failure(self) -> Iterator[None]:
        """Give the estimator the attributes that it had, where the body raises."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            self.__dict__ = before
            raise

    def _split(
        self, targets: Targets, random: np.random.RandomState
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the places of rows to train on, and of those for early stopping."""
        places = np.arange(len(targets))
        if not self.early_stopping:
            return places, None
        try:
            used, held_out = train_test_split(
                places,
                test_size=self.validation_fraction,
                random_state=random,
                stratify=targets if targets.ndim == 1 else None,
            )
        except ValueError as error:  # too few rows, or too few of a class
            raise ValueError(
                f"early_stopping cannot hold out validation_fraction={self.validation_fraction} of "
                f"{len(places)} rows: {error}"
            ) from None
        return used, held_out

    def _set_fitted(
        self, mixture: FittedMixture, X: Rows, targets: Targets, weights: Array
    ) -> None:
        """Take over a fitted mixture, and the records that follow from it."""
        self._set_mixture(mixture, X, weights)
        densities = mixture.log_density(X, targets)
        self.log_likelihood_ = float(np.average(densities, weights=weights))

    def _set_mixture(self, mixture: FittedMixture, X: Rows, weights: Array) -> None:
        """Take over a fitted mixture, and how much each expert is used."""
        self.mixture_ = mixture
        self.n_samples_fit_ = len(X)
        weights_of_experts = np.exp(mixture.log_gates(X))
        self.expert_usage_ = np.average(weights_of_experts, axis=0, weights=weights)

    def _set_records(self, **records: Any) -> None:
        """Set attributes that only some fits have; those of an earlier fit that are ``None`` go."""
        for name, record in records.items():
            if record is not None:
                setattr(self, name, record)
            elif hasattr(self, name):
                delattr(self, name)

    def _set_targets(self, y: Any) -> None:
        """Take over the kind of targets of a new fit."""
        raise NotImplementedError

    @property
    def _width(self) -> int:
        """The values of a prediction: D outputs or K probabilities."""
        raise NotImplementedError

    def _target_scale(self, targets: Targets, weights: Array) -> Scale:
        """Return the scale of the targets of rows with ``weights`` [N]."""
        raise NotImplementedError

    def _check_targets(self, y: Any) -> Targets:
        """Return targets as numbers; raises ``ValueError`` for those that do not fit."""
        raise NotImplementedError


class MixtureRegressor(RegressorMixin, MixtureEstimator):
    """A mixture that predicts D values of a row."""

    n_outputs_: int

    def __sklearn_tags__(self) -> Any:
        """Return scikit-learn's tags; several outputs are allowed."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def predict(self, X: Any) -> Array:
        """Return the mixture's mean: [N] for one output, [N, D] for several."""
        X = self._check_rows(X)
        values = self.mixture_.combine(X)
        return values[:, 0] if self.n_outputs_ == 1 else values

    @property
    def _width(self) -> int:
        return self.n_outputs_

    def _target_scale(self, targets: Targets, weights: Array) -> Scale:
        return Scale.of(targets, weights)

    def _set_targets(self, y: Any) -> None:
        self.n_outputs_ = self._values(y).shape[1]

    def _check_targets(self, y: Any) -> Targets:
        values = self._values(y)
        if values.shape[1] != self.n_outputs_:
            raise ValueError(
                f"y has {values.shape[1]} outputs, and {type(self).__name__} was fitted to "
                f"{self.n_outputs_}"
            )
        return values

    def _values(self, y: Any) -> Targets:
        values: Targets = check_array(y, dtype=np.float64, ensure_2d=False, input_name="y")
        return values.reshape(len(values), -1)


class MixtureClassifier(ClassifierMixin, MixtureEstimator):
    """A mixture that predicts one of K classes; ``classes_`` has their labels."""

    classes_: npt.NDArray[Any]

    def predict_proba(self, X: Any) -> Array:
        """Return the probabilities [N, K], in the order of ``classes_``."""
        X = self._check_rows(X)
        # Rounding may leave 1 + 1e-15, which scikit-learn's losses refuse.
        return np.minimum(self.mixture_.combine(X), 1)

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Return the likeliest labels [N]; of equally likely classes the first."""
        places = self.predict_proba(X).argmax(axis=1)
        return self.classes_[places]

    @property
    def _width(self) -> int:
        return len(self.classes_)

    def _target_scale(self, targets: Targets, weights: Array) -> Scale:
        return Scale.none(self._width)

    def _set_targets(self, y: Any) -> None:
        labels = self._labels(y)
        self.classes_ = np.unique(labels)
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least 2 classes; y has 1 class, "
                f"{self.classes_.tolist()[0]!r:.80}"
            )

    def _check_targets(self, y: Any) -> Targets:
        labels = self._labels(y)
        is_unknown = ~np.isin(labels, self.classes_)
        if is_unknown.any():
            label = labels[is_unknown].tolist()[0]
            raise ValueError(f"y has the class {label!r:.80}, which is not one of classes_")
        return np.searchsorted(self.classes_, labels)

    def _labels(self, y: Any) -> npt.NDArray[Any]:
        check_classification_targets(y)
        labels: npt.NDArray[Any] = column_or_1d(y, warn=True)
        return labels


@contextmanager
def progress(verbose: int, total: int, text: str) -> Iterator[Callable[[str], None]]:
    """Show a progress bar on stderr; nothing at ``verbose`` 0.

    Yields a function that advances it by one of ``total`` and shows a remark, as an objective.
    """
    with bar(text, total, bool(verbose)) as update:
        yield lambda remark: update(advance=1, remark=remark)
