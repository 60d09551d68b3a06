"""Experts whose weights lie on a device, and the computation of their rows from host to host.

The experts of a layer that are loaded together form a :class:`Block`: one tensor for each matrix,
as grouped products take it. A place in a block is written once, before its expert is held. So a
batch under way never sees other weights, whatever is loaded or released meanwhile. A block lives
as long as one of its experts; :func:`settled` gives free places back.

Dimension letters: E experts of a block, C products, P rows, H hidden size, I intermediate size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch

from cluster.device import lacks_memory
from cluster.errors import first_line
from cluster.staging import Staging
from cluster.wire.frames import Shape
from cluster.wire.tensors import dtype_name, from_array, to_array
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.ffn import Activation, ffn
from experts.compute.grouped_ffn import MAX_GROUP_ROWS, choose_grouped_mm, grouped_ffn
from experts.compute.kernel_classes import torch_class

logger = logging.getLogger("expertmesh.actor")


class Block:
    """The weights of experts of one layer on a device, with a place for each."""

    def __init__(
        self,
        like: GatedFfnWeights[torch.Tensor],
        num_experts: int,
        act: Activation,
        device: torch.device,
    ) -> None:
        """Take memory for ``num_experts`` experts of the shapes and the dtype of ``like``.

        Raises :class:`torch.OutOfMemoryError`.
        """
        self.weights = like.map(
            lambda part: torch.empty((num_experts, *part.shape), dtype=part.dtype, device=device)
        )
        self.num_experts = num_experts
        self.act = act
        self.device = device
        hidden_size, inner_size = like.down.shape
        self.row_shape: Shape = (hidden_size,)
        self.dtype = like.down.dtype
        self.expert_bytes = like.num_bytes
        self._num_taken = 0
        sizes = (hidden_size, inner_size)
        self._grouped_mm = choose_grouped_mm(device, self.dtype, sizes, num_experts)
        way = "looped" if self._grouped_mm is None else "grouped"
        self.kernel_class = f"{torch_class(device, self.dtype)} {way}"

    def take(self) -> DeviceExpert:
        """Return the expert of the next free place; its weights must be written before its use."""
        self._num_taken += 1
        return DeviceExpert(self, self._num_taken - 1)

    def ends_of(self, counts: np.ndarray) -> torch.Tensor:
        """Return the ends of the experts' rows in each product, int32 [C, E].

        ``counts`` [E] are the numbers of the experts' rows. Each product has the next rows, and as
        many as it may have.
        """
        ends, most = np.cumsum(counts), MAX_GROUP_ROWS * self.num_experts
        begins = np.arange(0, ends[-1], most)[:, None]
        return torch.from_numpy((ends - begins).clip(0, most).astype(np.int32))

    def compute(
        self, rows: torch.Tensor, counts: np.ndarray, ends: torch.Tensor
    ) -> list[torch.Tensor]:
        """Map the device's rows [P, H], ordered by expert, to rows [P, H], in pieces.

        ``ends`` are those of :meth:`ends_of`, on the device.
        """
        if self._grouped_mm is None:
            places = np.flatnonzero(counts).tolist()
            pieces = zip(places, rows.split_with_sizes(counts[places].tolist()), strict=True)
            return [DeviceExpert(self, place).compute(own) for place, own in pieces]
        pieces = rows.split(MAX_GROUP_ROWS * self.num_experts)
        return [
            grouped_ffn(piece, self.weights, self.act, own_ends, self._grouped_mm)
            for piece, own_ends in zip(pieces, ends, strict=True)
        ]


class DeviceExpert:
    """An expert of the bank whose weights are a place of a block."""

    grouped = None

    def __init__(self, block: Block, place: int) -> None:
        """See :meth:`Block.take`."""
        self.block = block
        self.place = place
        self.num_bytes = block.expert_bytes
        self.row_shape = block.row_shape
        self.dtype = dtype_name(block.dtype)
        self.kernel_class = block.kernel_class

    @property
    def weights(self) -> GatedFfnWeights[torch.Tensor]:
        """The expert's weights, without a copy."""
        return self.block.weights.map(lambda part: part[self.place])

    def write(self, weights: GatedFfnWeights[torch.Tensor]) -> None:
        """Set the expert's weights, before its first use."""
        for own, given in zip(self.weights.parts(), weights.parts(), strict=True):
            own.copy_(given)

    def takes(self, row_shape: Shape) -> bool:
        """See :class:`experts.bank.Expert`."""
        return row_shape == self.row_shape

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Map rows [P, H] of the host to rows [P, H] there, by copies of their own."""
        return to_array(self.compute(from_array(rows).to(self.block.device)))

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [P, H] of the device to rows [P, H]."""
        return ffn(rows, self.weights, self.block.act)


