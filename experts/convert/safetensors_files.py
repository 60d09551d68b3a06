"""The tensors of one or more safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError
from experts.checkpoint import DTYPES
from experts.convert.source import Entry

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
        for file in files:
            for name, entry in _header(file).items():
                if name in self._entries:
                    raise CheckpointError(
                        f"tensor {name} is also in {self._files[name]}", str(file)
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
    if not file.is_file():
        raise CheckpointError("is missing", str(file))
    entries = {}
    try:
        with safe_open(str(file), framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is not a mapping
                part = opened.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in DTYPES:
                    raise CheckpointError(
                        f"tensor {name} has dtype {dtype}; supported: {', '.join(DTYPES)}",
                        str(file),
                    )
                if not shape or 0 in shape:
                    raise CheckpointError(f"tensor {name} has shape {list(shape)}", str(file))
                entries[name] = Entry(shape, DTYPES[dtype])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"is not a whole safetensors file ({error})", str(file)) from None
    return entries
