"""Columns of a CSV file as the rows and targets of a fit.

Dimension letters: N rows, F features, D targets, T steps of a sequence, V values of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import ConfigError, InvalidRequestError, shown, shown_name
from router.cli.rows import Table

if TYPE_CHECKING:
    import numpy as np

ROWS, TARGET = "x", "y"
"""The names of a fitted mixture's inputs, which `expertmesh predict` finds in a header."""
MAX_LABEL = 2**63


class DataError(ConfigError):
    """A file's rows cannot be fitted; ``field`` is the file, and the line and column."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The rows X [N, F] and targets [N], or [N, D] for D columns, of a file.

    Sequences are rows [N, T, V], or a list of N arrays [T, V]. ``others`` are the columns that are
    neither.
    """

    features: list[str]
    others: list[str]
    rows: np.ndarray | list[np.ndarray]
    targets: np.ndarray

    def rows_at(self, places: np.ndarray) -> np.ndarray | list[np.ndarray]:
        """Return the rows at some places."""
        if isinstance(self.rows, list):
            return [self.rows[place] for place in places]
        return self.rows[places]


def read_columns(
    table: Table,
    targets: Sequence[str],
    features: Sequence[str] | None,
    has_classes: bool,
    values_per_step: int | None = None,
) -> Columns:
    """Return the features in the order of the file's columns, and the targets.

    With ``values_per_step`` a row is a sequence, and cells at its end may be empty.
    Classes are integers where all are, and texts otherwise. Raises :class:`InvalidRequestError`
    with the line and the column of a cell that is empty or no finite number, and of a column that
    is missing, unnamed, named twice, or named like another input.
    """
    import numpy as np

    header = table.header or []
    chosen = _chosen(header, targets, features)
    places = [header.index(name) for name in chosen]
    rows: np.ndarray | list[np.ndarray]
    if values_per_step is None:
        columns = [_numbers(table, place) for place in places]
        rows = np.ascontiguousarray(np.array(columns).T)
    else:
        rows = _sequences(table, places, values_per_step)
    if has_classes:
        values = _labels(table, header.index(targets[0]))
    else:
        values = np.array([_numbers(table, header.index(name)) for name in targets]).T
        values = values[:, 0] if len(targets) == 1 else values
    others = [name for name in header if name not in (*chosen, *targets)]
    return Columns(chosen, others, rows, values)


def _chosen(
    header: Sequence[str], targets: Sequence[str], features: Sequence[str] | None
) -> list[str]:
    for name in (*targets, *(features or ())):
        if name not in header:
            known = ", ".join(map(shown_name, header))
            raise InvalidRequestError(f"is missing; columns: {known}", f"column {shown_name(name)}")
    chosen = [name for name in header if (name in features if features else name not in targets)]
    for place, name in enumerate(header):
        if not name and features is None:
            raise InvalidRequestError(
                "has no name; name the features in the configuration", f"column {place + 1}"
            )
        if name and name in header[:place]:
            raise InvalidRequestError("appears twice", f"column {shown_name(name)}")
    if not chosen:
        raise InvalidRequestError("has no column besides the target's")
    _check_inputs(chosen)
    return chosen


def _check_inputs(features: Sequence[str]) -> None:
    """Check that `expertmesh predict` will take every feature's column for a value of a row."""
    if list(features) in ([ROWS], [f"{ROWS}[{place}]" for place in range(len(features))]):
        return
    for name in features:
        if name.partition("[")[0] in (ROWS, TARGET):
            raise InvalidRequestError(
                f"is the name of an input of every fitted mixture, {ROWS} of rows and {TARGET} of "
                "targets; rename the column",
                f"column {shown_name(name)}",
            )


def _sequences(
    table: Table, places: Sequence[int], values_per_step: int
) -> np.ndarray | list[np.ndarray]:
    """Return the values of some columns as rows [T, V], an array where all have one length."""
    import numpy as np

    if len(places) % values_per_step:
        raise InvalidRequestError(
            f"has {len(places)} features, which are no multiple of values_per_step "
            f"{values_per_step}"
        )
    found = []
    for line, cells in table.rows:
        is_given = [place < len(cells) and bool(cells[place].strip()) for place in places]
        count = len(places) - is_given[::-1].index(True) if any(is_given) else 0
        if not count or count % values_per_step:
            raise InvalidRequestError(
                f"has {count} values of features, must be one or several steps of "
                f"{values_per_step}",
                f"line {line}",
            )
        values = [_number(table, line, cells, place) for place in places[:count]]
        found.append(np.array(values).reshape(-1, values_per_step))
    return np.array(found) if len({len(row) for row in found}) == 1 else found


def _numbers(table: Table, column: int) -> list[float]:
    return [_number(table, line, cells, column) for line, cells in table.rows]


def _number(table: Table, line: int, cells: Sequence[str], column: int) -> float:
    cell = _cell(table, line, cells, column)
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidRequestError(
            f"must be a finite number; got {shown(cell)}", _place(table, line, column)
        )
    return number


def _labels(table: Table, column: int) -> np.ndarray:
    import numpy as np

    labels = [_cell(table, line, cells, column) for line, cells in table.rows]
    integers = [_integer(label) for label in labels]
    if all(integer is not None for integer in integers):
        return np.array(integers, np.int64)
    return np.array(labels)


def _integer(cell: str) -> int | None:
    """Return a label that is an integer as it would be written again; ``None`` otherwise."""
    try:
        integer = int(cell)
    except ValueError:
        return None
    return integer if str(integer) == cell and -MAX_LABEL <= integer < MAX_LABEL else None


def _cell(table: Table, line: int, cells: Sequence[str], column: int) -> str:
    cell = cells[column].strip() if column < len(cells) else ""
    if not cell:
        raise InvalidRequestError("is empty", _place(table, line, column))
    return cell


def _place(table: Table, line: int, column: int) -> str:
    return f"line {line}, column {shown_name((table.header or [])[column])}"
