"""The accelerator of an expert actor, as the actor and its bank see it.

torch is imported here and below. An actor without an accelerator does not import this module.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cluster.device import check_room, end_process, free_bytes, has_broken, room_told
from cluster.errors import first_line
from cluster.spec import ExpertKey
from cluster.staging import Staging
from cluster.wire.frames import Buffer, DispatchFrame
from cluster.wire.tensors import from_array, from_bytes, to_bytes
from experts.checkpoint.expert_weights import HostWeights
from experts.compute.device_experts import (
    Block,
    DeviceExpert,
    DeviceRows,
    compute_on_device,
    settled,
)
from experts.compute.ffn import ACTIVATIONS

_FIELD = "args.experts"
RESERVED_ROWS = 1024
"""The rows for which pinned memory is reserved; the most of several frames together
(:data:`experts.queue.MAX_BATCH_ROWS`). A frame of more rows has it grow."""
RESERVED_ENDS_BYTES = 64 << 10
"""The same for the ends of experts' rows, which go to the device with them."""

logger = logging.getLogger("expertmesh.actor")


class ExpertDevice:
    """Loads, joins and computes the experts on one device.

    A method that finds the device in error ends the process: such a device fails all that follows,
    and routers then go elsewhere.
    """

    def __init__(
        self, device: torch.device, actor_id: str, say_last: Callable[[str], None]
    ) -> None:
        """``actor_id`` names the actor in the log; ``say_last`` gets the reason of its end."""
        self.device = device
        self.name = str(device)
        self._actor_id = actor_id
        self._say_last = say_last
        self._staging = Staging(device)
        self._has_reserved = False
        self._needed: dict[ExpertKey, int] = {}
        self._num_experts: Counter[tuple[str, int]] = Counter()
        self._blocks: dict[tuple[str, int], Block] = {}
        """One for each layer of a load, made for the first of its experts."""

    @property
    def free_bytes(self) -> int:
        """The bytes that are free now in the device's memory."""
        with self._ending():
            return free_bytes(self.device)

    def begin_load(self, needed: Mapping[ExpertKey, int]) -> None:
        """Plan for the experts of ``needed``, which has the bytes of each.

        Raises :class:`UnavailableError` where the device has too little memory.
        """
        self.end_load()
        self._needed = dict(needed)
        self._num_experts = Counter((key.model, key.layer_id) for key in needed)
        with self._ending():
            check_room(self.device, sum(needed.values()), _FIELD)

    def load(self, key: ExpertKey, weights: HostWeights, activation: str) -> DeviceExpert:
        """Return an expert of the load that has begun, with a copy of ``weights``.

        ``activation`` is a ``hidden_act``. Raises :class:`UnavailableError` where the device has no
        memory for its block.
        """
        layer, given = (key.model, key.layer_id), weights.map(from_array)
        needed_bytes = sum(self._needed.values())
        with room_told(self.device, needed_bytes, _FIELD), self._ending():
            if layer not in self._blocks:
                size, act = self._num_experts[layer], ACTIVATIONS[activation]
                self._blocks[layer] = Block(given, size, act, self.device)
            expert = self._blocks[layer].take()
            expert.write(given)
            if not self._has_reserved:  # nothing computes yet, so no copy is under way
                rows_bytes = RESERVED_ROWS * expert.row_shape[0] * expert.block.dtype.itemsize
                self._staging.reserve(rows_bytes, rows_bytes + RESERVED_ENDS_BYTES)
                self._has_reserved = True
        del self._needed[key]
        return expert

    def end_load(self) -> None:
        """Forget the load that has begun: its free places go with its blocks."""
        self._blocks, self._needed = {}, {}

    def has(self, experts: Sequence[object]) -> bool:
        """Return whether all of these experts are on the device."""
        return all(isinstance(expert, DeviceExpert) for expert in experts)

    def join(self, experts: dict[int, Any]) -> dict[int, Any]:
        """Return a layer's experts with those on the device in one block; see :func:`settled`."""
        there = {i: e for i, e in experts.items() if isinstance(e, DeviceExpert)}
        with self._ending():
            joined = settled(there) if there else None
        return experts if joined is None else {**experts, **joined}

    def release(self) -> None:
        """Give memory that no expert has any more back to the device."""
        with self._ending():
            torch.accelerator.empty_cache()

    def compute(self, given: Sequence[tuple[DispatchFrame, Sequence[Any]]]) -> list[Buffer | None]:
        """Return the results of each frame, whose experts are on the device, in its rows' order.

        A frame gets ``None`` if the device has no memory to compute it.
        """
        frames = [
            DeviceRows(
                experts,
                frame.num_tokens_per_expert,
                from_bytes(frame.rows, frame.dtype, frame.num_rows, frame.row_shape),
            )
            for frame, experts in given
        ]
        with self._ending(), torch.inference_mode():
            computed = compute_on_device(self._staging, frames)
        return [None if rows is None else to_bytes(rows) for rows in computed]

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """End the process where the device fails within."""
        try:
            yield
        except RuntimeError as error:
            if has_broken(error):
                logger.critical("%s exits: its device failed (%s)", self._actor_id, error)
                self._say_last(f"its device failed ({first_line(error)})")
                end_process()
            raise
