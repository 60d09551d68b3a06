"""The experts of one actor, and their computation of waiting frames.

The frames that wait at the same time are merged: all rows for one (model, layer, expert) go through
the expert together. Rows are independent of each other. So an answer does not depend on the other
rows, except for the rounding of a matrix product of another size.

Dimension letters: P rows of a frame or of one expert, H hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from cluster.errors import ExpertMeshError, FrameError, WrongPlacementError
from cluster.spec import ExpertKey
from cluster.wire.frames import Buffer, DispatchFrame, ErrorFrame, RowsFrame
from cluster.wire.tensors import TORCH_DTYPES, from_bytes, to_bytes
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.amx_ffn import TiledFfn, compute_tiled
from experts.compute.ffn import Activation, PackedFfn, ffn_of

MOST_PIECES = 32
"""The most results that an answer sends from their own memory; more are concatenated first."""


class GatedFfnExpert:
    """A loaded expert, its resident bytes, and the H, dtype and device of its rows."""

    def __init__(self, weights: GatedFfnWeights, act: Activation) -> None:
        """Take over ``weights``, which may be rearranged."""
        self.ffn = ffn_of(weights, act)
        packed = self.ffn if isinstance(self.ffn, PackedFfn) else None
        self.num_bytes = weights.num_bytes if packed is None else packed.num_bytes
        self.grouped = _compute_tiled if isinstance(self.ffn, TiledFfn) else None
        self.hidden_size = weights.down.shape[0]
        self.dtype = weights.down.dtype
        self.device = weights.down.device

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [P, H] to rows [P, H]."""
        return self.ffn(rows)


GroupedFfn = Callable[[Sequence[Any], tuple[int, ...], Buffer], memoryview | None]
"""Computes the rows of several experts of one kind in one call, from bytes to bytes.

The first ``counts[0]`` rows are the first expert's, and so on. ``None`` means that the experts must
be computed one by one.
"""


def _compute_tiled(
    experts: Sequence[GatedFfnExpert], counts: tuple[int, ...], rows: Buffer
) -> memoryview | None:
    return compute_tiled([expert.ffn for expert in experts], counts, rows)


