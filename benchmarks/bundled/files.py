"""Files of a mixture whose bytes follow from their content alone: skops, safetensors, YAML."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save
from skops.io import dumps

from experts.checkpoint.mixture import Mixture, open_mixture
from experts.mixture.parts import MIXTURE_FILE

CARD_FILE = "README.md"
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


def save_mixture(folder: Path, spec: Mapping[str, Any], files: Mapping[str, bytes]) -> Mixture:
    """Write a mixture's folder anew, without its card; returns it opened.

    Files of weights that the mixture does not name are deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.skops"), *folder.glob("*.safetensors")):
        old.unlink()
    text = yaml.safe_dump(dict(spec), sort_keys=False, default_flow_style=None, width=100)
    (folder / MIXTURE_FILE).write_text(text, encoding="utf-8")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return open_mixture(folder)
