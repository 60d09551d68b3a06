"""Handles a part without rows: counts it, and avoids or suspects its actor.

An actor that died, is silent or fails is avoided at once and reported to the controller. A corrupt
frame says nothing about its actor: only the connection is replaced.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cluster.errors import Code, ExpertFailedError, FrameError, InternalError
from cluster.transport.base import CallFailure
from cluster.wire.frames import ErrorFrame, Frame
from router.moe.copy_choice import CopyChoice
from router.moe.pace import LatencyTracker
from router.moe.pending import AwayError, DamageLog, FailedPart, PendingLayer
from router.moe.permute import Part
from router.retry import RetryPolicy

if TYPE_CHECKING:  # the workshop computes layers without Ray, which the view imports
    from router.control.placement_view import PlacementView

BACKOFF = RetryPolicy(first_delay_s=0.02, max_delay_s=0.2)
"""The delays between attempts while every expert has a live copy."""
MAX_REFUSALS = 3
"""After this many refusals of an expert's rows as malformed, the router itself is at fault."""

logger = logging.getLogger("expertmesh.dispatch")


class Failures:
    """The failures that one dispatcher sees; ``retries`` counts them by reason."""

    def __init__(
        self,
        copies: CopyChoice,
        suspect: Callable[[str, int], None],
        renew: Callable[[str], None],
    ) -> None:
        """``copies`` avoids actors. ``suspect`` reports (actor_id, generation) to the controller.

        ``renew`` replaces the connection to an actor.
        """
        self.retries: Counter[str] = Counter()
        self._copies = copies
        self._suspect = suspect
        self._renew = renew
        self._damage_log = DamageLog()

    def note_no_rows(
        self, layer: PendingLayer, part: Part, answer: CallFailure | FrameError | Frame
    ) -> None:
        """Count why a part has no rows; the caller sends it again.

        Raises the error of an expert that cannot compute the rows, and :class:`InternalError` for a
        frame that is refused as malformed every time.
        """
        if isinstance(answer, ErrorFrame):
            self._note_refusal(layer, part, answer)
        elif isinstance(answer, FrameError):
            self._note_damage(part, answer)
        elif answer is CallFailure.DAMAGED:
            self._note_damage(part, "its checksum is wrong", answer.value)
        elif isinstance(answer, CallFailure):
            self.retries[answer.value] += 1
            self._avoid(part)
        else:
            self._note_damage(part, "the answer does not match the call")

    def note_not_finite(self, parts: Iterable[Part]) -> None:
        """Count parts with rows that are not finite, and have the controller check their actors.

        The rows themselves may be at fault, so no actor is avoided before :meth:`note_mended`.
        """
        for part in parts:
            self._damage_log.note(part, "rows that are not finite")
            self.retries["not_finite"] += 1
            self._suspect(part.actor_id, part.generation)

    def note_mended(self, layer: PendingLayer) -> None:
        """Avoid the actors whose rows were not finite, since the repeated rows are finite.

        If the repeated rows are not finite either, the model produces them; no actor is at fault.
        """
        for part in layer.damaged:
            self._avoid(part)

    def _note_refusal(self, layer: PendingLayer, part: Part, answer: ErrorFrame) -> None:
        """Count a refusal, so that the frame is sent again. Raises as :meth:`note_no_rows`."""
        if isinstance(answer.error, ExpertFailedError):
            raise answer.error
        if answer.is_damage:
            self._note_damage(part, answer.error, CallFailure.DAMAGED.value)
            return
        if answer.error.code is not Code.INVALID_ARGUMENT:
            self.retries[answer.kind] += 1
            if answer.error.code is Code.INTERNAL:
                layer.errors += part.expert_ids
                self._avoid(part)
            return
        layer.refusals += part.expert_ids
        if max(map(layer.refusals.count, part.expert_ids)) >= MAX_REFUSALS:
            logger.error("%s refused a frame: %s", part.actor_id, answer.error)
            raise InternalError("expert actors refuse this request's rows as malformed")
        self._note_damage(part, answer.error)

    def _note_damage(self, part: Part, damage: object, reason: str = "malformed") -> None:
        """Count a frame that was corrupted on its way to or from an actor."""
        self._damage_log.note(part, f"a corrupt frame: {damage}")
        self.retries[reason] += 1
        self._renew(part.actor_id)

    def _avoid(self, part: Part) -> None:
        self._copies.note_failure(part.actor_id, part.generation, time.monotonic())
        self._suspect(part.actor_id, part.generation)


def check_away(
    layer: PendingLayer,
    failed_parts: Sequence[FailedPart],
    answer_timeout_s: Callable[[Part, int], float],
    pace: LatencyTracker,
) -> None:
    """Raise :class:`AwayError` once the wait for a part without another copy is over.

    ``answer_timeout_s`` is as in :meth:`PendingLayer.gives_up_at_s`. It also records who is left
    out.
    """
    now_s = time.monotonic()
    away = [
        failed.part
        for failed in failed_parts
        if now_s >= layer.gives_up_at_s(failed, answer_timeout_s)
    ]
    if away:
        pace.left_out((part.actor_id, part.generation) for part in away)
        raise AwayError(np.concatenate([part.pairs for part in away]))


def back_off(layer: PendingLayer, view: PlacementView) -> None:
    """Wait a moment before a layer is sent again, or less if a new placement comes."""
    wait_s = BACKOFF.delay_s(layer.failures, random.random()) or 0.0
    layer.failures += 1
    if layer.attempt is not None:
        view.wait_newer(layer.attempt.placement, wait_s)
