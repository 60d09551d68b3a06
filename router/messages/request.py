"""The messages between gateway and router: a request, and the tokens of a step.

Both are plain data that msgpack can carry, with token ids alone: text is the gateway's part.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Set
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn; ``router/gateway/validate.py`` has checked it.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. ``seed`` is
    always set (the gateway draws a missing seed); the draws of choice ``i`` of ``n`` are a function
    of (seed, i, position). ``logprobs`` is the number of likeliest tokens reported beside the
    sampled token, or ``None`` for no log probabilities at all.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1


@dataclass(frozen=True, slots=True)
class Received:
    """The tokens that have come of one choice; a finished choice is not computed again.

    The tokens of an unfinished choice are forced: computed one to a step, as they were the first
    time, so that the same tokens follow. They are not emitted again. ``exact`` is false if any of
    them was flagged as not exact; then all later tokens are flagged too.
    """

    token_ids: tuple[int, ...] = ()
    finished: bool = False
    exact: bool = True
    identity: str = ""
    """That of the model that gave the tokens; no other model goes on from them."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One accepted request: ids in, ``sampling.n`` choices of ids out.

    ``deadline_s`` is the time of this process's monotonic clock after which the answer is of no
    use; the message has the time left instead. If ``streamed`` is false, only the first tokens of
    each choice are sent early; the others come with the reply. ``on_expert_loss`` is one of
    :data:`cluster.spec.ON_EXPERT_LOSS`. ``received`` has an entry for every choice of a request
    that goes on after a failure, and is empty for a new request; its tokens count towards
    ``max_tokens``. A request of a lower ``priority`` is handled earlier.
    """

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline_s: float
    on_expert_loss: str = "strict"
    streamed: bool = True
    received: tuple[Received, ...] = ()
    text_identity: str = ""
    """That of the files by which the gateway makes ids of text; empty where it does not matter."""
    alone: bool = False
    """Whether routers have died under the request, so that it is computed in steps of its own."""
    priority: int = 0

    def received_of(self, index: int) -> Received:
        """Return the tokens that have come of choice ``index``."""
        return self.received[index] if self.received else Received()

    def remaining_s(self) -> float:
        """Return the seconds left until the deadline; negative when it has passed."""
        return self.deadline_s - time.monotonic()

    def to_wire(self) -> dict[str, Any]:
        """Return the request as a msgpack-able dictionary."""
        wire = asdict(self)
        del wire["deadline_s"]
        return {**wire, "time_left_s": self.remaining_s()}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> GenerationRequest:
        """Rebuild a request from :meth:`to_wire`."""
        fields = dict(wire)
        deadline_s = time.monotonic() + fields.pop("time_left_s")
        sampling = SamplingParams(**wire["sampling"])
        ids = tuple(wire["prompt_token_ids"])
        received = tuple(
            Received(**{**choice, "token_ids": tuple(choice["token_ids"])})
            for choice in wire["received"]
        )
        fields |= {"sampling": sampling, "prompt_token_ids": ids, "received": received}
        return cls(**fields, deadline_s=deadline_s)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, of the untempered, unfiltered distribution.

    ``logprob`` is the sampled token's; ``top_ids`` and ``top_logprobs`` are those of the likeliest
    tokens, in descending order.
    """

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a whole request: its prompt once, and the output of all choices."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one choice.

    ``finish_reason`` is ``None`` while the choice goes on, else ``stop`` (the last id is an
    end-of-sequence token) or ``length``. ``exact`` is false if an expert's share was replaced or
    dropped for these tokens or any before them. ``start`` is the number of the choice's tokens
    before these. ``identity`` is the model's, and is set on the first tokens of a choice.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    exact: bool = True
    start: int = 0
    identity: str = ""

    def to_wire(self) -> list[Any]:
        """Return the event as a msgpack-able list."""
        logprobs = [[p.logprob, p.top_ids, p.top_logprobs] for p in self.logprobs]
        return [
            self.index,
            self.token_ids,
            logprobs,
            self.finish_reason,
            self.exact,
            self.start,
            self.identity,
        ]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> TokenEvent:
        """Rebuild an event from :meth:`to_wire`."""
        index, token_ids, logprobs, finish_reason, exact, start, identity = wire
        rows = tuple(TokenLogprobs(p[0], tuple(p[1]), tuple(p[2])) for p in logprobs)
        return cls(index, tuple(token_ids), rows, finish_reason, exact, start, identity)


class Receipts:
    """The tokens of each choice that have been passed on; events come early, late or twice."""

    def __init__(self, request: GenerationRequest) -> None:
        """Start with the tokens that the request's client has."""
        choices = [request.received_of(index) for index in range(request.sampling.n)]
        self._token_ids = [list(choice.token_ids) for choice in choices]
        self._finished = [choice.finished for choice in choices]
        self._exact = [choice.exact for choice in choices]
        self._identity = [choice.identity for choice in choices]

    def take(self, event: TokenEvent) -> TokenEvent | None:
        """Return the part of an event that was not passed on yet; it then counts as passed on.

        Returns ``None`` for an event without new tokens, and for an event after a gap; a later
        event, or the call's reply, fills the gap.
        """
        passed_on = self._token_ids[event.index]
        skip = len(passed_on) - event.start
        if self._finished[event.index] or skip < 0:
            return None
        token_ids = event.token_ids[skip:]
        if not token_ids and event.finish_reason is None:
            return None
        passed_on.extend(token_ids)
        self._finished[event.index] = event.finish_reason is not None
        self._exact[event.index] &= event.exact
        self._identity[event.index] = event.identity or self._identity[event.index]
        logprobs = event.logprobs[skip:]
        return replace(event, token_ids=token_ids, logprobs=logprobs, start=event.start + skip)

    def has_tokens(self) -> bool:
        """Return whether any token has been passed on."""
        return any(self._token_ids)

    def num_tokens(self) -> int:
        """Return how many tokens have been passed on."""
        return sum(map(len, self._token_ids))

    def all_finished(self) -> bool:
        """Return whether no choice needs more tokens."""
        return all(self._finished)

    def received(self, stopped: Set[int] = frozenset()) -> tuple[Received, ...]:
        """Return the tokens that have been passed on, for a request that goes on from there.

        ``stopped`` are choices that need no more tokens.
        """
        return tuple(
            Received(tuple(token_ids), finished or index in stopped, exact, identity)
            for index, (token_ids, finished, exact, identity) in enumerate(
                zip(self._token_ids, self._finished, self._exact, self._identity, strict=True)
            )
        )


def merge_events(events: Iterable[TokenEvent]) -> list[TokenEvent]:
    """Join the events of each choice, which follow each other, into one; ordered by choice."""
    per_choice: defaultdict[int, list[TokenEvent]] = defaultdict(list)
    for event in events:
        per_choice[event.index].append(event)
    return [_join(per_choice[index]) for index in sorted(per_choice)]


def _join(events: list[TokenEvent]) -> TokenEvent:
    if len(events) == 1:
        return events[0]
    return TokenEvent(
        events[0].index,
        tuple(token_id for event in events for token_id in event.token_ids),
        tuple(row for event in events for row in event.logprobs),
        events[-1].finish_reason,
        all(event.exact for event in events),
        events[0].start,
        events[0].identity,
    )
