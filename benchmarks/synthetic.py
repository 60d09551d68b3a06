"""Mixtral checkpoints in bf16 whose shapes count and whose values do not, written at memory speed.

The values of all matrices come from one pool, again and again, so that writing takes no time for
drawing random numbers. The pool's length divides no matrix, so that experts and layers differ.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

from experts.families.registry import FAMILIES

Shapes = dict[str, tuple[int, ...]]

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
"""The part of a configuration that is no size of a matrix."""
WRITERS = 4
"""Threads that write; each has a file."""
NORMAL_VALUES = (1 << 23) - 15
"""A prime, so that no tensor's rows repeat the rows of another tensor."""
NORMAL_DEVIATION = 0.02
"""That of transformers' own initialisation."""
_ONE = b"\x80\x3f"
"""1.0 in bf16."""


def shapes_of(config: dict[str, Any]) -> Shapes:
    """Return the shapes of all tensors by name."""
    family = FAMILIES["mixtral"]
    parts = family.expert_parts(config, family.expert_shape(config))
    return {**family.dense_tensors(config), **{part.name: part.shape for part in parts}}


def bytes_of(config: dict[str, Any]) -> int:
    """Return the bytes of all tensors in bf16."""
    return 2 * sum(map(prod, shapes_of(config).values()))


def normal_pool(seed: int = 0) -> memoryview:
    """Return the bytes of normally distributed bf16 values."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(NORMAL_VALUES, generator=generator) * NORMAL_DEVIATION
    return values.bfloat16().view(torch.uint8).numpy().data


def write_checkpoint(
    folder: Path, config: dict[str, Any], pool: memoryview, *, is_synced: bool = False
) -> None:
    """Write a checkpoint with the pool's bytes, a file for each layer and one for the rest.

    Norms are ones. With ``is_synced`` the files are on the disk at the return, so that the kernel
    can forget them.
    """
    files: dict[str, Shapes] = {}
    for name, shape in shapes_of(config).items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    with ThreadPoolExecutor(WRITERS) as writers:
        written = [
            writers.submit(_write_shard, folder / file, shapes, pool, is_synced)
            for file, shapes in files.items()
        ]
    for one in written:
        one.result()
    index = {
        "metadata": {"total_size": bytes_of(config)},  # transformers asks for it
        "weight_map": {name: file for file, shapes in files.items() for name in shapes},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _write_shard(file: Path, shapes: Shapes, pool: memoryview, is_synced: bool) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    at = 2 * zlib.crc32(file.name.encode()) % len(pool)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(encoded)) + encoded)
        for shape in shapes.values():
            if len(shape) == 1:
                opened.write(_ONE * prod(shape))
                continue
            left = 2 * prod(shape)
            while left:
                piece = pool[at : at + left]
                opened.write(piece)
                left -= len(piece)
                at = (at + len(piece)) % len(pool)
        if is_synced:
            opened.flush()
            os.fsync(opened.fileno())
