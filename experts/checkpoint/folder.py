"""Opening a model's folder, whichever kind of model it has: a checkpoint or a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster.errors import CheckpointError
from experts.checkpoint.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
from experts.checkpoint.config import parse_json
from experts.checkpoint.mixture import Mixture, is_mixture, mixture_of, open_mixture
from experts.checkpoint.shards import TensorInfo
from experts.checkpoint.stored import RemoteFiles, Stored
from experts.mixture.parts import MIXTURE_FILE


def open_folder(folder: Path) -> Checkpoint | Mixture:
    """Open a folder of this node; raises as the function for its kind does."""
    return open_mixture(folder) if is_mixture(folder) else open_checkpoint(folder)


def described_folder(
    folder: Path,
    small_files: Mapping[str, bytes],
    tensors: Mapping[str, TensorInfo],
    remote: RemoteFiles,
) -> Checkpoint | Mixture:
    """Check a folder of another node by its small files and headers, as :func:`open_folder` does.

    ``remote`` reads its bytes.
    """
    text = small_files.get(MIXTURE_FILE)
    if text is None:
        config = parse_json(small_files.get("config.json", b""), folder / "config.json")
        return checkpoint_of(folder, config, lambda: dict(tensors), remote)

    def sizes(names: tuple[str, ...]) -> dict[str, int]:
        missing = next((name for name in names if name not in tensors), None)
        if missing is not None:
            raise CheckpointError(f"{MIXTURE_FILE} names a missing file", str(folder / missing))
        return {name: tensors[name].num_bytes for name in names}

    return mixture_of(folder, text, sizes, remote)


def language_model(stored: Stored) -> Checkpoint:
    """Return an opened folder as a checkpoint; raises :class:`CheckpointError` for a mixture."""
    if not isinstance(stored, Checkpoint):
        raise CheckpointError("is a mixture, not a language model", str(stored.folder))
    return stored
