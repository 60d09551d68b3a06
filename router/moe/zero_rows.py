"""Rows at which expert actors fail, told from actors that fail at all rows.

An actor answers an error where its computation raises: its device may be at fault, or the rows. So
where an expert's rows were answered by errors twice, by two copies or by the only one, that actor
is asked to compute rows of zeros. Where it does, the rows are at fault, and the step is given up:
the engine finds the request that has them (:mod:`router.engine.isolation`). Where it does not, the
rows are sent again until the actor is replaced.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator

from cluster.errors import FrameError, PoisonedRequestError
from cluster.transport.base import Call, CallFailure, Transport
from cluster.wire.frames import DispatchFrame, RowsFrame, decode, encode
from cluster.wire.tensors import TORCH_DTYPES
from router.moe.pending import FailedPart, PendingLayer
from router.moe.permute import Part

MOST_ERRORS = 2
"""Answers by an error to an expert's rows in one layer until its actor is asked for zeros."""
ZEROS_S = 2.0
"""How long an actor may take for rows of zeros."""

logger = logging.getLogger("expertmesh.dispatch")


class ZeroRows:
    """Asks actors for rows of zeros; for one dispatcher."""

    def __init__(self, model: str, transport: Transport, request_ids: Iterator[int]) -> None:
        """``model`` is the model's key; ``request_ids`` are those of the dispatcher's frames."""
        self._model = model
        self._transport = transport
        self._request_ids = request_ids

    def check(self, layer: PendingLayer, failed_parts: Iterable[FailedPart]) -> None:
        """Raise :class:`PoisonedRequestError` where a part's rows are at fault, not its actor."""
        for part, failure in failed_parts:
            errors = max(map(layer.errors.count, part.expert_ids), default=0)
            if failure is None and errors >= MOST_ERRORS and self._are_computed(layer, part):
                logger.error(
                    "expert actors fail at rows of layer %d; %s g%d computes other rows",
                    layer.layer_id,
                    part.actor_id,
                    part.generation,
                )
                raise PoisonedRequestError(
                    f"expert actors cannot compute this request in layer {layer.layer_id}"
                )

    def _are_computed(self, layer: PendingLayer, part: Part) -> bool:
        """Return whether a part's actor computes a row of zeros by each of the part's experts."""
        layer.copy_received()  # the transport's next wait overwrites the rows
        count = len(part.expert_ids)
        row_bytes = math.prod(layer.row_shape) * TORCH_DTYPES[layer.dtype].itemsize
        frame = DispatchFrame(
            request_id=next(self._request_ids),
            model=self._model,
            layer_id=layer.layer_id,
            expert_ids=part.expert_ids,
            num_tokens_per_expert=(1,) * count,
            num_rows=count,
            row_shape=layer.row_shape,
            dtype=layer.dtype,
            rows=memoryview(bytearray(count * row_bytes)),
            time_left_s=ZEROS_S,
        )
        call = Call(part.actor_id, part.generation, encode(frame), ZEROS_S)
        [outcome] = self._transport.send([call]).wait()
        if isinstance(outcome, CallFailure):
            return False
        try:
            answer = decode(outcome)
        except FrameError:
            return False
        return isinstance(answer, RowsFrame) and answer.request_id == frame.request_id
