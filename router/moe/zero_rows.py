"""Rows at which expert actors fail, told from actors that fail at all rows.

An actor answers an error where its computation raises: its device may be at fault, or the rows. So
where an expert's rows were answered by errors twice, by two copies or by the only one, that actor
is asked to compute rows of zeros. Where it does, the rows are at fault, and the step is given up:
the engine finds the request that has them (:mod:`router.engine.isolation`). Where it does not, the
rows are sent again until the actor is replaced.

Before rows that may end their actor are sent alone, the actor is asked for zeros too. So an actor
that has died before, that is cut off, or whose device fails, so that the controller is about to
end it, does not count as one that these rows have ended.
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

    def computing(self, layer: PendingLayer, parts: Sequence[Part]) -> set[str]:
        """Return the ids of the parts' actors that compute a frame of zeros."""
        answers = self._ask(layer, parts)
        asked = zip(parts, answers, strict=True)
        return {part.actor_id for part, answer in asked if isinstance(answer, RowsFrame)}

    def _are_computed(self, layer: PendingLayer, part: Part) -> bool:
        """Return whether a part's actor computes a row of zeros by each of the part's experts."""
        [answer] = self._ask(layer, [part])
        return isinstance(answer, RowsFrame)

    def _ask(self, layer: PendingLayer, parts: Sequence[Part]) -> list[Frame | None]:
        """Send each part's actor a row of zeros for each of the part's experts.

        Returns the actors' answers, ``None`` where there is none.
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
    """Return the frame of a call's outcome, ``None`` where it is no answer to ``sent``."""
    if isinstance(outcome, CallFailure):
        return None
    try:
        answer = decode(outcome)
    except FrameError:
        return None
    return answer if answer.request_id == sent.request_id else None
