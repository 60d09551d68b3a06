"""Rows of a CSV file as tensors of a mixture, and tensors as rows of a file.

A column belongs to the input that it names, as ``name`` or, for one value of several, ``name[3]``.
All other columns, in their order, are the values of the input that the experts take.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import InvalidRequestError, shown, shown_name
from router.client import MixtureInfo, TensorInfo

if TYPE_CHECKING:
    import numpy as np

MAX_BATCH_BYTES = 1024 * 1024
"""The most bytes of a request with several rows, well below a gateway's usual limit."""
_PLACE = re.compile(r"(?P<name>.+)\[(?P<place>[0-9]{1,9})\]")
_BOOLS = {"true": True, "1": True, "false": False, "0": False}
Cells = list[str]


@dataclass(frozen=True, slots=True)
class Table:
    """A file's rows of texts, each with its line; ``header`` is ``None`` where there is none."""

    header: Cells | None
    rows: list[tuple[int, Cells]]


@dataclass(frozen=True, slots=True)
class Row:
    """The values of one row, flattened, by the input's name."""

    values: Mapping[str, list[Any]]

    def lengths(self) -> tuple[int, ...]:
        """Return the number of values of each input; a request has rows of equal numbers."""
        return tuple(map(len, self.values.values()))


def read_table(lines: Iterable[str], has_header: bool | None) -> Table:
    """Read a CSV file; without ``has_header`` a first line with a cell that is no number is one.

    Raises :class:`InvalidRequestError` with the line where the file is not valid CSV, has no rows,
    or has a row longer than the header.
    """
    reader = csv.reader(lines, strict=True)
    rows: list[tuple[int, Cells]] = []
    try:
        rows.extend((reader.line_num, cells) for cells in reader if any(map(str.strip, cells)))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"is not valid CSV: {error}", f"line {reader.line_num + 1}"
        ) from None
    if rows and has_header is None:
        has_header = not all(_is_number(cell) for cell in rows[0][1])
    header = [cell.strip() for cell in rows.pop(0)[1]] if rows and has_header else None
    if not rows:
        hint = "; its first line was read as the names of columns (--no-header)" if header else ""
        raise InvalidRequestError(f"has no rows{hint}")
    for line, cells in rows:
        if header is not None and len(cells) > len(header):
            raise InvalidRequestError(
                f"has {len(cells)} cells, but the header has {len(header)}", f"line {line}"
            )
    return Table(header, rows)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def parse_rows(table: Table, info: MixtureInfo, ignored: Sequence[str]) -> list[Row]:
    """Return the values of each row, by the inputs that its columns belong to.

    Raises :class:`InvalidRequestError` with the line and the column of a wrong cell.
    """
    width = max(len(cells) for _, cells in table.rows)
    names = table.header or [str(place) for place in range(width)]
    columns = _columns(names if table.header else None, width, info, ignored)
    return [_row(line, cells, columns, names) for line, cells in table.rows]


def _columns(
    header: Cells | None, width: int, info: MixtureInfo, ignored: Sequence[str]
) -> dict[str, tuple[TensorInfo, list[int]]]:
    """Return the columns of each input, in the order of the input's values."""
    if header is None and ignored:
        raise InvalidRequestError("the file has no header, so --ignore cannot name a column")
    named: dict[str, dict[int, int]] = {}
    others: list[int] = []
    for column, name in enumerate(header or [""] * width):
        if name in ignored:
            continue
        tensor, place = _named(name, info.inputs)
        if tensor is None:
            others.append(column)
        elif place in named.setdefault(tensor.name, {}):
            raise InvalidRequestError("appears twice", f"column {shown_name(name)}")
        else:
            named[tensor.name][place] = column
    rows = info.inputs[0]
    if others and rows.name in named:
        names = ", ".join(shown_name((header or [])[column]) for column in others)
        raise InvalidRequestError(
            f"belong to no input; inputs: {', '.join(given.name for given in info.inputs)}",
            f"columns {names}",
        )
    if others:
        named[rows.name] = dict(enumerate(others))
    columns = {}
    for tensor in info.inputs:
        if tensor.name not in named:
            continue  # the server knows whether it is needed
        places = named[tensor.name]
        _check_places(sorted(places), tensor)
        columns[tensor.name] = (tensor, [places[place] for place in sorted(places)])
    return columns


def _named(name: str, inputs: Sequence[TensorInfo]) -> tuple[TensorInfo | None, int]:
    match = _PLACE.fullmatch(name)
    for tensor in inputs:
        if name == tensor.name:
            return tensor, 0
        if match is not None and match["name"] == tensor.name:
            return tensor, int(match["place"])
    return None, 0


def _check_places(places: list[int], tensor: TensorInfo) -> None:
    """Check that the columns of an input are all of its values."""
    row = tensor.shape[1:]
    step = math.prod(n for n in row if n != -1)
    needed = f"{step} values, or a multiple of them" if -1 in row else f"{step} values"
    if places != list(range(len(places))):
        missing = next(n for n, place in enumerate(places) if n != place)
        raise InvalidRequestError("is missing", f"column {tensor.name}[{missing}]")
    if len(places) != step and (-1 not in row or len(places) % step):
        raise InvalidRequestError(
            f"has {len(places)} columns, must have {needed} of {tensor.datatype}",
            f"input {tensor.name}",
        )


