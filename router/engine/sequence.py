"""A sequence: one choice of one request, and its tokens of the next step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from router.messages.request import GenerationRequest
from router.model.page_pool import PAGE_SIZE
from router.moe.missing import Awaited
from router.observability.tracing import RequestTrace


@dataclass(slots=True)
class Times:
    """When things happened to a sequence, on the monotonic clock; 0 is not yet."""

    queued_s: float = 0.0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    def phases_s(self) -> dict[str, float]:
        """Return when each phase of the sequence began; 0 is not yet."""
        return {
            "queue": self.queued_s,
            "prefill": self.scheduled_s,
            "decode": self.first_token_s,
        }


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request: its tokens so far, and where they are in the cache.

    ``num_computed`` tokens have their keys and values in the cache; ``exact`` is false when any of
    these were computed without an expert that they chose. A sequence that has ``awaited`` experts
    is parked: it keeps its place and its pages, and no step computes it. ``forced`` are the
    generated tokens that are given, of a request that goes on after a failure. ``pages`` and
    ``slots`` (the cache slot of every position up to ``max_length``) are empty while the sequence
    waits. ``trace`` is there where the request is sampled.
    """

    request: GenerationRequest
    index: int
    token_ids: list[int]
    num_computed: int = 0
    exact: bool = True
    awaited: frozenset[Awaited] = frozenset()
    forced: tuple[int, ...] = ()
    pages: list[int] = field(default_factory=list)
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    times: Times = field(default_factory=Times)
    trace: RequestTrace | None = None

    @property
    def num_generated(self) -> int:
        """How many tokens have been sampled."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def max_length(self) -> int:
        """The most tokens that the sequence can ever have."""
        return len(self.request.prompt_token_ids) + self.request.sampling.max_tokens

    @property
    def next_forced(self) -> int | None:
        """The next token where it is given, whatever is sampled."""
        place = self.num_generated
        return self.forced[place] if place < len(self.forced) else None

    def occupy(self, pages: list[int]) -> None:
        """Take pages for all positions that the sequence can ever have."""
        positions = np.arange(self.max_length)
        self.pages = pages
        first_slots = np.asarray(pages, dtype=np.int64) * PAGE_SIZE
        self.slots = first_slots[positions // PAGE_SIZE] + positions % PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens ``start:end`` of a sequence, to be computed in the next step.

    A token is sampled for the sequence where ``end`` is its last token's.
    """

    sequence: Sequence
    start: int
    end: int
