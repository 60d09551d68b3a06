"""The tensors of one or more safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError
from cluster.shown import shown_name
from experts.convert.source import Entry
from experts.shards import DTYPES, MAX_HEADERS_BYTES, checked_header_bytes, read_header

if TYPE_CHECKING:
    import torch


class SafetensorsFiles:
    """Tensors read from files whose headers have been checked."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        """Read the headers.

        Raises :class:`CheckpointError` for a file that is missing or broken, a dtype that cannot be
        converted and a tensor that is in two files.
        """
        self._entries: dict[str, Entry] = {}
        self._files: dict[str, Path] = {}
        left_bytes = MAX_HEADERS_BYTES
        for file in files:
            left_bytes -= checked_header_bytes(file, left_bytes)
            for name, entry in _header(file).items():
                if name in self._entries:
                    raise CheckpointError(
                        f"tensor {shown_name(name)} is also in {self._files[name]}", str(file)
                    )
                self._entries[name] = entry
                self._files[name] = file

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What there is."""
        return self._entries

    def read(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows of a tensor; only they are read."""
        file = self._files[name]
        try:
            with safe_open(str(file), framework="pt") as opened:
                return opened.get_slice(name)[begin:end]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name} cannot be read: {error}", str(file)) from None


def _header(file: Path) -> dict[str, Entry]:
    entries = {}
    for name, info in read_header(file).items():
        if not info.shape or 0 in info.shape:
            raise CheckpointError(
                f"tensor {shown_name(name)} has shape {list(info.shape)}", str(file)
            )
        entries[name] = Entry(info.shape, DTYPES[info.dtype])
    return entries
