"""A layer in flight: the state that :mod:`router.moe.dispatch` keeps until its rows arrive.

Dimension letters: T tokens, K experts per token, H hidden size.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from cluster.placement.placement import Placement
from cluster.transport.base import CallFailure, PendingCalls
from cluster.wire.frames import DispatchFrame, Shape
from cluster.wire.tensors import from_bytes
from router.moe.combine import ExpertRows
from router.moe.deaths import LayerDeaths
from router.moe.device_rows import LayerRows
from router.moe.permute import Part

logger = logging.getLogger("expertmesh.dispatch")

Sent = tuple[Part, DispatchFrame]


class AwayError(Exception):
    """The experts of ``pairs`` did not answer by the step's deadline; they may still do so."""

    def __init__(self, pairs: np.ndarray) -> None:
        super().__init__(pairs)
        self.pairs = pairs


@dataclass(slots=True)
class Attempt:
    """The frames of one layer, their pending calls, and the placement under which they were sent.

    ``calls`` is ``None`` if no expert was asked. ``silent`` parts were not sent, since their actors
    do not answer.
    """

    placement: Placement
    most_rows: int
    sent: list[Sent] = field(default_factory=list)
    calls: PendingCalls | None = None
    silent: list[Part] = field(default_factory=list)


class FailedPart(NamedTuple):
    """A part without rows; ``failure`` is ``None`` if its actor answered, but without rows."""

    part: Part
    failure: CallFailure | None


@dataclass(slots=True)
class PendingLayer:
    """One layer that has been sent but not yet received.

    Pair t * K + r is token t with the gate's choice of rank r. ``rows`` are [T, *row_shape].
    """

    layer_id: int
    rows: LayerRows
    row_shape: Shape
    expert_of_pair: np.ndarray
    k: int
    dtype: str
    deadline_s: float
    started_at_s: float
    traceparent: str | None = None
    attempt: Attempt | None = None
    failures: int = 0
    received: list[ExpertRows] = field(default_factory=list)
    answered: list[Part] = field(default_factory=list)
    """The parts of ``received``."""
    is_asked_again: bool = False
    """Whether rows that are not finite were requested again."""
    damaged: Sequence[Part] = ()
    """The parts whose rows were not finite and were requested again."""
    failed_actors: frozenset[str] = frozenset()
    """Actors that failed in this layer; asked again only for experts without another copy."""
    deaths: Callable[[], LayerDeaths | None] = lambda: None
    """Returns the record of actors that die, if deaths are counted."""
    is_last_try: bool = False
    """Whether the rows belong to a suspect, so that a death has to be certain."""
    errors: tuple[int, ...] = ()
    """The experts that answered with an internal error, once for each answer."""
    refusals: tuple[int, ...] = ()
    """The experts whose rows were refused as malformed, once for each refusal."""
    owed_before: Mapping[str, int] | None = None
    """Each actor's outstanding work when copies were chosen; ``None`` if there was no choice."""

    def gives_up_at_s(
        self, failed: FailedPart, answer_timeout_s: Callable[[Part, int], float]
    ) -> float:
        """Return when the wait for a part without another copy ends.

        That is the deadline; a live actor always gets ``answer_timeout_s`` (part, most rows) at
        least.
        """
        if failed.failure is CallFailure.DIED or self.attempt is None:
            return self.deadline_s
        patient_until_s = self.started_at_s + answer_timeout_s(failed.part, self.attempt.most_rows)
        return max(self.deadline_s, patient_until_s)

    def damaging_actors(self, generations: Mapping[str, int]) -> frozenset[str]:
        """Return the actors of ``damaged`` parts whose generation has not changed since."""
        return frozenset(
            part.actor_id
            for part in self.damaged
            if generations.get(part.actor_id) == part.generation
        )

    def note_deaths(self, failed_parts: Iterable[FailedPart]) -> None:
        """Count the actors that died in a round; raises as :meth:`LayerDeaths.note`."""
        died = [failed.part for failed in failed_parts if failed.failure is CallFailure.DIED]
        deaths = self.deaths() if died else None
        if deaths is not None:
            deaths.note(died)

    def abandon(self) -> None:
        """Stop waiting for answers, since the layer's step fails."""
        if self.attempt is not None and self.attempt.calls is not None:
            self.attempt.calls.drop()

    def drop_damaged_once(self) -> list[Part]:
        """Do :meth:`drop_damaged` on the first call; return nothing on later calls."""
        if self.is_asked_again:
            return []
        self.is_asked_again = True
        self.copy_received()
        return self.drop_damaged()

    def drop_damaged(self) -> list[Part]:
        """Drop and return the parts with a row that is not finite though its hidden state is.

        Such rows are corrupt, or the expert itself produces them.
        """
        rows = self.rows
        if isinstance(rows, torch.Tensor):
            is_finite = rows.isfinite().flatten(1).all(dim=1).numpy()
        else:
            is_finite = rows.are_finite()
        damaged = [
            bool((is_finite[part.pairs // self.k] & ~self._finite_rows(rows)).any())
            for part, rows in zip(self.answered, self.received, strict=True)
        ]
        dropped = list(itertools.compress(self.answered, damaged))
        kept = [not is_damaged for is_damaged in damaged]
        self.answered = list(itertools.compress(self.answered, kept))
        self.received = list(itertools.compress(self.received, kept))
        return dropped

    def _finite_rows(self, received: ExpertRows) -> np.ndarray:
        """Return whether each row is finite, bool [P]."""
        num_rows = len(received.pairs)
        rows = from_bytes(received.rows, self.dtype, num_rows, (-1,))
        return rows.isfinite().all(dim=1).numpy()

    def copy_received(self) -> None:
        """Copy the received rows, since the transport's next wait may overwrite their memory."""
        self.received = [ExpertRows(rows.pairs, bytes(rows.rows)) for rows in self.received]


class DamageLog:
    """Logs each actor's first corruption; the dispatcher's ``retries`` count all."""

    def __init__(self) -> None:
        """Start empty."""
        self._actors: set[tuple[str, int]] = set()

    def note(self, part: Part, damage: str) -> None:
        """Log a part's corruption if it is its actor's first."""
        actor = part.actor_id, part.generation
        if actor not in self._actors:
            self._actors.add(actor)
            logger.warning("%s g%d: %s; further corruption is only counted", *actor, damage)
