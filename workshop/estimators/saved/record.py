"""``estimator.json``: the class, parameters and records of a fitted estimator, beside its mixture.

Values are plain JSON. Tuples, arrays, mappings, estimators and splitters are objects with a key
that names their kind; an estimator is the path of a skops file. Nothing in the file runs code: the
class is one of :data:`ESTIMATORS`, that of a splitter one of :data:`SPLITTERS`, and attributes are
set, never called.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import KFold, LeaveOneOut, PredefinedSplit, StratifiedKFold

from cluster.errors import CheckpointError, shown, shown_name
from experts.backends.errors import described
from workshop.estimators.parts import FittedMixture
from workshop.estimators.saved.served import estimator_bytes, served_deviations

RECORD_FILE = "estimator.json"
RECORD_FORMAT = 1
LIBRARIES = ("expertmesh", "scikit-learn", "numpy", "skops")
MIXTURE_FIELDS = ("kind", "floor", "deviations")
"""The fields of a mixture that the record has; deviations only where the served format has none."""
_PACKAGE = "workshop.estimators"
ESTIMATORS: dict[str, str] = {
    f"{family}{kind}": f"{_PACKAGE}.{folder}.estimators"
    for family, folder in (
        ("AdaptiveMixture", "adaptive"),
        ("HierarchicalMixture", "hierarchical"),
        ("MixtureOfExperts", "general"),
    )
    for kind in ("Regressor", "Classifier")
}
"""The modules of the estimators that are saved and loaded, by the names of their classes."""
SPLITTERS: dict[str, type] = {
    cls.__name__: cls for cls in (KFold, LeaveOneOut, PredefinedSplit, StratifiedKFold)
}
"""The splitters that put each row into one fold, so that an estimator's ``cv`` may be one."""
_ATTRIBUTE = re.compile(r"[a-z][a-z0-9_]*_")
_PLAIN = (type(None), bool, int, float, str)
_KINDS = "biufU"


def record_of(estimator: Any) -> tuple[bytes, dict[str, bytes]]:
    """Return the text of ``estimator.json``, and the skops files that it names.

    Raises :class:`CheckpointError`, whose field is the parameter or attribute, for a value that the
    file cannot have, as a random generator, and for an estimator of another class.
    """
    name = type(estimator).__name__
    if _class_of(name) is not type(estimator):
        raise CheckpointError(
            f"{type(estimator).__module__}.{name} is not one of the estimators that are saved: "
            f"{', '.join(ESTIMATORS)}",
            "class",
        )
    writer = _Writer()
    mixture: FittedMixture = estimator.mixture_
    stored: dict[str, Any] = {"kind": mixture.kind, "floor": mixture.floor}
    if mixture.deviations is not None and served_deviations(mixture) is None:
        stored["deviations"] = mixture.deviations
    attributes = {
        key: value
        for key, value in vars(estimator).items()
        if _ATTRIBUTE.fullmatch(key) and key != "mixture_"
    }
    record = {
        "format": RECORD_FORMAT,
        "class": name,
        "versions": {library: version(library) for library in LIBRARIES},
        "parameters": writer.mapping("parameters", estimator.get_params(deep=False)),
        "attributes": writer.mapping("attributes", attributes),
        "mixture": writer.mapping("mixture", stored),
    }
    return json.dumps(record, indent=1).encode(), writer.files


