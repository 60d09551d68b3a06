"""The experts of one actor, and their computation of waiting frames.

The frames that wait at the same time are merged: all rows for one (model, layer, expert) go through
the expert together, native experts of a layer in one call, and on a device all of a layer
(:mod:`experts.compute.device_experts`). An answer does not depend on the other rows, except for the
rounding of a product of another size where torch computes it.

Dimension letters: P rows of a frame or of one expert, H hidden size.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch

from cluster.errors import (
    ExpertFailedError,
    ExpertMeshError,
    FrameError,
    OverloadedError,
    WrongPlacementError,
)
from cluster.spec import ExpertKey
from cluster.staging import Staging
from cluster.wire.frames import Buffer, DispatchFrame, ErrorFrame, RowsFrame, Shape
from cluster.wire.tensors import TORCH_DTYPES, from_bytes, to_bytes
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.device_experts import (
    DeviceExpert,
    DeviceRows,
    compute_on_device,
    settled,
)
from experts.compute.ffn import Activation, ffn_of
from experts.compute.kernel_classes import ffn_class
from experts.compute.native_ffn import GroupedFfn, NativeFfn, compute_native

OUT_OF_MEMORY_RETRY_S = 0.1
"""When a frame may come again that its device had no memory for."""
MOST_PIECES = 32
"""The most results that an answer sends from their own memory; more are concatenated first."""


class GatedFfnExpert:
    """A loaded expert on the host: its resident bytes, its rows' shape and dtype, its class."""

    def __init__(self, weights: GatedFfnWeights, act: Activation) -> None:
        """Take over ``weights``, which may be rearranged."""
        self.ffn = ffn_of(weights, act)
        self.kernel_class = ffn_class(self.ffn, weights)
        packed = self.ffn if isinstance(self.ffn, NativeFfn) else None
        self.num_bytes = weights.num_bytes if packed is None else packed.num_bytes
        self.grouped = None if packed is None else _compute_native
        self.row_shape: Shape = (weights.down.shape[0],)
        self.dtype = weights.down.dtype

    def takes(self, row_shape: Shape) -> bool:
        """See :class:`Expert`."""
        return row_shape == self.row_shape

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [P, H] to rows [P, H]."""
        return self.ffn(rows)


def _compute_native(
    experts: Sequence[GatedFfnExpert], counts: tuple[int, ...], rows: Buffer
) -> memoryview | None:
    return compute_native([expert.ffn for expert in experts], counts, rows)


class Expert(Protocol):
    """A loaded expert as the bank needs it, such as :class:`GatedFfnExpert`.

    ``row_shape`` is that of an input row; an axis of any length is -1. ``kernel_class`` is empty
    where the expert has none (:mod:`experts.compute.kernel_classes`).
    """

    kernel_class: str
    num_bytes: int
    row_shape: Shape
    dtype: torch.dtype

    @property
    def grouped(self) -> GroupedFfn | None:
        """The function that computes several experts of this kind, equal for all of them."""
        ...

    def takes(self, row_shape: Shape) -> bool:
        """Return whether rows may have this shape."""
        ...

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [P, ...] to rows [P, ...], of the same dtype and maybe of another shape.

        Raises :class:`ExpertFailedError` where the expert itself cannot compute the rows.
        """
        ...


@dataclass(slots=True)
class _Layer:
    """The held experts of one layer by id, and the number of rows that each has computed."""

    experts: dict[int, Expert] = field(default_factory=dict)
    tokens: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True)
class _Task:
    """A frame, its experts, and their results."""

    frame: DispatchFrame
    layer: _Layer
    experts: list[Expert]
    results: list[torch.Tensor] | memoryview | None = None
    """The rows of each expert, or the bytes of all rows."""
    failure: ExpertFailedError | OverloadedError | None = None
    """The error of an expert that cannot compute its rows of this frame, or of a full device."""


_NO_LAYER = _Layer()


