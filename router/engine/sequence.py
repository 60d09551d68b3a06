"""A sequence: one choice of one request, and its tokens in the next step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cluster.errors import ExpertMeshError, ExpertUnavailableError
from router.engine.token_rules import ChoiceRules
from router.messages.request import GenerationRequest
from router.moe.deaths import Deaths
from router.moe.missing import Awaited
from router.observability.tracing import RequestTrace

if TYPE_CHECKING:
    from router.engine.constraints import Constraint

ALONE_TOKENS = 8
"""How many new tokens of a suspect are computed alone. A dead router may have lost this many on
their way to the gateway, so the token at which it died need not be the first new one."""


@dataclass(slots=True)
class Times:
    """Times of a sequence on the monotonic clock; 0 where the event has not happened yet."""

    queued_at_s: float = 0.0
    scheduled_at_s: float = 0.0
    first_token_at_s: float = 0.0
    last_token_at_s: float = 0.0

    def phases_at_s(self) -> dict[str, float]:
        """Return the start of each phase of the sequence; 0 where it has not begun."""
        return {
            "queue": self.queued_at_s,
            "prefill": self.scheduled_at_s,
            "decode": self.first_token_at_s,
        }


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request: its tokens so far, and their slots in the cache.

    The first ``num_computed`` tokens have their keys and values in the cache. ``exact`` is false
    when any of these tokens was computed without an expert that the gate chose. A sequence with
    ``awaited`` experts is parked: it keeps its pages, and no step computes it. ``forced`` are
    generated tokens that a request resumed after a failure brings along. ``pages`` and ``slots``
    (the cache slot of every position up to ``max_length``) are empty while the sequence waits for
    admission. ``page_size`` is a page's number of slots. ``arrival`` is its place in the router's
    order of arrival.
    ``trace`` is set if the request's trace is sampled. ``deaths`` counts expert actors that died at
    the due tokens; ``try_at_s`` (monotonic) is when these are therefore computed alone. ``rules``
    edit the logits if the request has rules for single tokens. ``constraint`` knows the tokens that
    its grammar allows. A ``deferred`` sequence is recomputed because its grammar was slow;
    ``failure`` is its grammar's.

    ``prefix_keys`` are the key before the first token and the keys of the first pages; others'
    pages can replace the first ``most_shared``. Others may find ``num_entered`` pages; no more are
    registered once the cache's ``prefix_period`` has changed.
    ``num_cached`` prompt tokens were in others' pages (:mod:`router.engine.scheduling.prefixes`).
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
    page_size: int = 1
    times: Times = field(default_factory=Times)
    arrival: int = 0
    trace: RequestTrace | None = None
    deaths: Deaths | None = None
    try_at_s: float | None = None
    rules: ChoiceRules | None = None
    constraint: Constraint | None = None
    deferred: bool = False
    failure: ExpertMeshError | None = None
    prefix_keys: list[bytes] = field(default_factory=list)
    most_shared: int = 0
    num_entered: int = 0
    prefix_period: int = 0
    num_cached: int = 0

    @property
    def is_suspect(self) -> bool:
        """Whether the due tokens may kill a process, so that they are computed alone."""
        if self.request.alone and self.num_generated < len(self.forced) + ALONE_TOKENS:
            return True
        return self.deaths is not None and self.deaths.is_suspect

    @property
    def own_slots(self) -> np.ndarray:
        """The slots from the page of the next token to compute; no other sequence shares them."""
        return self.slots[self.num_computed - self.num_computed % self.page_size :]

    @property
    def num_generated(self) -> int:
        """The number of generated tokens, forced tokens included."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def is_edited(self) -> bool:
        """Whether its request restricts or edits which tokens may be drawn."""
        return self.rules is not None or self.constraint is not None

    @property
    def generated(self) -> list[int]:
        """The generated tokens, forced tokens included."""
        return self.token_ids[len(self.request.prompt_token_ids) :]

    @property
    def max_length(self) -> int:
        """The most tokens that the sequence can ever have."""
        return len(self.request.prompt_token_ids) + self.request.sampling.max_tokens

    @property
    def wants_no_tokens(self) -> bool:
        """Whether only the prompt is computed, for its log probabilities."""
        return self.request.sampling.max_tokens == 0

    @property
    def next_forced(self) -> int | None:
        """The next generated token if the request forces it, else ``None``."""
        number = self.num_generated
        return self.forced[number] if number < len(self.forced) else None

    def append(self, token_id: int) -> None:
        """Append a token, drawn or forced."""
        self.token_ids.append(token_id)
        if self.constraint is not None:
            self.constraint.read(token_id)

    def append_forced(self) -> None:
        """Append all forced tokens except the last, which may end the choice."""
        while self.num_generated < len(self.forced) - 1:
            self.append(self.forced[self.num_generated])

    def close(self) -> None:
        """Stop matching its grammar; the sequence has ended."""
        if self.constraint is not None:
            self.constraint.close()

    def unavailable(self) -> ExpertUnavailableError:
        """Return the error of a sequence that waited for experts until its deadline."""
        layer_id, expert_id = min(self.awaited)
        more = f" and {len(self.awaited) - 1} more" if len(self.awaited) > 1 else ""
        return ExpertUnavailableError(
            f"expert {expert_id} of layer {layer_id}{more} had no live copy until the deadline",
            self.request.model,
            1.0,
        )

    def occupy(self, pages: list[int], page_size: int) -> None:
        """Take pages of ``page_size`` slots for every position that the sequence can have."""
        positions = np.arange(self.max_length)
        self.pages, self.page_size = pages, page_size
        first_slots = np.asarray(pages, dtype=np.int64) * page_size
        self.slots = first_slots[positions // page_size] + positions % page_size


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens ``start:end`` of a sequence, to be computed in the next step.

    A token is sampled for the sequence if ``end`` is the end of its tokens.
    """

    sequence: Sequence
    start: int
    end: int
