"""The folder of a bundled mixture, written anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experts.checkpoint.mixture import Mixture, open_mixture
from experts.mixture.parts import MIXTURE_FILE
from workshop.estimators.saved.folder import document_bytes, write

CARD_FILE = "README.md"


def save_mixture(folder: Path, spec: Mapping[str, Any], files: Mapping[str, bytes]) -> Mixture:
    """Write a mixture's folder anew, without its card; returns it opened.

    Other files of weights and of estimators in the folder are deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.rglob("*.skops"), *folder.glob("*.safetensors"), *folder.glob("*.json")):
        old.unlink()
    write(folder, {MIXTURE_FILE: document_bytes(spec), **files})
    return open_mixture(folder)
