"""The tokens of a request that have been passed on, whatever comes early, late or twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Set
from dataclasses import replace
from itertools import chain

from router.messages.request import GenerationRequest, Received, TokenEvent
from router.messages.routed import rows_after


class DeliveredTokens:
    """The tokens of each choice that have been passed on; events come early, late or twice."""

    def __init__(self, request: GenerationRequest) -> None:
        """Start with the tokens that the request's client has."""
        choices = [request.received_of(index) for index in range(request.sampling.n)]
        self._token_ids = [list(choice.token_ids) for choice in choices]
        self._num_prompt = request.num_prompt_logprobs
        self._of_prompt = [request.prompt_logprobs_of(index) for index in range(len(choices))]
        self._row_bytes = 1 if request.routed is None else request.routed.row_bytes
        self._num_routed = [request.num_routed_of(index) for index in range(len(choices))]
        self._finished = [choice.finished for choice in choices]
        self._exact = [choice.exact for choice in choices]
        self._identity = [choice.identity for choice in choices]

    def take(self, event: TokenEvent) -> TokenEvent | None:
        """Return the part of an event that was not passed on yet; it then counts as passed on.

        Returns ``None`` for an event without anything new, and for an event after a gap; a later
        event, or the call's reply, fills the gap.
        """
        passed_on = self._token_ids[event.index]
        skip = len(passed_on) - event.start
        num_routed = self._num_routed[event.index]
        routed: bytes | None = b""
        if event.routed:
            routed = rows_after(event.routed, event.routed_start, num_routed, self._row_bytes)
        if self._finished[event.index] or skip < 0 or routed is None:
            return None
        if event.routed:
            event = replace(event, routed=routed, routed_start=num_routed)
        token_ids = event.token_ids[skip:]
        if event.prompt_logprobs or self._of_prompt[event.index] < self._num_prompt:
            return self._take_prompt(event, token_ids)
        if not (token_ids or event.routed) and event.finish_reason is None:
            return None
        return self._pass_on(event, token_ids)

    def _take_prompt(self, event: TokenEvent, token_ids: tuple[int, ...]) -> TokenEvent | None:
        """Take an event while log probabilities of the prompt come, which precede any token."""
        passed_on = self._of_prompt[event.index]
        skip = passed_on - event.prompt_start
        rows = event.prompt_logprobs[max(skip, 0) :]
        has_more = bool(token_ids) or event.finish_reason is not None
        lacks_some = has_more and passed_on + len(rows) < self._num_prompt
        if (rows and skip < 0) or lacks_some or not (rows or has_more or event.routed):
            return None
        self._of_prompt[event.index] += len(rows)
        return self._pass_on(
            replace(event, prompt_logprobs=rows, prompt_start=passed_on), token_ids
        )

    def _pass_on(self, event: TokenEvent, token_ids: tuple[int, ...]) -> TokenEvent:
        """Return an event with only its last ``token_ids``, which then count as passed on."""
        passed_on = self._token_ids[event.index]
        skip = len(passed_on) - event.start
        passed_on.extend(token_ids)
        self._num_routed[event.index] += len(event.routed) // self._row_bytes
        self._finished[event.index] = event.finish_reason is not None
        self._exact[event.index] &= event.exact
        self._identity[event.index] = event.identity or self._identity[event.index]
        if not skip:  # all of it is new, as nearly always
            return event
        logprobs = event.logprobs[skip:]
        return replace(event, token_ids=token_ids, logprobs=logprobs, start=event.start + skip)

    def has_any(self) -> bool:
        """Return whether a token, or anything of the prompt, has been passed on."""
        return any(self._token_ids) or any(self._of_prompt) or any(self._num_routed)

    def progress(self) -> int:
        """Return how many tokens, log probabilities of the prompt and rows were passed on."""
        return sum(map(len, self._token_ids)) + sum(self._of_prompt) + sum(self._num_routed)

    def all_finished(self) -> bool:
        """Return whether no choice needs more tokens."""
        return all(self._finished)

    def received(self, stopped: Set[int] = frozenset()) -> tuple[Received, ...]:
        """Return the tokens that have been passed on, for a request that resumes from there.

        ``stopped`` are choices that need no more tokens.
        """
        parts = (
            self._token_ids, self._finished, self._exact, self._identity, self._of_prompt,
            self._num_routed,
        )  # fmt: skip
        return tuple(
            Received(tuple(token_ids), finished or index in stopped, *others)
            for index, (token_ids, finished, *others) in enumerate(zip(*parts, strict=True))
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
        tuple(chain.from_iterable([event.token_ids for event in events])),
        tuple(chain.from_iterable([event.logprobs for event in events])),
        events[-1].finish_reason,
        all(event.exact for event in events),
        events[0].start,
        events[0].identity,
        tuple(chain.from_iterable([event.prompt_logprobs for event in events])),
        events[0].prompt_start,
        max([event.cached_tokens for event in events]),
        b"".join([event.routed for event in events]),
        next((event.routed_start for event in events if event.routed), 0),
    )
