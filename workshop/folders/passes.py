"""The pass of token rows through a model, a layer at a time, with the states between on disk.

A pass that was killed goes on after its last whole layer, and ends with the same bits.

Dimension letters: N rows of tokens, L tokens of a row, H hidden size, T = N * L.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F

from cluster.heap import give_back_freed
from experts.checkpoint.checkpoint import Checkpoint
from workshop.convert.staging import UNFINISHED, finish, write_whole
from workshop.folders.layerwise import Layer, LayeredModel, Observer

BLOCK_BYTES, BLOCKS_OF_LAYER = 2 << 20, 64
"""The most bytes of hidden states that pass a layer together, but at least a row's: so many, or
this part of the bytes of a layer's experts, which are read for each block. A block's values take
about ten times as much."""
LOGITS_BYTES = 4 << 20
"""The most bytes of logits at once, but at least a token's."""
_FLOAT_BYTES = 4
NewObserver = Callable[[int], Observer]
"""Returns the observer of a layer with experts."""
Seen = dict[int, dict[str, np.ndarray]]
"""What observers saw, by layer."""
Progress = Callable[[int, int], None]
"""Receives the layers done so far, and all layers."""
Missed = Callable[[], torch.Tensor]
"""Returns what the states after a layer lack [T, H], by the source's own experts there."""


