"""Folders of models beside a deployment file, which its relative paths name first."""

from __future__ import annotations

import importlib.resources
from copy import deepcopy
from pathlib import Path
from typing import Any


def bundled(path: str) -> Path:
    """Return where the installed ``deploy`` package would have a relative path."""
    return Path(str(importlib.resources.files("deploy"))) / path


def folder_beside(path: str, folder: Path) -> Path | None:
    """Return the folder of a relative path in ``folder``, unless the package has the same one.

    The package's is then the better name, because every node of a cluster has it.
    """
    found = (folder / path).resolve()
    if Path(path).is_absolute() or not found.is_dir():
        return None
    return None if _sizes(found) == _sizes(bundled(path)) else found


def _sizes(folder: Path) -> dict[str, int] | None:
    if not folder.is_dir():
        return None
    return {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}


def localized(document: Any, folder: Path) -> Any:
    """Return a deployment file's document with absolute paths of the models in its ``folder``."""
    whole = deepcopy(document)
    for model in models_in(whole):
        if beside := folder_beside(model["path"], folder):
            model["path"] = str(beside)
    return whole


def models_in(document: Any) -> list[dict[str, Any]]:
    """Return the models that have a path, of all applications of a document, valid or not."""
    found: list[Any] = [document]
    for key in ("applications", "args", "models"):
        under = [one.get(key) for one in found if isinstance(one, dict)]
        found = [x for one in under for x in (one if isinstance(one, list) else [one])]
    return [one for one in found if isinstance(one, dict) and isinstance(one.get("path"), str)]