class Expert(Protocol):
    """A loaded expert as the bank needs it; see :class:`GatedFfnExpert`."""

    num_bytes: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def grouped(self) -> GroupedFfn | None:
        """The function that computes several experts of this kind, equal for all of them."""
        ...

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [P, H] to rows [P, H]."""
        ...


@dataclass(slots=True)
class _Layer:
    """The held experts of one layer by id, and the number of rows that each has computed."""

    experts: dict[int, Expert] = field(default_factory=dict)
    tokens: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True)
class _Work:
    """A frame, its experts, and their results."""

    frame: DispatchFrame
    layer: _Layer
    experts: list[Expert]
    results: list[torch.Tensor] | memoryview | None = None
    """The rows of each expert, or the bytes of all rows."""


_NO_LAYER = _Layer()


class ExpertBank:
    """Loaded experts by key, and the number of rows that each has computed."""

    def __init__(self) -> None:
        """Start empty."""
        self._layers: dict[tuple[str, int], _Layer] = {}

    def hold(self, key: ExpertKey, expert: Expert) -> None:
        """Add an expert; frames may be computed meanwhile."""
        layer = self._layers.setdefault((key.model, key.layer_id), _Layer())
        layer.experts[key.expert_id] = expert

    def release(self, key: ExpertKey) -> None:
        """Free an expert and its memory; an expert that is not held is ignored."""
        self._layer(key).experts.pop(key.expert_id, None)

    def forget_others(self, models: Collection[str]) -> None:
        """Drop the counters of all models but ``models``, except those with a held expert."""
        kept = {*models, *(key.model for key in self.experts)}
        self._layers = {key: layer for key, layer in self._layers.items() if key[0] in kept}

    def __contains__(self, key: ExpertKey) -> bool:
        """Return whether an expert is held."""
        return key.expert_id in self._layer(key).experts

    def _layer(self, key: ExpertKey) -> _Layer:
        return self._layers.get((key.model, key.layer_id), _NO_LAYER)

    @property
    def experts(self) -> dict[ExpertKey, Expert]:
        """The held experts."""
        layers = list(self._layers.items())
        return {
            ExpertKey(*layer_key, expert_id): expert
            for layer_key, layer in layers
            for expert_id, expert in list(layer.experts.items())
        }

    @property
    def tokens(self) -> dict[ExpertKey, int]:
        """The number of rows that each expert has computed, also of released experts.

        :meth:`forget_others` drops those of models that are gone.
        """
        layers = list(self._layers.items())
        return {ExpertKey(*k, e): n for k, layer in layers for e, n in list(layer.tokens.items())}

    @property
    def num_bytes(self) -> int:
        """Resident bytes of the weights of all held experts."""
        return sum(expert.num_bytes for expert in self.experts.values())

    def compute(self, frames: Sequence[DispatchFrame]) -> list[RowsFrame | ErrorFrame]:
        """Compute the rows of all frames, merged per expert; one answer per frame, in order.

        The answer to a frame for an expert that is not held is WrongPlacementError. The answer to a
        frame whose rows do not fit its experts is FrameError. Other frames are not affected.
        """
        opened = [self._open(frame) for frame in frames]
        works = [work for work in opened if isinstance(work, _Work)]
        if len(works) == 1:
            _run_lone(works[0])
        else:
            with _inference():
                _run_merged(works)
        for work in works:
            counts, tokens = work.frame.num_tokens_per_expert, work.layer.tokens
            for expert_id, count in zip(work.frame.expert_ids, counts, strict=True):
                tokens[expert_id] += count
        return [_rows_frame(work) if isinstance(work, _Work) else work for work in opened]

    def _open(self, frame: DispatchFrame) -> _Work | ErrorFrame:
        layer = self._layers.get((frame.model, frame.layer_id), _NO_LAYER)
        held, hidden_size, dtype = layer.experts, frame.hidden_size, TORCH_DTYPES[frame.dtype]
        experts: list[Expert] = []
        for expert_id in frame.expert_ids:
            expert = held.get(expert_id)
            if expert is None or expert.hidden_size != hidden_size or expert.dtype != dtype:
                error = _misfit(frame, expert_id, expert)
                return ErrorFrame(frame.request_id, type(error).__name__, error)
            experts.append(expert)
        return _Work(frame, layer, experts)


def _misfit(frame: DispatchFrame, expert_id: int, expert: Expert | None) -> ExpertMeshError:
    """Return the error of a frame that an expert cannot compute."""
    if expert is None:
        return WrongPlacementError(
            f"expert {expert_id} of layer {frame.layer_id} is not held here", frame.model
        )
    if frame.hidden_size != expert.hidden_size:
        return FrameError(
            f"must be {expert.hidden_size} (given: {frame.hidden_size})", "frame.hidden_size"
        )
    return FrameError(f"must be {expert.dtype} (given: {frame.dtype})", "frame.dtype")


def _inference() -> AbstractContextManager[object]:
    """Return torch's inference mode, for a thread that is not in inference mode.

    Inference mode saves up to 8 µs of an expert's product, and costs up to 30 µs to enter. So
    native computation does not enter it, and the threads of streams stay in it.
    """
    return nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode()


def _run_lone(work: _Work) -> None:
    """Compute the rows of a lone frame."""
    experts, grouped = work.experts, work.experts[0].grouped
    if grouped is not None and all(expert.grouped is grouped for expert in experts):
        work.results = grouped(experts, work.frame.num_tokens_per_expert, work.frame.rows)
    if work.results is None:
        with _inference():
            pieces = _pieces_of(work)
            work.results = [run(rows) for run, rows in zip(work.experts, pieces, strict=True)]


def _run_merged(works: Sequence[_Work]) -> None:
    """Run each expert once over its rows of all frames."""
    waiting: dict[tuple[int, int], list[tuple[list[torch.Tensor], int, Expert]]] = {}
    for work in works:
        # An expert's results replace its rows in this list.
        work.results = pieces = _pieces_of(work)
        experts = zip(work.frame.expert_ids, work.experts, strict=True)
        for index, (expert_id, expert) in enumerate(experts):
            key = id(work.layer), expert_id
            waiting.setdefault(key, []).append((pieces, index, expert))
    for inputs in waiting.values():
        rows = [pieces[index] for pieces, index, _ in inputs]
        joined = torch.cat(rows) if len(rows) > 1 else rows[0]
        outputs = inputs[0][2](joined).split([piece.shape[0] for piece in rows])
        for (pieces, index, _), output in zip(inputs, outputs, strict=True):
            pieces[index] = output


def _pieces_of(work: _Work) -> list[torch.Tensor]:
    """Return the rows of each expert of a frame."""
    frame, device = work.frame, work.experts[0].device
    rows = from_bytes(frame.rows, frame.dtype, frame.num_rows, frame.hidden_size)
    if device.type != "cpu":
        rows = rows.to(device)  # all of them in one copy
    return list(rows.split_with_sizes(frame.num_tokens_per_expert))


def _rows_frame(work: _Work) -> RowsFrame:
    frame, results = work.frame, work.results
    assert results is not None
    rows: tuple[Buffer, ...]
    if isinstance(results, memoryview):
        rows = (results,)
    else:
        if len(results) > MOST_PIECES or not results[0].is_cpu:
            results = [torch.cat(results)]
        rows = tuple([to_bytes(piece) for piece in results])
    return RowsFrame(frame.request_id, frame.num_rows, frame.hidden_size, frame.dtype, rows)
