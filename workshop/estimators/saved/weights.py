"""Files of weights whose bytes follow from their content alone: skops and safetensors."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save
from skops.io import dumps

_SCHEMA = "schema.json"
_DATE = (1980, 1, 1, 0, 0, 0)
"""The earliest date that a zip archive can give a file."""


def estimator_bytes(estimator: Any) -> bytes:
    """Return a fitted estimator as a compressed skops file.

    skops names objects by their addresses and dates the archive. Numbers in order of appearance
    replace the addresses here, and a fixed date the other, so that equal estimators have equal
    bytes.
    """
    with zipfile.ZipFile(io.BytesIO(dumps(estimator))) as archive:
        schema = json.loads(archive.read(_SCHEMA))
        numbers: dict[int, int] = {}
        names: dict[str, str] = {}
        _renumber(schema, numbers, names)
        entries = {names[name]: archive.read(name) for name in archive.namelist() if name in names}
    if len(entries) != len(names):
        raise ValueError("the schema of skops names a file that is not in its archive")
    entries[_SCHEMA] = json.dumps(schema, separators=(",", ":")).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in sorted(entries.items()):
            archive.writestr(zipfile.ZipInfo(name, _DATE), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _renumber(node: Any, numbers: dict[int, int], names: dict[str, str]) -> None:
    """Replace the addresses in a schema; ``names`` gets the new name of each array's file."""
    if isinstance(node, dict):
        if "__id__" in node:
            node["__id__"] = numbers.setdefault(node["__id__"], len(numbers))
        if "file" in node and "__loader__" in node:
            node["file"] = names.setdefault(node["file"], f"{len(names)}.npy")
        for value in node.values():
            _renumber(value, numbers, names)
    elif isinstance(node, list):
        for value in node:
            _renumber(value, numbers, names)


def tensor_bytes(tensors: Mapping[str, np.ndarray], dtype: str) -> bytes:
    """Return tensors of one dtype as a safetensors file."""
    return save({name: np.array(t, dtype, order="C") for name, t in sorted(tensors.items())})
