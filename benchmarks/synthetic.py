"""Mixtral checkpoints in bf16 whose shapes count and whose values do not, written at memory speed.

The values of all matrices come from one pool, again and again, so that writing takes no time for
drawing random numbers. The pool's length divides no matrix, so that experts and layers differ.
"""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.families.registry import FAMILIES

if TYPE_CHECKING:
    import torch

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


def shapes_of(config: dict[str, Any]) -> Shapes:
    """Return the shapes of all tensors by name."""
    family = FAMILIES["mixtral"]
    parts = family.expert_parts(config, family.expert_shape(config))
    return {**family.dense_tensors(config), **{part.name: part.shape for part in parts}}


def bytes_of(config: dict[str, Any]) -> int:
    """Return the bytes of all tensors in bf16."""
    return 2 * sum(map(prod, shapes_of(config).values()))


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write a checkpoint of normal values, a file for each layer and one for the rest.

    Norms are ones.
    """
    import torch

    files: dict[str, Shapes] = {}
    for name, shape in shapes_of(config).items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(NORMAL_VALUES, generator=generator) * NORMAL_DEVIATION).bfloat16()
    with ThreadPoolExecutor(WRITERS) as writers:
        for _ in writers.map(lambda file: _write_shard(folder / file, files[file], pool), files):
            pass
    index = {
        "metadata": {"total_size": bytes_of(config)},  # transformers asks for it
        "weight_map": {name: file for file, shapes in files.items() for name in shapes},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _write_shard(file: Path, shapes: Shapes, pool: torch.Tensor) -> None:
    import torch
    from safetensors.torch import save_file

    tensors, at = {}, zlib.crc32(file.name.encode()) % len(pool)
    for name, shape in shapes.items():
        count = prod(shape)
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=pool.dtype)
            continue
        pools = -(-(at + count) // len(pool))
        tensors[name] = pool.repeat(pools)[at : at + count].reshape(shape)
        at = (at + count) % len(pool)
    save_file(tensors, file, {"format": "pt"})