class ExpertBank:
    """Loaded experts by key, and the number of rows that each has computed."""

    def __init__(self) -> None:
        """Start empty."""
        self._layers: dict[tuple[str, int], _Layer] = {}
        self._staging: Staging | None = None

    def hold(self, key: ExpertKey, expert: Expert) -> None:
        """Add an expert; frames may be computed meanwhile.

        All :class:`DeviceExpert` are on one device.
        """
        if isinstance(expert, DeviceExpert) and self._staging is None:
            self._staging = Staging(expert.device)
        layer = self._layers.setdefault((key.model, key.layer_id), _Layer())
        layer.experts[key.expert_id] = expert

    def release(self, key: ExpertKey) -> None:
        """Free an expert and its memory; an expert that is not held is ignored."""
        self._layer(key).experts.pop(key.expert_id, None)

    def settle(self) -> None:
        """Join each layer's experts on a device, once some were added or released.

        Their memory then has no room for others, and what it had is the device's again. Frames may
        be computed meanwhile, with the experts' weights as they lay before.
        """
        if self._staging is None:
            return
        for layer in self._layers.values():
            there = {i: e for i, e in layer.experts.items() if isinstance(e, DeviceExpert)}
            joined = settled(there) if there else None
            if joined is not None:
                layer.experts = {**layer.experts, **joined}
        torch.accelerator.empty_cache()

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
        frame whose rows do not fit its experts is FrameError, and to a frame with rows that an
        expert cannot compute ExpertFailedError. Other frames are not affected.
        """
        opened = [self._open(frame) for frame in frames]
        tasks = [task for task in opened if isinstance(task, _Task)]
        if self._staging is not None:
            tasks = _run_on_device(self._staging, tasks)
        if len(tasks) == 1:
            _run_lone(tasks[0])
        else:
            with _inference():
                _run_merged(tasks)
        for task in opened:
            if not isinstance(task, _Task) or task.failure is not None:
                continue
            counts, tokens = task.frame.num_tokens_per_expert, task.layer.tokens
            for expert_id, count in zip(task.frame.expert_ids, counts, strict=True):
                tokens[expert_id] += count
        return [_answer(task) if isinstance(task, _Task) else task for task in opened]

    def _open(self, frame: DispatchFrame) -> _Task | ErrorFrame:
        layer = self._layers.get((frame.model, frame.layer_id), _NO_LAYER)
        held, shape, dtype = layer.experts, frame.row_shape, TORCH_DTYPES[frame.dtype]
        experts: list[Expert] = []
        for expert_id in frame.expert_ids:
            expert = held.get(expert_id)
            if expert is None or expert.dtype != dtype or not _fits(expert, shape):
                error = _misfit(frame, expert_id, expert)
                return ErrorFrame(frame.request_id, type(error).__name__, error)
            experts.append(expert)
        return _Task(frame, layer, experts)


def _fits(expert: Expert, row_shape: Shape) -> bool:
    return expert.row_shape == row_shape or expert.takes(row_shape)


def _misfit(frame: DispatchFrame, expert_id: int, expert: Expert | None) -> ExpertMeshError:
    """Return the error of a frame that an expert cannot compute."""
    if expert is None:
        return WrongPlacementError(
            f"expert {expert_id} of layer {frame.layer_id} is not held here", frame.model
        )
    if not expert.takes(frame.row_shape):
        return FrameError(
            f"must be {list(expert.row_shape)} (given: {list(frame.row_shape)})", "frame.row_shape"
        )
    return FrameError(f"must be {expert.dtype} (given: {frame.dtype})", "frame.dtype")


def _inference() -> AbstractContextManager[object]:
    """Return torch's inference mode, for a thread that is not in inference mode.

    Inference mode saves up to 8 µs of an expert's product, and costs up to 30 µs to enter. So
    native computation does not enter it, and the threads of streams stay in it.
    """
    return nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode()


def _run_on_device(staging: Staging, tasks: Sequence[_Task]) -> list[_Task]:
    """Compute the frames whose experts are on the device; returns the other frames."""
    there, elsewhere, given = [], [], []
    for task in tasks:
        experts = [expert for expert in task.experts if isinstance(expert, DeviceExpert)]
        if len(experts) < len(task.experts):
            elsewhere.append(task)
            continue
        there.append(task)
        given.append(DeviceRows(experts, task.frame.num_tokens_per_expert, _rows_of(task)))
    with _inference():
        for task, rows in zip(there, compute_on_device(staging, given), strict=True):
            if rows is not None:
                task.results = [rows]
                continue
            task.failure = OverloadedError(
                f"{staging.device} of {socket.gethostname()} has no memory for "
                f"{task.frame.num_rows} rows",
                "frame.rows",
                OUT_OF_MEMORY_RETRY_S,
            )
    return elsewhere


def _run_lone(task: _Task) -> None:
    """Compute the rows of a lone frame: each expert its own, or all in one native call."""
    if (grouped := _grouped_of(task.experts)) is not None:
        task.results = grouped(task.experts, task.frame.num_tokens_per_expert, task.frame.rows)
    if task.results is None:
        with _inference():
            pieces = zip(task.experts, _pieces_of(task), strict=True)
            try:
                task.results = [expert(rows) for expert, rows in pieces]
            except ExpertFailedError as failure:
                task.failure = failure


def _grouped_of(experts: Sequence[Expert]) -> GroupedFfn | None:
    """Return the function that computes all of them, ``None`` where their kind has none."""
    grouped = experts[0].grouped
    return grouped if all(expert.grouped is grouped for expert in experts) else None


@dataclass(slots=True)
class _Input:
    """The rows of one frame for one expert; the expert's results replace them in ``pieces``."""

    task: _Task
    pieces: list[torch.Tensor]
    index: int

    @property
    def rows(self) -> torch.Tensor:
        return self.pieces[self.index]

    @property
    def expert(self) -> Expert:
        return self.task.experts[self.index]


