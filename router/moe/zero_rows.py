"""Distinguishes bad rows from broken expert actors.

An actor answers with an error if its computation raises: either its device or the rows are at
fault. So after an expert's rows got two errors, from two copies or from the only one, the actor is
probed with rows of zeros. If it computes them, the rows are at fault and the step is given up: the
engine finds the request that they belong to (:mod:`router.engine.isolation`). If it does not, the
rows are sent again until the actor is replaced.

The actor is also probed before it gets, in a step of their own, rows that may kill it. So these
rows are not blamed for an actor that had died before, that is partitioned, or whose device fails
so that the controller is about to end it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence

from cluster.errors import FrameError, PoisonedRequestError
from cluster.transport.base import Call, CallFailure, Outcome, Transport
from cluster.wire.frames import DispatchFrame, Frame, RowsFrame, decode, encode
from cluster.wire.tensors import TORCH_DTYPES
from router.moe.pending import FailedPart, PendingLayer
from router.moe.permute import Part

MAX_ERRORS = 2
"""Error answers to an expert's rows in one layer before its actor is probed with zeros."""
ZEROS_S = 2.0
"""How long an actor may take to compute rows of zeros."""

logger = logging.getLogger("expertmesh.dispatch")


class ActorProbe:
    """Probes actors with rows of zeros; for one dispatcher."""

    def __init__(self, model: str, transport: Transport, request_ids: Iterator[int]) -> None:
        """``model`` is the model's key; ``request_ids`` yields ids for the dispatcher's frames."""
        self._model = model
        self._transport = transport
        self._request_ids = request_ids

    def check(self, layer: PendingLayer, failed_parts: Iterable[FailedPart]) -> None:
        """Raise :class:`PoisonedRequestError` if a part's rows are at fault, not its actor."""
        for part, failure in failed_parts:
            errors = max(map(layer.errors.count, part.expert_ids), default=0)
            if failure is None and errors >= MAX_ERRORS and self._are_computed(layer, part):
                logger.error(
                    "expert actors fail on some rows of layer %d; %s g%d computes other rows",
                    layer.layer_id,
                    part.actor_id,
                    part.generation,
                )
                raise PoisonedRequestError(
                    f"expert actors cannot compute this request in layer {layer.layer_id}"
                )

    def computing(self, layer: PendingLayer, parts: Sequence[Part]) -> set[str]:
        """Return the ids of the parts' actors that compute a frame of zeros."""
        answers = self._ask(layer, parts)
        asked = zip(parts, answers, strict=True)
        return {part.actor_id for part, answer in asked if isinstance(answer, RowsFrame)}

    def _are_computed(self, layer: PendingLayer, part: Part) -> bool:
        """Return whether a part's actor computes a row of zeros with each of the part's experts."""
        [answer] = self._ask(layer, [part])
        return isinstance(answer, RowsFrame)

    def _ask(self, layer: PendingLayer, parts: Sequence[Part]) -> list[Frame | None]:
        """Send each part's actor a row of zeros for each of the part's experts.

        Returns the actors' answers, ``None`` for an actor without one.
        """
        layer.copy_received()  # the transport's next wait overwrites the rows
        frames = [self._frame(layer, part) for part in parts]
        calls = [
            Call(part.actor_id, part.generation, encode(frame), ZEROS_S)
            for part, frame in zip(parts, frames, strict=True)
        ]
        outcomes = self._transport.send(calls).wait()
        return [_answer(frame, outcome) for frame, outcome in zip(frames, outcomes, strict=True)]

    def _frame(self, layer: PendingLayer, part: Part) -> DispatchFrame:
        count = len(part.expert_ids)
        row_bytes = math.prod(layer.row_shape) * TORCH_DTYPES[layer.dtype].itemsize
        return DispatchFrame(
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


def _answer(sent: DispatchFrame, outcome: Outcome) -> Frame | None:
    """Return the frame of a call's outcome, ``None`` if it does not answer ``sent``."""
    if isinstance(outcome, CallFailure):
        return None
    try:
        answer = decode(outcome)
    except FrameError:
        return None
    return answer if answer.request_id == sent.request_id else None