def settled(experts: Mapping[int, DeviceExpert]) -> dict[int, DeviceExpert] | None:
    """Return the experts of a layer in one block without free places, by copies on the device.

    Returns ``None`` if they are in one already, or if the device has no memory for a second
    copy of the layer meanwhile. Then their blocks stay, and the next call tries again.
    """
    blocks = {id(expert.block): expert.block for expert in experts.values()}
    if sum(block.num_experts for block in blocks.values()) == len(experts) and len(blocks) < 2:
        return None
    first = next(iter(blocks.values()))
    like = first.weights.map(lambda part: part[0])
    try:
        whole = Block(like, len(experts), first.act, first.device)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        logger.warning(
            "%d experts of a layer stay in %d blocks with %d places: %s has no memory to join them",
            len(experts),
            len(blocks),
            sum(block.num_experts for block in blocks.values()),
            first.device,
        )
        return None
    joined = {}
    for expert_id in sorted(experts):
        joined[expert_id] = whole.take()
        joined[expert_id].write(experts[expert_id].weights)
    return joined


class DeviceRows(NamedTuple):
    """The rows [P, ...] of a frame, on the host, and their experts with the numbers of rows."""

    experts: Sequence[DeviceExpert]
    counts: Sequence[int]
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Piece:
    """The rows of one frame for one expert; ``frame`` and ``index`` are where they belong."""

    place: int
    frame: int
    index: int
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows of all frames for the experts of one block, ordered by place."""

    block: Block
    pieces: list[_Piece]
    counts: np.ndarray
    """The numbers of the experts' rows, [E]."""


def compute_on_device(staging: Staging, frames: Sequence[DeviceRows]) -> list[torch.Tensor | None]:
    """Return the experts' rows of each frame, on the host and in the order of its rows.

    All rows go to the device by one copy, and all results return by one. A frame gets ``None``
    where the device had no memory for the products of a block that it needs, or for the copies.
    """
    groups = _groups_of(frames)
    results: list[list[torch.Tensor]] = [[frame.rows[:0]] * len(frame.counts) for frame in frames]
    failed: set[int] = set()
    for group, rows in zip(groups, _computed(staging, groups), strict=True):
        if rows is None:
            failed.update(piece.frame for piece in group.pieces)
            continue
        sizes = [len(piece.rows) for piece in group.pieces]
        for piece, own in zip(group.pieces, rows.split_with_sizes(sizes), strict=True):
            results[piece.frame][piece.index] = own
    # Concatenated into memory of their own: an answer may outlast the next copies.
    return [None if n in failed else torch.cat(pieces) for n, pieces in enumerate(results)]


def _groups_of(frames: Sequence[DeviceRows]) -> list[_Group]:
    pieces: dict[int, list[_Piece]] = {}
    blocks: dict[int, Block] = {}
    for n, frame in enumerate(frames):
        parts = frame.rows.split_with_sizes(list(frame.counts))
        for index, (expert, rows) in enumerate(zip(frame.experts, parts, strict=True)):
            if len(rows):
                blocks[id(expert.block)] = expert.block
                own = pieces.setdefault(id(expert.block), [])
                own.append(_Piece(expert.place, n, index, rows))
    groups = []
    for key, own in pieces.items():
        own.sort(key=attrgetter("place"))
        counts = np.zeros(blocks[key].num_experts, np.int64)
        np.add.at(counts, [piece.place for piece in own], [len(piece.rows) for piece in own])
        groups.append(_Group(blocks[key], own, counts))
    return groups


def _computed(staging: Staging, groups: Sequence[_Group]) -> list[torch.Tensor | None]:
    """Return the results of each group on the host, until the next copies; ``None`` without any."""
    given = [[piece.rows for piece in group.pieces] for group in groups]
    ends = [group.block.ends_of(group.counts) for group in groups]
    try:
        moved = staging.to_device(*given, *ends)
        inputs = zip(groups, moved[: len(groups)], moved[len(groups) :], strict=True)
        done = [_products(group, rows, own_ends) for group, rows, own_ends in inputs]
        returned = iter(staging.to_host(*[piece for pieces in done for piece in pieces]))
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        logger.warning("a batch fails: %s", first_line(error))
        return [None] * len(groups)
    on_host = [[next(returned) for _ in pieces] for pieces in done]
    return [torch.cat(pieces) if pieces else None for pieces in on_host]


def _products(group: _Group, rows: torch.Tensor, ends: torch.Tensor) -> list[torch.Tensor]:
    """Return the results of a group on the device, in pieces; none without memory for them."""
    try:
        return group.block.compute(rows, group.counts, ends)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        logger.warning("%d rows of a batch fail: %s", len(rows), first_line(error))
        return []