def _row(
    line: int,
    cells: Cells,
    columns: Mapping[str, tuple[TensorInfo, list[int]]],
    names: Sequence[str],
) -> Row:
    values: dict[str, list[Any]] = {}
    for name, (tensor, places) in columns.items():
        given = [cells[place].strip() if place < len(cells) else "" for place in places]
        if -1 in tensor.shape[1:]:  # a shorter sequence leaves cells at the end empty
            while given and not given[-1]:
                given.pop()
        parse = _PARSERS[tensor.datatype]
        parsed = []
        for place, cell in zip(places, given, strict=False):
            try:
                parsed.append(parse(cell))
            except (ValueError, KeyError):
                raise InvalidRequestError(
                    f"must be a value of {tensor.datatype}; got {shown(cell)}",
                    f"line {line}, column {shown_name(names[place])}",
                ) from None
        step = math.prod(n for n in tensor.shape[1:] if n != -1)
        if not parsed or len(parsed) % step:
            raise InvalidRequestError(
                f"has {len(parsed)} values of {name}, must have a multiple of {step}",
                f"line {line}",
            )
        values[name] = parsed
    return Row(values)


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "BOOL": lambda cell: _BOOLS[cell.lower()],
    "UINT8": int,
    "INT32": int,
    "INT64": int,
    "FP32": float,
    "FP64": float,
}


def batches(
    rows: Sequence[Row], info: MixtureInfo, max_rows: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the inputs of each request: rows in their order, of equal lengths within a request.

    Raises :class:`InvalidRequestError` for a number that its datatype cannot hold.
    """
    start = 0
    while start < len(rows):
        row_bytes = 8 * max(1, sum(rows[start].lengths()))
        most = max(1, min(max_rows, MAX_BATCH_BYTES // row_bytes))
        end = start + 1
        while end - start < most and end < len(rows):
            if rows[end].lengths() != rows[start].lengths():
                break
            end += 1
        yield {
            tensor.name: _array(tensor, [row.values[tensor.name] for row in rows[start:end]])
            for tensor in info.inputs
            if tensor.name in rows[start].values
        }
        start = end


def _array(tensor: TensorInfo, rows: list[list[Any]]) -> np.ndarray:
    import numpy as np

    from router.messages.tensor_bytes import NUMPY_DTYPES

    dtype = NUMPY_DTYPES[tensor.datatype]
    try:
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            if any(not limits.min <= value <= limits.max for row in rows for value in row):
                raise OverflowError
        array = np.array(rows, dtype)
    except OverflowError:
        raise InvalidRequestError(
            f"has a number that {tensor.datatype} cannot hold", f"input {tensor.name}"
        ) from None
    return array.reshape(len(rows), *tensor.shape[1:])


def output_columns(outputs: Sequence[TensorInfo]) -> list[str]:
    """Return the names of a file's columns; an output of any length is one column, as JSON."""
    names: list[str] = []
    for output in outputs:
        size = math.prod(output.shape[1:])
        is_one = size == 1 or -1 in output.shape[1:]
        names += [output.name] if is_one else [f"{output.name}[{n}]" for n in range(size)]
    return names


def output_rows(
    arrays: Mapping[str, np.ndarray], outputs: Sequence[TensorInfo]
) -> Iterator[list[Any]]:
    """Yield a row of :func:`output_columns`' values for each row of a prediction."""
    values = [plain(arrays[output.name]) for output in outputs]
    for row in zip(*values, strict=True):
        cells: list[Any] = []
        for output, value in zip(outputs, row, strict=True):
            if -1 in output.shape[1:]:
                cells.append(json.dumps(value))
            else:
                cells += _flat(value)
        yield cells


def output_objects(
    arrays: Mapping[str, np.ndarray], outputs: Sequence[TensorInfo]
) -> Iterator[dict[str, Any]]:
    """Yield an object for each row of a prediction; an output of one value is that value."""
    values = {output.name: plain(arrays[output.name]) for output in outputs}
    sizes = {output.name: math.prod(output.shape[1:]) for output in outputs}
    for place in range(len(next(iter(values.values())))):
        yield {
            name: _flat(rows[place])[0] if sizes[name] == 1 else rows[place]
            for name, rows in values.items()
        }


def plain(array: np.ndarray) -> list[Any]:
    """Return an array as lists; an FP32 has the fewest digits that mean it, and no finite number
    is ``None``."""
    import numpy as np

    if array.dtype.kind != "f":
        return list(array.tolist())
    numbers = array.astype("U").astype(np.float64) if array.dtype.itemsize == 4 else array
    listed = numbers.astype(object)
    listed[~np.isfinite(numbers)] = None
    return list(listed.tolist())


def _flat(value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    return [item for part in value for item in _flat(part)]