class _Writer:
    """Makes JSON of values; ``files`` are the skops files of the estimators among them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def mapping(self, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self.value(f"{where}.{key}", value) for key, value in values.items()}

    def value(self, where: str, value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if type(value) in _PLAIN:
            return value
        if isinstance(value, list):
            return [self.value(where, item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [self.value(where, item) for item in value]}
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"mapping": self.mapping(where, value)}
        if isinstance(value, np.ndarray) and self._is_plain(value):
            return {"array": value.tolist(), "dtype": value.dtype.str}
        if isinstance(value, BaseEstimator):
            file = f"parameters/{len(self.files)}.skops"
            try:
                self.files[file] = estimator_bytes(clone(value))
            except Exception as error:  # skops and an estimator may raise anything
                raise CheckpointError(
                    f"skops cannot write the estimator: {described(error)}", where
                ) from error
            return {"estimator": file}
        if SPLITTERS.get(type(value).__name__) is type(value):
            names = inspect.signature(type(value)).parameters
            parameters = {name: getattr(value, name) for name in names}
            return {"splitter": type(value).__name__, "with": self.mapping(where, parameters)}
        raise CheckpointError(
            f"{type(value).__name__} cannot be saved; allowed: numbers, texts, lists, mappings, "
            f"arrays of these, estimators, {', '.join(SPLITTERS)}, None",
            where,
        )

    def _is_plain(self, array: np.ndarray) -> bool:
        if array.dtype.kind == "O":
            return all(type(item) in _PLAIN for item in array.ravel().tolist())
        return array.dtype.kind in _KINDS


def restored(
    text: bytes, where: str, mixture: FittedMixture, read: Callable[[str], Any]
) -> BaseEstimator:
    """Return the fitted estimator of a record, with its mixture.

    ``where`` is the file, ``read`` returns the estimator in a skops file. Raises
    :class:`CheckpointError`, whose field has file and key, for a record of another format, of an
    unknown class, or with values that it cannot have.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter by thousands of brackets
        raise CheckpointError(f"is not JSON: {error}", where) from None
    given = record.get("format") if isinstance(record, dict) else None
    if given != RECORD_FORMAT:
        raise CheckpointError(
            f"has the format {shown(given)}; this version reads {RECORD_FORMAT}", where
        )
    name = record.get("class")
    if name not in ESTIMATORS:
        raise CheckpointError(
            f"{shown(name)} is not one of the estimators {', '.join(ESTIMATORS)}", f"{where}: class"
        )
    reader = _Reader(where, read)
    try:
        parameters = reader.mapping("parameters", record["parameters"])
        attributes = reader.mapping("attributes", record["attributes"])
        stored = reader.mapping("mixture", record["mixture"])
        _check_names(stored, MIXTURE_FIELDS, f"{where}: mixture")
        estimator = _class_of(name)()
        _check_names(parameters, estimator.get_params(deep=False), f"{where}: parameters")
        estimator.set_params(**parameters)
        for key, value in attributes.items():
            if not _ATTRIBUTE.fullmatch(key) or hasattr(type(estimator), key):
                raise CheckpointError(f"{shown_name(key)} is no attribute", f"{where}: attributes")
            setattr(estimator, key, value)
        estimator.mixture_ = replace(mixture, **stored)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"is no record of an estimator: {described(error)}", where) from None
    return estimator


def _check_names(given: Mapping[str, Any], allowed: Any, where: str) -> None:
    for name in given:
        if name not in allowed:
            raise CheckpointError(f"{shown_name(name)} is unknown", where)


class _Reader:
    """Makes values of JSON, as :class:`_Writer` wrote them."""

    def __init__(self, where: str, read: Callable[[str], Any]) -> None:
        self._where = where
        self._read = read

    def mapping(self, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self.value(f"{where}.{key}", value) for key, value in values.items()}

    def value(self, where: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self.value(where, item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {"tuple"}:
            return tuple(self.value(where, item) for item in value["tuple"])
        if value.keys() == {"mapping"}:
            return self.mapping(where, value["mapping"])
        if value.keys() == {"array", "dtype"}:
            dtype = np.dtype(value["dtype"])
            if dtype.kind in _KINDS + "O":
                return np.array(value["array"], dtype)
        if value.keys() == {"estimator"}:
            return self._read(value["estimator"])
        if value.keys() == {"splitter", "with"} and value["splitter"] in SPLITTERS:
            return SPLITTERS[value["splitter"]](**self.mapping(where, value["with"]))
        raise CheckpointError("is a value of no known kind", f"{self._where}: {where}")


def _class_of(name: str) -> Any:
    """Return an estimator's class, or ``None`` for a name that is not in :data:`ESTIMATORS`."""
    if name not in ESTIMATORS:
        return None
    return getattr(importlib.import_module(ESTIMATORS[name]), name)
