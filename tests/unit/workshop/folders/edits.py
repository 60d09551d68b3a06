"""Checkpoints whose weights are changed, so that it is known what a command must give."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.expert_weights import part_of
from workshop.folders.rewritten import new_config

State = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"
HIGH, SPREAD = 40.0, 20.0
"""A value that one feature of all tokens has, above all that the layers add to it, and a factor of
all other features, by which tokens differ enough to go to all other experts."""


def change(folder: Path, edit: Callable[[State], None]) -> None:
    """Change a checkpoint's tensors in place."""
    state = load_file(folder / WEIGHTS)
    edit(state)
    save_file(state, folder / WEIGHTS, {"format": "pt"})


def gate_tensors(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the tensors with a row for each expert of a layer."""
    family, shape = checkpoint.family, checkpoint.shape
    doubled = family.usual(new_config(checkpoint, 2 * shape.num_experts))
    before, after = family.dense_tensors(checkpoint.config), family.dense_tensors(doubled)
    return [name for name, found in before.items() if after[name] != found]


def expert_of(
    checkpoint: Checkpoint, state: State, layer_id: int, expert_id: int
) -> list[np.ndarray]:
    """Return views of an expert's matrices and biases in a checkpoint's tensors."""
    tensors = checkpoint.family.expert_tensors(checkpoint.config, layer_id, expert_id)
    return [
        part_of(state[part.name].numpy()[slice(*part.rows) if part.rows else slice(None)], part)
        for part in tensors.parts()
    ]


def copy_permuted(folder: Path, pairs: Mapping[int, int], seed: int = 0) -> None:
    """Make experts of all layers copies of others, with their neurons in a random order.

    ``pairs`` has the copied expert of each copy. The copies have the gate's rows too.
    """
    checkpoint, draw = open_checkpoint(folder), np.random.default_rng(seed)
    gates = gate_tensors(checkpoint)

    def edit(state: State) -> None:
        for layer_id in checkpoint.shape.layers:
            for copy, copied in pairs.items():
                order = draw.permutation(checkpoint.shape.intermediate_size)
                places = expert_of(checkpoint, state, layer_id, copy)
                parts = expert_of(checkpoint, state, layer_id, copied)
                for index, (place, part) in enumerate(zip(places, parts, strict=True)):
                    if index == 2:
                        place[...] = part[:, order]
                    elif index == 5:
                        place[...] = part
                    else:
                        place[...] = part[order]
        for name in gates:
            for copy, copied in pairs.items():
                state[name][copy] = state[name][copied]

    change(folder, edit)


def never_route(folder: Path, expert_ids: Iterable[int]) -> None:
    """Make the gates of all layers never choose some experts, whose scores become 0 exactly.

    The first feature of every token is high. For these experts the gate's row is nothing but a
    large negative number there, and for all others it ignores the feature.
    """
    checkpoint = open_checkpoint(folder)
    names, ids = gate_tensors(checkpoint), list(expert_ids)

    def edit(state: State) -> None:
        for name, tensor in state.items():
            if "embed" in name or "wte" in name:
                tensor *= SPREAD
                tensor[:, 0] = HIGH
        for name in names:
            tensor = state[name]
            if tensor.dim() == 1:
                tensor[ids] = -1e4
                continue
            tensor[:, 1:] *= 2
            tensor[:, 0] = 0
            tensor[ids] = 0
            tensor[ids, 0] = -1e4

    change(folder, edit)


def write_letters(path: Path, num_chars: int = 21_000, seed: int = 0) -> Path:
    """Write random printable characters in lines, so that tokens of all kinds come.

    A text of fewer than 20,480 characters is too short to hold a part of it out.
    """
    draw = random.Random(seed)
    letters = [chr(code) for code in range(33, 127)]
    text = "".join(" " if draw.random() < 0.2 else draw.choice(letters) for _ in range(num_chars))
    path.write_text("\n".join(text[i : i + 60] for i in range(0, num_chars, 60)), encoding="utf-8")
    return path
