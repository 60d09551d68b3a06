"""Finding the layout of a path, and opening it."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import CheckpointError
from experts.checkpoint.shards import PICKLE_SUFFIXES, listed_names
from workshop.convert.gguf_file import is_gguf, open_gguf
from workshop.convert.huggingface import is_huggingface, open_huggingface
from workshop.convert.mistral import is_mistral, open_mistral
from workshop.convert.source import Source

_ALLOWED = (
    "a folder with config.json and safetensors, a folder with params.json and "
    "consolidated*.safetensors, or a .gguf file"
)


def open_source(path: Path) -> Source:
    """Open a model in any known layout; reads the configuration and the headers, and no weight.

    Raises :class:`CheckpointError` for a path without a known layout, for pickles, which are never
    loaded, and for the errors of the layout.
    """
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise CheckpointError(f"no such file or folder; allowed: {_ALLOWED}", str(path))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", str(path)) from None
    if path.suffix in PICKLE_SUFFIXES:
        raise _pickled(path, [path.name])
    if not path.is_file() or not is_gguf(path):
        raise CheckpointError(f"is not a known layout; allowed: {_ALLOWED}", str(path))
    return open_gguf(path)


def _open_folder(path: Path) -> Source:
    if is_huggingface(path):
        return open_huggingface(path)
    if is_mistral(path):
        return open_mistral(path)
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise _pickled(path, pickles)
    raise CheckpointError(f"is not a known layout; allowed: {_ALLOWED}", str(path))


def _pickled(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"has only pickle weights ({listed_names(names)}), which can run any "
        "program when they are loaded and so never are; look for the model's safetensors",
        str(path),
    )
