"""An opened dense model with the files of its tokenizer, which GGUF has among its metadata."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.errors import CheckpointError
from experts.checkpoint.config_checks import is_size
from experts.checkpoint.hub import name_of
from experts.checkpoint.stored import resolve_folder
from experts.families.base import Config
from workshop.convert.dense import open_dense
from workshop.convert.gguf_file import GgufFile
from workshop.convert.gguf_tokenizer import write_tokenizer
from workshop.convert.source import Source

_WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True, slots=True)
class DenseModel:
    """A dense model that is not served; ``source.folder`` has its tokenizer."""

    source: Source

    @property
    def name(self) -> str:
        """The name of its folder or file, or its hub id with the commit."""
        return name_of(self.source.path)

    @property
    def family(self) -> str:
        """Its ``model_type``."""
        return str(self.source.config["model_type"])

    @property
    def num_bytes(self) -> int:
        """Bytes of the files with weights."""
        return sum(file.stat().st_size for file in self.source.files if file.suffix in _WEIGHTS)

    @property
    def folder(self) -> Path:
        """The folder of its tokenizer."""
        return self.source.folder

    @property
    def config(self) -> Config:
        """Its ``config.json``."""
        return self.source.config

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._size("vocab_size")

    @property
    def max_position_embeddings(self) -> int:
        """Its longest context in tokens."""
        return self._size("max_position_embeddings")

    def _size(self, key: str) -> int:
        value = self.source.config.get(key)
        if not is_size(value):
            raise CheckpointError(f"lacks a positive {key}", str(self.source.config_file))
        return int(value)  # type: ignore[arg-type]


@contextmanager
def opened_dense(path: str) -> Iterator[DenseModel]:
    """Open a folder, a hub id or a GGUF file; the tokenizer of GGUF is there until the end.

    Raises as :func:`workshop.convert.dense.open_dense` does, and :class:`CheckpointError` for a
    tokenizer in GGUF that is not known.
    """
    found = Path(path).absolute() if Path(path).exists() else resolve_folder(path)
    source = open_dense(found)
    if not isinstance(source.tensors, GgufFile):
        yield DenseModel(source)
        return
    with TemporaryDirectory(prefix="expertmesh-") as folder:
        write_tokenizer(source.tensors, Path(folder))
        yield DenseModel(replace(source, text_folder=Path(folder)))
