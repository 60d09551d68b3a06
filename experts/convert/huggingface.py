"""The layout that is served itself: a conversion changes its dtype and its shards' size only."""

from __future__ import annotations

from pathlib import Path

from experts.checkpoint import read_json
from experts.convert.safetensors_files import SafetensorsFiles
from experts.convert.source import Source, Take
from experts.shards import INDEX_FILE, WEIGHTS_FILE, weight_map_of

CONFIG_FILE = "config.json"


def is_huggingface(path: Path) -> bool:
    """Tell whether a folder has this layout's configuration and weights."""
    has_weights = (path / WEIGHTS_FILE).exists() or (path / INDEX_FILE).exists()
    return (path / CONFIG_FILE).exists() and has_weights


def open_huggingface(path: Path) -> Source:
    """Read a folder's configuration and headers; raises :class:`CheckpointError`."""
    config_file = path / CONFIG_FILE
    config = read_json(config_file)
    shards = _shards(path)
    files = (config_file, *shards)
    return Source("huggingface", path, config_file, config, SafetensorsFiles(shards), _takes, files)


def _takes(name: str) -> list[Take]:
    return [Take(name)]


def _shards(path: Path) -> tuple[Path, ...]:
    index_file = path / INDEX_FILE
    if not index_file.exists():
        return (path / WEIGHTS_FILE,)
    weight_map = weight_map_of(read_json(index_file), index_file)
    return tuple(path / name for name in sorted(set(weight_map.values())))