def _run_merged(tasks: Sequence[_Task]) -> None:
    """Run each expert once over its rows of all frames."""
    waiting: dict[tuple[int, Shape], dict[int, list[_Input]]] = {}
    for task in tasks:
        task.results = pieces = _pieces_of(task)
        layer = waiting.setdefault((id(task.layer), task.frame.row_shape), {})
        for index, expert_id in enumerate(task.frame.expert_ids):
            layer.setdefault(expert_id, []).append(_Input(task, pieces, index))
    for layer in waiting.values():
        if not _run_layer(list(layer.values())):
            for inputs in layer.values():
                _run_expert(inputs)


def _run_layer(inputs_by_expert: Sequence[Sequence[_Input]]) -> bool:
    """Run all experts of a layer in one call; returns ``False`` where there is none for them."""
    experts = [inputs[0].expert for inputs in inputs_by_expert]
    if (grouped := _grouped_of(experts)) is None:
        return False
    counts = tuple([sum(len(given.rows) for given in inputs) for inputs in inputs_by_expert])
    inputs = [given for inputs in inputs_by_expert for given in inputs]
    rows = torch.cat([given.rows for given in inputs])
    output = grouped(experts, counts, to_bytes(rows))
    if output is None:
        return False
    frame = inputs[0].task.frame
    _hand_out(from_bytes(output, frame.dtype, len(rows), frame.row_shape), inputs)
    return True


def _run_expert(inputs: Sequence[_Input]) -> None:
    rows = [given.rows for given in inputs]
    try:
        outputs = inputs[0].expert(torch.cat(rows) if len(rows) > 1 else rows[0])
    except ExpertFailedError as failure:
        if len(inputs) == 1:
            inputs[0].task.failure = failure
        else:
            for alone in inputs:  # the rows of other frames may be fine
                _run_expert([alone])
    else:
        _hand_out(outputs, inputs)


def _hand_out(outputs: torch.Tensor, inputs: Sequence[_Input]) -> None:
    """Replace the rows of each input by their results."""
    pieces = outputs.split([len(given.rows) for given in inputs])
    for given, piece in zip(inputs, pieces, strict=True):
        given.pieces[given.index] = piece


def _pieces_of(task: _Task) -> list[torch.Tensor]:
    """Return the rows of each expert of a frame."""
    return list(_rows_of(task).split_with_sizes(task.frame.num_tokens_per_expert))


def _rows_of(task: _Task) -> torch.Tensor:
    """Return the rows of a frame, on the host and without a copy."""
    frame = task.frame
    return from_bytes(frame.rows, frame.dtype, frame.num_rows, frame.row_shape)


def _answer(task: _Task) -> RowsFrame | ErrorFrame:
    frame, results = task.frame, task.results
    if task.failure is not None:
        return ErrorFrame(frame.request_id, type(task.failure).__name__, task.failure)
    assert results is not None
    if isinstance(results, memoryview):
        return RowsFrame(frame.request_id, frame.num_rows, frame.row_shape, frame.dtype, (results,))
    shape = tuple(results[0].shape[1:])
    if len(results) > MOST_PIECES:
        results = [torch.cat(results)]
    rows = tuple([to_bytes(piece) for piece in results])
    return RowsFrame(frame.request_id, frame.num_rows, shape, frame.dtype, rows)
