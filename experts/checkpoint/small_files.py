"""The files beside the weights: configuration, tokenizer, chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch

from cluster.errors import CheckpointError
from experts.checkpoint.config import read_small
from experts.checkpoint.stored import Stored

SMALL_FILES = ("*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt", "mixture.yaml")
"""The files from which transformers reads a configuration and a tokenizer, and a mixture's."""
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "generation_config.json",
    "*.jinja",
    "*.model",
    "vocab.txt",
    "merges.txt",
)
"""Those of them that decide which tokens a text has, and where a text ends."""
MAX_SMALL_FILES_BYTES = 256 << 20
"""The most bytes of all small files, which travel together."""


def small_files_of(checkpoint: Stored) -> Mapping[str, bytes]:
    """Return the content of a checkpoint's small files by name, of this node or of another.

    Raises :class:`CheckpointError` when one cannot be read, or when all together are longer than
    :data:`MAX_SMALL_FILES_BYTES`.
    """
    if checkpoint.remote is not None:
        return checkpoint.remote.small_files
    found = {file for pattern in SMALL_FILES for file in checkpoint.folder.glob(pattern)}
    files = sorted(file for file in found if file.is_file())
    size_bytes = sum(file.stat().st_size for file in files)
    if size_bytes > MAX_SMALL_FILES_BYTES:
        raise CheckpointError(
            f"has {size_bytes} bytes beside the weights ({', '.join(SMALL_FILES)}); at most "
            f"{MAX_SMALL_FILES_BYTES}",
            str(checkpoint.folder),
        )
    return {file.name: read_small(file) for file in files}


def text_files_of(names: Iterable[str]) -> list[str]:
    """Return the names that match :data:`TEXT_FILES`, sorted."""
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in TEXT_FILES))
