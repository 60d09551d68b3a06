"""The tensors of one or more safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError, shown_name
from experts.checkpoint.shards import DTYPES, TensorInfo, read_all
from workshop.convert.source import Entry

if TYPE_CHECKING:
    import torch


class SafetensorsFiles:
    """The tensors of files with checked headers."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        """Read the headers of one or more files in one folder.

        Raises :class:`CheckpointError` for a missing or broken file, a dtype that cannot be
        converted, and a tensor in two files.
        """
        tensors = read_all(files)
        self.entries = {name: _entry(name, info, files[0]) for name, info in tensors.items()}
        self._files = {name: files[0].parent / info.file for name, info in tensors.items()}

    def read(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows of a tensor; only these rows are read."""
        file = self._files[name]
        try:
            with safe_open(str(file), framework="pt") as opened:
                return opened.get_slice(name)[begin:end]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name} cannot be read: {error}", str(file)) from None


def _entry(name: str, info: TensorInfo, file: Path) -> Entry:
    if not info.shape or 0 in info.shape:
        raise CheckpointError(
            f"tensor {shown_name(name)} has shape {list(info.shape)}",
            str(file.with_name(info.file)),
        )
    if info.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor {shown_name(name)} has dtype {info.dtype}, and nothing says how it is "
            f"quantised; supported: {', '.join(DTYPES)}",
            str(file.with_name(info.file)),
        )
    return Entry(info.shape, DTYPES[info.dtype])
