"""Saving a fitted estimator in the format that is served, and loading it again.

The weights are stored once, as gates and experts of the served mixture. ``estimator.json`` beside
them has the rest (:mod:`workshop.estimators.saved.record`), and ``README.md`` is the card.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from sklearn.base import BaseEstimator

from cluster.errors import CheckpointError, shown
from experts.backends.check import check_mixture
from experts.backends.skops_file import read_estimator
from experts.checkpoint.mixture import open_mixture
from experts.mixture.parts import MIXTURE_FILE
from workshop.estimators.saved.card import card_of
from workshop.estimators.saved.record import RECORD_FILE, record_of, restored
from workshop.estimators.saved.served import content_of, mixture_of

CARD_FILE = "README.md"
MAX_RECORD_BYTES = 64 << 20


def save(estimator: Any, folder: Path) -> None:
    """Write a fitted estimator into a new or empty folder, whole or not at all.

    Every gate is read and every expert tried, as before serving, and every parameter is read again.
    Raises :class:`CheckpointError`, whose field is the file or the part: for a folder with files,
    for a part that cannot be written or would not be served, and where the disk does not take it.
    """
    folder = folder.resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError("holds other files; name a new or empty folder", str(folder))
    document, files = files_of(estimator)
    card = card_of(estimator, document, folder.name)
    content = {MIXTURE_FILE: document_bytes(document), CARD_FILE: card.encode(), **files}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            staging.chmod(0o755)
            write(staging, content)
            _check(staging, folder)
            staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error}", str(folder)) from error


def files_of(estimator: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the document of ``mixture.yaml`` of a fitted estimator, and all files but the card.

    The names and datatypes of inputs and outputs in the document may be changed: :func:`load` reads
    them by their places. Raises :class:`CheckpointError` for a part that cannot be written.
    """
    mixture = estimator.mixture_
    description = f"{type(estimator).__name__} of {len(mixture.experts)} experts"
    document, files = content_of(mixture, getattr(estimator, "classes_", None), description)
    record, parameters = record_of(estimator)
    return document, {**files, RECORD_FILE: record, **parameters}


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """Return the text of ``mixture.yaml``."""
    text: str = yaml.safe_dump(dict(document), sort_keys=False, default_flow_style=None, width=100)
    return text.encode()


def write(folder: Path, content: Mapping[str, bytes]) -> None:
    """Write files into a folder, by their paths in it."""
    for name, data in content.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def _check(staging: Path, folder: Path) -> None:
    """Check a written folder; errors name the ``folder`` that it will be."""
    try:
        load(staging)
    except CheckpointError as error:
        field = error.field.replace(str(staging), str(folder))
        raise CheckpointError(error.message, field) from None


def load(folder: Path) -> BaseEstimator:
    """Return the fitted estimator that :func:`save` wrote, of the class that wrote it.

    No pickle is read. Raises :class:`CheckpointError`, whose field has file and key, as
    :func:`experts.checkpoint.mixture.open_mixture`, :func:`experts.backends.check.check_mixture`,
    :func:`workshop.estimators.saved.served.mixture_of` and
    :func:`workshop.estimators.saved.record.restored` do.
    """
    opened = open_mixture(folder)
    check_mixture(opened)
    record = folder / RECORD_FILE
    text = _bytes_of(record)
    if len(text) > MAX_RECORD_BYTES:
        raise CheckpointError(f"has more than {MAX_RECORD_BYTES} bytes", str(record))

    def read(name: Any) -> BaseEstimator:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"{shown(name)} is no file of the folder", str(record))
        return read_estimator(_bytes_of(folder / path), str(folder / path))[0]

    return restored(text, str(record), mixture_of(opened), read)


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", str(file)) from None
