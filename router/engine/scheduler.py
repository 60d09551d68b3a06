"""Continuous batching: which sequences wait, which run, and which tokens the next step computes.

A sequence is admitted only when the cache has pages for its prompt and all tokens that it may
generate, so no admitted sequence is ever evicted. Decoding sequences come first, with one token
each. Prefill chunks get the rest of the step's token budget, so a long prompt does not stall the
decoding sequences.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from cluster.errors import OverloadedError
from router.engine.sequence import Sequence, Work
from router.messages.request import GenerationRequest
from router.model.page_pool import PagePool, pages_needed


@dataclass(frozen=True, slots=True)
class Limits:
    """A replica's limits; see :class:`router.config.RouterConfig`."""

    max_batch_size: int
    max_batch_tokens: int
    max_queue_requests: int
    max_queue_tokens: int = 1_048_576


class Scheduler:
    """Holds all sequences of a router replica; used by the engine's thread alone."""

    def __init__(self, limits: Limits, num_pages: int, page_size: int) -> None:
        """Start empty with ``num_pages`` pages of cache, of ``page_size`` tokens each."""
        self._limits = limits
        self._pool = PagePool(num_pages, page_size)
        self.num_pages = num_pages
        self.waiting: deque[Sequence] = deque()
        self._waiting_tokens = 0
        self.running: list[Sequence] = []

    def add(self, request: GenerationRequest) -> list[Sequence]:
        """Queue the unfinished choices of a request.

        Raises :class:`OverloadedError` when the queue is full, by requests or by tokens, or when
        even an empty cache could not hold one of the request's sequences.
        """
        waiting = {sequence.request.request_id for sequence in self.waiting}
        if len(waiting) >= self._limits.max_queue_requests:
            raise OverloadedError(f"{len(waiting)} requests wait already", "queue", 1.0)
        prompt = request.prompt_token_ids
        length = len(prompt) + request.sampling.max_tokens
        if pages_needed(length, self._pool.page_size) > self._pool.num_pages:
            capacity = self._pool.num_pages * self._pool.page_size
            raise OverloadedError(
                f"prompt and max_tokens need {length} cache tokens; a router has {capacity}"
            )
        added = [
            Sequence(request, i, list(prompt), exact=received.exact, forced=received.token_ids)
            for i in range(request.sampling.n)
            if not (received := request.received_of(i)).finished
        ]
        tokens = self._waiting_tokens + length * len(added)
        if self.waiting and tokens > self._limits.max_queue_tokens:
            raise OverloadedError(
                f"{self._waiting_tokens} tokens of {len(waiting)} requests wait already",
                "queue",
                1.0,
            )
        self._waiting_tokens = tokens
        self.waiting.extend(added)
        return added

    def sequences(self) -> list[Sequence]:
        """Return every sequence that is not finished."""
        return [*self.running, *self.waiting]

    def parked(self) -> list[Sequence]:
        """Return the running sequences that wait for experts."""
        return [sequence for sequence in self.running if sequence.awaited]

    def schedule(self) -> list[Work]:
        """Admit sequences that fit; return the next step's works: decodes, then prefill chunks.

        There are none while all running sequences are parked.
        """
        self._admit()
        ready = [s for s in self.running if not s.awaited][: self._limits.max_batch_size]
        decodes = [s for s in ready if s.num_computed == len(s.token_ids) - 1]
        budget = self._limits.max_batch_tokens
        works = [Work(s, s.num_computed, len(s.token_ids)) for s in decodes]
        # Decodes are never held back. Without any, a prompt gets at least one token a step.
        budget = max(budget - len(works), 0 if works else 1)
        for sequence in ready:
            left = len(sequence.token_ids) - sequence.num_computed
            if left > 1 and budget > 0:
                count = min(left, budget)
                start = sequence.num_computed
                works.append(Work(sequence, start, start + count))
                budget -= count
        return works

    def _admit(self) -> None:
        # Parked sequences keep their pages, but do not count for the batch. When they go on, more
        # sequences may run than fit into a batch; the oldest are computed first.
        num_ready = len(self.running) - len(self.parked())
        while self.waiting and num_ready < self._limits.max_batch_size:
            needed = pages_needed(self.waiting[0].max_length, self._pool.page_size)
            if needed > self._pool.num_free:
                return
            sequence = self.waiting.popleft()
            self._waiting_tokens -= sequence.max_length
            sequence.occupy(self._pool.take(needed), self._pool.page_size)
            self.running.append(sequence)
            num_ready += 1

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence, running or waiting, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self._waiting_tokens -= sequence.max_length
        self._pool.give_back(sequence.pages)
        sequence.pages = []

    def use(self) -> float:
        """Return the used share of the cache or of the batch, whichever is larger.

        Waiting sequences count as part of the batch, so the share may be above 1. May be called on
        any thread.
        """
        of_batch = (len(self.running) + len(self.waiting)) / self._limits.max_batch_size
        return max(of_batch, 1 - self.num_free_pages / self.num_pages)

    @property
    def num_free_pages(self) -> int:
        """The number of free cache pages."""
        return self._pool.num_free
