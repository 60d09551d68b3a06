"""The experts of one actor, and their computation of waiting frames.

The frames that wait at the same time are merged: all rows for one (model, layer, expert) go through
the expert together, native experts of a layer in one call, and on a device all of a layer
(:mod:`experts.compute.device_experts`). An answer does not depend on the other rows, except for the
rounding of a product of another size where torch computes it. Rows are
bytes, and numpy's arrays for an expert that is not native. This module does not import torch:
without a device and with native code an actor does not need it.

Dimension letters: P rows of a frame or of one expert, H hidden size.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cluster.errors import (
    ExpertFailedError,
    ExpertMeshError,
    FrameError,
    OverloadedError,
    WrongPlacementError,
)
from cluster.spec import ExpertKey
from cluster.wire.arrays import array_of, bytes_of
from cluster.wire.frames import Buffer, DispatchFrame, ErrorFrame, RowsFrame, Shape
from experts.checkpoint.expert_weights import HostWeights
from experts.compute.native_ffn import GroupedFfn, NativeFfn, compute_native, kernel_class
from experts.lone import NativeFastPath

if TYPE_CHECKING:
    from experts.compute.expert_device import ExpertDevice
    from experts.compute.ffn import TorchFfn

OUT_OF_MEMORY_RETRY_S = 0.1
"""When a frame may come again that its device had no memory for."""
MAX_PIECES = 32
"""The most results that an answer sends from their own memory; more are concatenated first."""


class GatedFfnExpert:
    """A loaded expert on the host: its resident bytes, its rows' shape and dtype, its class.

    It is native, or torch's where there is no native code for it.
    """

    def __init__(self, weights: HostWeights, activation: str, threads: int) -> None:
        """Take over ``weights``; native code keeps a packed copy instead of them.

        ``activation`` is a ``hidden_act``. At most ``threads`` threads share a native product.
        """
        self.row_shape: Shape = (weights.down.shape[0],)
        self.dtype = weights.down.dtype.name
        self.ffn: NativeFfn | TorchFfn
        self.grouped: GroupedFfn | None = None
        own_class = kernel_class(self.dtype, weights.down.shape)
        if own_class is not None:
            self.ffn = NativeFfn(weights, activation, threads)
            self.kernel_class, self.grouped = own_class, _compute_native
        else:
            from experts.compute.ffn import TorchFfn

            self.ffn = TorchFfn(weights, activation)
            self.kernel_class = self.ffn.kernel_class
        self.num_bytes = self.ffn.num_bytes

    def takes(self, row_shape: Shape) -> bool:
        """See :class:`Expert`."""
        return row_shape == self.row_shape

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Map rows [P, H] to rows [P, H]."""
        return self.ffn(rows)


def _compute_native(
    experts: Sequence[GatedFfnExpert], counts: tuple[int, ...], rows: Buffer
) -> memoryview | None:
    return compute_native([expert.ffn for expert in experts], counts, rows)  # type: ignore[misc]


class Expert(Protocol):
    """A loaded expert as the bank needs it, such as :class:`GatedFfnExpert`.

    ``row_shape`` is that of an input row; an axis of any length is -1. ``kernel_class`` is empty
    where the expert has none (:mod:`experts.compute.kernel_classes`).
    """

    kernel_class: str
    num_bytes: int
    row_shape: Shape
    dtype: str

    @property
    def grouped(self) -> GroupedFfn | None:
        """The function that computes several experts of this kind, equal for all of them."""
        ...

    def takes(self, row_shape: Shape) -> bool:
        """Return whether rows may have this shape."""
        ...

    def __call__(self, rows: np.ndarray) -> np.ndarray:
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
    """A frame, its experts, and their results: the bytes of ``answer_shape`` rows in pieces."""

    frame: DispatchFrame
    layer: _Layer
    experts: list[Expert]
    results: list[Buffer] = field(default_factory=list)
    answer_shape: Shape = ()
    failure: ExpertFailedError | OverloadedError | None = None
    """The error of an expert that cannot compute its rows of this frame, or of a full device."""


_NO_LAYER = _Layer()


class ExpertBank:
    """Loaded experts by key, and the number of rows that each has computed."""

    def __init__(self, device: ExpertDevice | None = None) -> None:
        """Start empty; experts that are not on the host are on ``device``."""
        self._layers: dict[tuple[str, int], _Layer] = {}
        self._device = device
        self.lone = NativeFastPath()

    def hold(self, key: ExpertKey, expert: Expert) -> None:
        """Add an expert; frames may be computed meanwhile."""
        layer = self._layers.setdefault((key.model, key.layer_id), _Layer())
        layer.experts[key.expert_id] = expert
        ffn = expert.ffn if isinstance(expert, GatedFfnExpert) else None
        self.lone.hold(key, ffn if isinstance(ffn, NativeFfn) else None, layer.tokens)

    def release(self, key: ExpertKey) -> None:
        """Free an expert and its memory; an expert that is not held is ignored."""
        self._layer(key).experts.pop(key.expert_id, None)
        self.lone.release(key)

    def settle(self) -> None:
        """Join each layer's experts on a device, once some were added or released.

        Their memory then has no room for others, and what it had is the device's again. Frames may
        be computed meanwhile, with the experts' weights as they lay before.
        """
        if self._device is not None:
            for layer in self._layers.values():
                layer.experts = self._device.join(layer.experts)
            self._device.release()

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
        if self._device is not None:
            tasks = _run_on_device(self._device, tasks)
        if len(tasks) != 1 or not _run_lone(tasks[0]):
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
        held, shape, dtype = layer.experts, frame.row_shape, frame.dtype
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


