"""The folder of a bundled mixture, written anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from experts.checkpoint.mixture import Mixture, open_mixture
from experts.mixture.parts import MIXTURE_FILE

CARD_FILE = "README.md"


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
