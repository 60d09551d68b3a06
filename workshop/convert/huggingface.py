"""The served layout as a source: a conversion changes the dtype and the size of the shards.

The conversion of a quantised checkpoint has plain weights. The conversion of a model that was
published with two sets of names always has the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.config import read_json
from experts.checkpoint.quantization import quantization_of
from experts.checkpoint.shards import DTYPES, INDEX_FILE, WEIGHTS_FILE, weight_map_of
from experts.families.grok import GROK_1, GROK_1_OF_XAI, name_of_xai
from workshop.convert.source import (
    QUANTISED,
    Entry,
    MadeTensors,
    SafetensorsFiles,
    Source,
    Take,
    Tensors,
)

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"
_RENAMED = {GROK_1_OF_XAI.model_type: (GROK_1.model_type, name_of_xai)}
"""By the old ``model_type``: the new one, and the function from a new name to the old name."""


def is_huggingface(path: Path) -> bool:
    """Return whether a folder has this layout's configuration and weights."""
    has_weights = (path / WEIGHTS_FILE).exists() or (path / INDEX_FILE).exists()
    return (path / CONFIG_FILE).exists() and has_weights


def open_huggingface(path: Path) -> Source:
    """Read a folder's configuration and headers; raises :class:`CheckpointError`."""
    config_file = path / CONFIG_FILE
    config = read_json(config_file)
    shards = shards_of(path)
    if quantization_of(config, config_file) is None:
        tensors: Tensors = SafetensorsFiles(shards)
    else:
        tensors = _dequantised(open_checkpoint(path))
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    files = (config_file, *shards)
    old_name: Callable[[str], str] = str
    if str(config.get("model_type")) in _RENAMED:
        model_type, old_name = _RENAMED[config["model_type"]]
        config = config | {"model_type": model_type}

    def takes(name: str) -> list[Take]:
        return [Take(old_name(name))]

    return Source("huggingface", path, config_file, config, tensors, files, takes)


def _dequantised(checkpoint: Checkpoint) -> MadeTensors:
    """Return the tensors of a checkpoint with quantised tensors."""
    packed = checkpoint.packed.values()
    stored = {name for tensor in packed for name in (tensor.codes, tensor.scales)}
    entries = {
        name: Entry(info.shape, DTYPES[info.dtype])
        for name, info in checkpoint.tensors.items()
        if name not in stored
    } | {name: Entry(tensor.shape, QUANTISED) for name, tensor in checkpoint.packed.items()}

    def make(name: str) -> torch.Tensor:
        from cluster.wire.tensors import from_array
        from experts.checkpoint.expert_weights import read_tensor

        return from_array(read_tensor(checkpoint, name, "float32"))

    return MadeTensors(entries, make)


def shards_of(path: Path) -> tuple[Path, ...]:
    """Return the files of a folder's weights; raises :class:`CheckpointError` for a wrong index."""
    index_file = path / INDEX_FILE
    if not index_file.exists():
        return (path / WEIGHTS_FILE,)
    weight_map = weight_map_of(read_json(index_file), index_file)
    return tuple(path / name for name in sorted(set(weight_map.values())))