def _run_on_device(device: ExpertDevice, tasks: Sequence[_Task]) -> list[_Task]:
    """Compute the frames whose experts are on the device; returns the other frames."""
    there = [task for task in tasks if device.has(task.experts)]
    computed = device.compute([(task.frame, task.experts) for task in there])
    for task, rows in zip(there, computed, strict=True):
        if rows is not None:
            task.results, task.answer_shape = [rows], task.frame.row_shape
            continue
        task.failure = OverloadedError(
            f"{device.name} of {socket.gethostname()} has no memory for {task.frame.num_rows} rows",
            "frame.rows",
            OUT_OF_MEMORY_RETRY_S,
        )
    return [task for task in tasks if not device.has(task.experts)]


def _run_lone(task: _Task) -> bool:
    """Run a frame that is alone in its batch by one call for all of its experts.

    Returns ``False`` if the experts have no such call, or it refuses the frame;
    :func:`_run_merged` runs the frame then.
    """
    if (grouped := _grouped_of(task.experts)) is None:
        return False
    output = grouped(task.experts, task.frame.num_tokens_per_expert, task.frame.rows)
    if output is None:
        return False
    task.results, task.answer_shape = [output], task.frame.row_shape
    return True


def _grouped_of(experts: Sequence[Expert]) -> GroupedFfn | None:
    """Return the function that computes all of them, ``None`` if their kind has none."""
    grouped = experts[0].grouped
    for expert in experts:  # a generator would take longer than the comparisons
        if expert.grouped is not grouped:
            return None
    return grouped


@dataclass(slots=True)
class _Input:
    """The rows of one frame for one expert; the expert's results replace them in the frame's."""

    task: _Task
    index: int

    @property
    def rows(self) -> Buffer:
        return self.task.results[self.index]

    @property
    def num_rows(self) -> int:
        return self.task.frame.num_tokens_per_expert[self.index]

    @property
    def expert(self) -> Expert:
        return self.task.experts[self.index]


def _run_merged(tasks: Sequence[_Task]) -> None:
    """Run each expert once over its rows of all frames."""
    waiting: dict[tuple[int, Shape], dict[int, list[_Input]]] = {}
    for task in tasks:
        frame = task.frame
        task.results = list(_split(frame.rows, frame.num_tokens_per_expert))
        layer = waiting.setdefault((id(task.layer), frame.row_shape), {})
        for index, expert_id in enumerate(frame.expert_ids):
            layer.setdefault(expert_id, []).append(_Input(task, index))
    for layer in waiting.values():
        if not _run_layer(list(layer.values())):
            for inputs in layer.values():
                _run_expert(inputs)


def _run_layer(inputs_by_expert: Sequence[Sequence[_Input]]) -> bool:
    """Run all experts of a layer in one call; returns ``False`` if there is none for them."""
    experts = [inputs[0].expert for inputs in inputs_by_expert]
    if (grouped := _grouped_of(experts)) is None:
        return False
    counts = tuple([sum(given.num_rows for given in inputs) for inputs in inputs_by_expert])
    inputs = [given for inputs in inputs_by_expert for given in inputs]
    output = grouped(experts, counts, b"".join([given.rows for given in inputs]))
    if output is None:
        return False
    _hand_out(output, inputs[0].task.frame.row_shape, inputs)
    return True


def _run_expert(inputs: Sequence[_Input]) -> None:
    first, pieces = inputs[0], [given.rows for given in inputs]
    rows = array_of(
        b"".join(pieces) if len(pieces) > 1 else pieces[0],
        first.task.frame.dtype,
        sum(given.num_rows for given in inputs),
        first.task.frame.row_shape,
    )
    try:
        outputs = first.expert(rows)
    except ExpertFailedError as failure:
        if len(inputs) == 1:
            first.task.failure = failure
        else:
            for alone in inputs:  # the rows of other frames may be fine
                _run_expert([alone])
    else:
        _hand_out(bytes_of(outputs), outputs.shape[1:], inputs)


def _hand_out(outputs: memoryview, answer_shape: Shape, inputs: Sequence[_Input]) -> None:
    """Replace the rows of each input by their results, rows of ``answer_shape``."""
    pieces = _split(outputs, [given.num_rows for given in inputs])
    for given, piece in zip(inputs, pieces, strict=True):
        given.task.results[given.index], given.task.answer_shape = piece, answer_shape


def _split(rows: Buffer, counts: Collection[int]) -> Iterator[memoryview]:
    """Yield the bytes of so many rows each; they are all rows."""
    view, begin, num_rows = memoryview(rows), 0, sum(counts)
    row_bytes = len(view) // num_rows if num_rows else 0
    for count in counts:
        end = begin + count * row_bytes
        yield view[begin:end]
        begin = end


def _answer(task: _Task) -> RowsFrame | ErrorFrame:
    frame, rows = task.frame, tuple(task.results)
    if task.failure is not None:
        return ErrorFrame(frame.request_id, type(task.failure).__name__, task.failure)
    if len(rows) > MAX_PIECES:
        rows = (b"".join(rows),)
    return RowsFrame(frame.request_id, frame.num_rows, task.answer_shape, frame.dtype, rows)
