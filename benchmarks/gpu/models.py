"""The random Mixtral models of the command, and how many layers of the largest one fit the card.

A model's checkpoint is written for the run (:mod:`benchmarks.synthetic`). It goes where the most of
its layers fit: to the host's shared memory, which takes gigabytes a second, or to the temporary
folder.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import SIZES
from benchmarks.synthetic import MIXTRAL, bytes_of
from cluster.memory import memory
from router.ops.doctor.machine import SHARED_MEMORY, writable_folder

SMALL = {**MIXTRAL, **SIZES}
"""111 M parameters: the model of ``benchmarks.decode``."""
MEDIUM = {**SMALL, "hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 8192}
"""445 M parameters."""
LARGE = {
    **MIXTRAL,
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
"""6.7 billion parameters: OLMoE-7B's width, depth and active size, as 8 experts with two of them
active in place of its 64 with eight."""
RESERVED_BYTES = 5 << 30
"""Of the card, for what is neither weights nor cache: three processes' contexts and libraries, and
products."""
HOST_RESERVED_BYTES = 6 << 30
"""Of the host's memory, for the processes."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that are free on the card, in the host's memory, and in folders for a checkpoint."""

    device_bytes: int
    host_bytes: int
    folder_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A model that fits a machine, the folder for its checkpoint, and why it has that size."""

    config: dict[str, Any]
    folder: str
    reason: str

    @property
    def num_bytes(self) -> int:
        """The bytes of its weights."""
        return bytes_of(self.config)

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return self.num_bytes // 2


class NoRoomError(Exception):
    """Not even one layer fits."""


def room(device_bytes: int) -> Room:
    """Return the room of this machine beside ``device_bytes`` of its card."""
    folders = dict.fromkeys((SHARED_MEMORY, Path(tempfile.gettempdir())))
    disks = {str(folder): writable_folder(folder) for folder in folders if folder.is_dir()}
    free = {folder: disk.free_bytes for folder, disk in disks.items() if not disk.reason}
    return Room(device_bytes, memory().available_bytes, free)


def fitted(config: dict[str, Any], given: Room) -> Fitted:
    """Return the model with as many of its layers as fit; raises :class:`NoRoomError` for none.

    While transformers loads it, the host's memory has all weights, beside a checkpoint in shared
    memory.
    """
    whole = config["num_hidden_layers"]
    by_folder = {}
    for folder, free_bytes in given.folder_bytes.items():
        copies = 2 if Path(folder) == SHARED_MEMORY else 1
        bounds = {
            "the card": given.device_bytes - RESERVED_BYTES,
            "the host's memory": (given.host_bytes - HOST_RESERVED_BYTES) // copies,
            folder: free_bytes,
        }
        layers = {name: _layers_in(config, num_bytes) for name, num_bytes in bounds.items()}
        tightest = min(layers, key=lambda name: layers[name])
        by_folder[folder] = (min(whole, layers[tightest]), tightest, bounds[tightest])
    folder = max(by_folder, key=lambda name: by_folder[name][0], default="")
    layers, tightest, free_bytes = by_folder.get(folder, (0, "any folder", 0))
    if layers < 1:
        raise NoRoomError(f"{tightest} has no room for one layer of the model")
    made = {**config, "num_hidden_layers": layers}
    size = f"{bytes_of(made) / 1e9:.1f} GB"
    if layers == whole:
        reason = f"all {whole} layers, {size}: they fit the card and the host"
    else:
        reason = (
            f"{layers} of {whole} layers, {size}: {tightest} has {max(0, free_bytes) / 1e9:.1f} GB "
            "for them"
        )
    return Fitted(made, folder, reason)


def _layers_in(config: dict[str, Any], num_bytes: int) -> int:
    """Return how many layers of a model fit, beside its embedding and head."""
    one, two = (bytes_of({**config, "num_hidden_layers": layers}) for layers in (1, 2))
    layer_bytes = two - one
    return max(0, (num_bytes - (one - layer_bytes)) // layer_bytes)


def name_of(config: dict[str, Any]) -> str:
    """Return a model's name by its parameters, such as ``111M`` and ``6.7B``."""
    millions = bytes_of(config) / 2e6
    return f"{millions:.0f}M" if millions < 1000 else f"{millions / 1000:.1f}B"
