"""Sequences of several lengths as the rows of a mixture, checked.

Dimension letters: N rows, S steps of all rows together, T steps of a row, F features, W values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import check_array

Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp] | npt.NDArray[np.bool_]
_NUMBERS = "biufO"


@dataclass(frozen=True)
class Sequences:
    """N rows [T, F], each with a T of its own, at least 1.

    ``values`` [S, F] are the steps of the first row, then those of the second, and so on;
    ``lengths`` [N] are the rows' T.
    """

    values: Array
    lengths: npt.NDArray[np.intp]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(N, -1, F)``: as in the served format, -1 is any length."""
        return len(self.lengths), -1, self.values.shape[1]

    @property
    def ndim(self) -> int:
        """3, as of an array of rows of one length."""
        return 3

    @property
    def starts(self) -> npt.NDArray[np.intp]:
        """The place [N] of each row's first step."""
        starts: npt.NDArray[np.intp] = np.cumsum(self.lengths) - self.lengths
        return starts

    def __len__(self) -> int:
        """Return N."""
        return len(self.lengths)

    def __getitem__(self, places: Places) -> Sequences:
        """Return the rows at some places, or those for which a mask is true, in this order."""
        lengths = self.lengths[places]
        shifts = self.starts[places] - (np.cumsum(lengths) - lengths)
        return Sequences(
            self.values[np.repeat(shifts, lengths) + np.arange(lengths.sum())], lengths
        )

    def by_length(self, function: Callable[[Array], Array]) -> Array:
        """Return the results [N, W] of a function that maps rows [n, T, F] of one length to [n, W].

        The function is called once for each length, so that a row's result does not depend on the
        lengths of the others.
        """
        results = []
        order = np.argsort(self.lengths, kind="stable")
        borders = np.flatnonzero(np.diff(self.lengths[order])) + 1
        for rows in np.split(order, borders):
            steps = self.starts[rows][:, None] + np.arange(self.lengths[rows[0]])
            results.append(function(self.values[steps]))
        found: Array = np.concatenate(results)[np.argsort(order, kind="stable")]
        return found


def sequences_of(X: Any) -> Any:
    """Return the rows [T, F] of a list as an array or :class:`Sequences`; others as they are.

    A list, a tuple, or an array or series of objects with one axis is a list of rows. Rows of one
    length are an array [N, T, F], not yet checked. Raises ``ValueError``, which names the row by
    its place, for rows that are no numbers, have other axes or no steps, or differ in their
    features, and as scikit-learn does for values that are not finite.
    """
    kind = getattr(getattr(X, "dtype", None), "kind", "")
    is_of_objects = kind == "O" and X.ndim == 1
    if not isinstance(X, list | tuple) and not is_of_objects:
        if isinstance(X, np.ndarray) and X.ndim == 3 and kind == "f" and np.isnan(X).any():
            raise ValueError(
                "Input X contains NaN. Sequences of several lengths are a list of arrays [T, F] "
                "that end with their last step, without padding"
            )
        return X
    rows = [_row(row, place) for place, row in enumerate(X)]
    if len({row.shape for row in rows}) == 1:
        return np.stack(rows)
    for place, row in enumerate(rows):
        if row.ndim != 2 or 0 in row.shape:
            raise ValueError(
                f"X[{place}] must be a sequence [T, F] of at least one step (given: shape "
                f"{row.shape})"
            )
        if row.shape[1] != rows[0].shape[1]:
            raise ValueError(
                f"X[{place}] has {row.shape[1]} features, and X[0] has {rows[0].shape[1]}"
            )
    if not rows:
        return np.empty((0, 0, 0))  # refused as any empty array
    values = check_array(np.concatenate(rows), dtype=np.float64, order="C", input_name="X")
    return Sequences(values, np.array([len(row) for row in rows]))


def _row(row: Any, place: int) -> npt.NDArray[Any]:
    try:
        array = np.asarray(row)
    except ValueError as error:  # steps of unlike lengths
        raise ValueError(f"X[{place}] must be a sequence [T, F]: {error}") from None
    if array.dtype.kind not in _NUMBERS or (array.dtype.kind == "O" and array.ndim == 0):
        given = type(row).__name__ if array.ndim == 0 else array.dtype
        raise ValueError(f"X[{place}] must be an array of numbers (given: {given})")
    return array


def check_columns(X: Sequence[Any]) -> Any:
    """Return a list's first row, whose columns have the names of all rows' columns.

    Raises ``ValueError`` for a row that is a data frame of other columns.
    """
    columns = [list(getattr(row, "columns", ())) for row in X]
    for place, names in enumerate(columns):
        if names != columns[0]:
            raise ValueError(f"X[{place}] has the columns {names}, and X[0] has {columns[0]}")
    return X[0] if columns else None