def block_bytes(checkpoint: Checkpoint) -> int:
    """Return the most bytes of hidden states that pass a layer together."""
    layer_bytes = checkpoint.shape.num_experts * checkpoint.expert_bytes(checkpoint.dtype)
    return max(BLOCK_BYTES, layer_bytes // BLOCKS_OF_LAYER)


class Pass:
    """Rows [N, L] of token ids on their way through a model, kept in a folder of their own."""

    def __init__(self, model: LayeredModel, rows: torch.Tensor, folder: Path) -> None:
        """``folder`` may have the states of the same pass, broken off."""
        self._model = model
        self._rows = rows
        self._folder = folder
        self._hidden_size = model.checkpoint.shape.hidden_size
        row_bytes = rows.shape[1] * self._hidden_size * _FLOAT_BYTES
        self._rows_at_once = max(1, block_bytes(model.checkpoint) // row_bytes)

    @torch.inference_mode()
    def run(self, new_observer: NewObserver | None, progress: Progress) -> Seen:
        """Pass all layers; returns what the observers saw.

        Raises ``OSError`` for a disk that is full, and ``CheckpointError`` for a checkpoint that
        has changed.
        """
        self._run_to(self._model.num_layers, new_observer, progress)
        progress(self._model.num_layers, self._model.num_layers)
        return self._seen() if new_observer is not None else {}

    @torch.inference_mode()
    def run_to(self, layer_id: int) -> None:
        """Pass the layers before ``layer_id`` that are not passed; raises as :meth:`run` does."""
        self._run_to(layer_id, None, lambda done, total: None)

    def states(self, layer_id: int) -> torch.Tensor:
        """Return the hidden states [T, H] before a layer, once all of them are written."""
        file = self._state(layer_id)
        found = file if file.exists() else _unfinished(file)
        return torch.from_numpy(np.fromfile(found, np.float32).reshape(-1, self._hidden_size))

    @torch.inference_mode()
    def nats(self, targets: torch.Tensor) -> float:
        """Return the loss in nats of all ``targets`` [N, L], after :meth:`run`."""
        result_file = self._folder / "nats.json"
        if result_file.exists():
            return float(json.loads(result_file.read_text(encoding="utf-8")))
        head, flat = self._model.head(), targets.flatten()
        vocab_size = self._model.checkpoint.vocab_size
        at_once = max(1, LOGITS_BYTES // (vocab_size * _FLOAT_BYTES))
        total, done = 0.0, 0
        with self._state(self._model.num_layers).open("rb") as file:
            for states in self._blocks(file):
                for some in states.split(at_once):
                    logits = head(some).float()
                    wanted = flat[done : done + len(some)]
                    total += F.cross_entropy(logits, wanted, reduction="sum").item()
                    done += len(some)
        write_whole(result_file, json.dumps(total).encode())
        del head
        give_back_freed()
        return total

    def close(self) -> None:
        """Delete what the pass has on disk."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run_to(self, end: int, new_observer: NewObserver | None, progress: Progress) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        done = self._layers_done()
        if done is None:
            self._embed()
            done = 0
        for layer_id in range(done, end):
            progress(layer_id, self._model.num_layers)
            self._pass_layer(layer_id, new_observer)

    def _embed(self) -> None:
        embed = self._model.embedding()
        with self._writing(0) as file:
            for ids in self._rows.split(self._rows_at_once):
                file.write(embed(ids.flatten()).float().numpy().data)

    def _pass_layer(self, layer_id: int, new_observer: NewObserver | None) -> None:
        has_experts = layer_id in self._model.checkpoint.shape.layers
        observer = new_observer(layer_id) if has_experts and new_observer else None
        layer = self._model.layer(layer_id, observer)
        before = self._state(layer_id)
        with before.open("rb") as source, self._writing(layer_id + 1) as file:
            self._write_states(layer, source, file)
            if observer is not None and layer.experts is not None:
                self._keep(layer_id, observer.result(layer.experts))
                if layer.experts.is_replaced:
                    self._write_states(layer, source, file)
        before.unlink()
        give_back_freed()

    def _write_states(self, layer: Layer, source: BinaryIO, file: BinaryIO) -> None:
        """Write the hidden states after a layer; ``source`` has all before it."""
        length = self._rows.shape[1]
        source.seek(0)
        file.seek(0)
        for states in self._blocks(source):
            rotation = self._model.rotation(len(states) // length, length)
            file.write(layer(states, rotation, length).numpy().data)
        file.flush()

    def _blocks(self, file: BinaryIO) -> Iterator[torch.Tensor]:
        """Yield the hidden states [T', H] of some rows at a time."""
        for ids in self._rows.split(self._rows_at_once):
            states = np.empty((ids.numel(), self._hidden_size), np.float32)
            file.readinto(states.data.cast("B"))  # type: ignore[attr-defined]
            yield torch.from_numpy(states)

    def _state(self, layer_id: int) -> Path:
        """Return the file of the hidden states before a layer."""
        return self._folder / f"before-{layer_id}.f32"

    @contextmanager
    def _writing(self, layer_id: int) -> Iterator[BinaryIO]:
        """Yield the file of the states before a layer; it has its name when it is whole."""
        file = self._state(layer_id)
        unfinished = _unfinished(file)
        with unfinished.open("wb") as opened:
            yield opened
        finish(unfinished, file)

    def _layers_done(self) -> int | None:
        """Return the number of layers that an earlier run passed, or ``None`` before the first."""
        found = [int(file.stem.removeprefix("before-")) for file in self._folder.glob("*.f32")]
        return max(found, default=None)

    def _keep(self, layer_id: int, seen: dict[str, np.ndarray]) -> None:
        file = self._folder / f"seen-{layer_id}.npz"
        unfinished = _unfinished(file)
        with unfinished.open("wb") as opened:
            np.savez(opened, allow_pickle=False, **seen)
        finish(unfinished, file)

    def _seen(self) -> Seen:
        seen: Seen = {}
        for layer_id in self._model.checkpoint.shape.layers:
            with np.load(self._folder / f"seen-{layer_id}.npz", allow_pickle=False) as arrays:
                seen[layer_id] = dict(arrays)
        return seen


def twin_run(
    model: LayeredModel,
    rows: torch.Tensor,
    folder: Path,
    new_observer: Callable[[int, Missed], Observer],
    progress: Progress,
) -> Seen:
    """Pass rows through a model and, a layer behind, through what is made of it.

    Returns what the observers of the new model's layers saw. What a layer is made into is so fitted
    to the inputs that the new layers before it give. An observer gives :meth:`LayerExperts.replace`
    the new experts of its layer, and may ask what the states lack before it does. Raises as
    :meth:`Pass.run` does.
    """
    source, made = (Pass(model, rows, folder / name) for name in ("source", "made"))

    def observer_of(layer_id: int) -> Observer:
        source.run_to(layer_id + 1)
        after = layer_id + 1
        return new_observer(layer_id, lambda: source.states(after) - made.states(after))

    return made.run(observer_of, progress)


def _unfinished(file: Path) -> Path:
    return file.with_name(file.name + UNFINISHED)
