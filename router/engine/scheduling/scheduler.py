"""Continuous batching: which sequences wait, which run, and which tokens the next step computes.

A sequence is admitted (:mod:`router.engine.scheduling.waiting`) only when the cache has pages for
its prompt and all tokens that it may generate, so no admitted sequence is ever evicted, whatever
its priority. Decoding sequences come first, with one token each. Prefill chunks share the rest of
the step's token budget (:mod:`router.engine.scheduling.prefill`), so a long prompt stalls neither
the decoding sequences nor short prompts.

When a sequence resumes after a failure, its forced tokens are computed like a prompt's if that
changes no bit (``is_independent``). Otherwise each takes a step of its own, as it did the first
time.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass

from cluster.errors import ExpertMeshError, OverloadedError
from router.engine.scheduling.prefill import Prompt, divide, tenant_budgets
from router.engine.scheduling.prefixes import Prefixes
from router.engine.scheduling.waiting import WaitingSequences
from router.engine.sequence import ScheduledChunk, Sequence
from router.messages.request import GenerationRequest
from router.model.page_pool import PrefixCache, pages_needed

logger = logging.getLogger("expertmesh.engine")


@dataclass(frozen=True, slots=True)
class Limits:
    """A replica's limits; see :class:`router.config.deployment.RouterConfig`."""

    max_batch_size: int
    max_batch_tokens: int
    max_queue_requests: int
    max_queue_tokens: int = 1_048_576


class Scheduler:
    """Holds all sequences of a router replica; used only by the engine's thread."""

    def __init__(
        self,
        limits: Limits,
        num_pages: int,
        page_size: int,
        even_context: float = math.inf,
        shared_by: str | None = None,
        is_independent: bool = False,
    ) -> None:
        """Start empty with ``num_pages`` pages of cache, of ``page_size`` tokens each.

        ``even_context`` comes from :class:`router.model.model.MoEModel`. With ``shared_by``, the
        model's identity, sequences share the pages of equal prefixes. ``is_independent`` says that
        a token's keys and values depend, bit for bit, only on the tokens so far and the weights,
        apart from its experts.
        """
        self._limits = limits
        self._even_context = even_context
        self._pool = PrefixCache(num_pages, page_size)
        self.prefixes = None if shared_by is None else Prefixes(self._pool, shared_by)
        self.num_pages = num_pages
        self.waiting = WaitingSequences(num_pages, page_size, limits.max_batch_tokens)
        self._arrivals = itertools.count()
        self._left_out = False
        self._is_independent = is_independent
        self._other_classes: frozenset[str] = frozenset()
        self.running: list[Sequence] = []

    def add(self, request: GenerationRequest) -> list[Sequence]:
        """Queue the unfinished choices of a request.

        Raises :class:`OverloadedError` when the queue is full, by choices or by tokens, or when
        even an empty cache could not hold one of the request's sequences. A tenant's only waiting
        request may exceed the limits, so that no other tenant can fill the queue against it.
        """
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
        self._check_room(request.tenant, len(added), length * len(added))
        for sequence in added:
            sequence.arrival = next(self._arrivals)
            self.waiting.add(sequence)
        return added

    def _check_room(self, tenant: str, num_choices: int, num_tokens: int) -> None:
        waiting, limits = self.waiting, self._limits
        if not waiting.has(tenant):
            return
        if len(waiting) + num_choices > limits.max_queue_requests:
            amount = f"{len(waiting)} choices"
        elif waiting.num_tokens + num_tokens > limits.max_queue_tokens:
            amount = f"{waiting.num_tokens} tokens"
        else:
            return
        num_requests = len({sequence.request.request_id for sequence in waiting})
        raise OverloadedError(f"is full: {num_requests} requests ({amount}) waiting", "queue", 1.0)

    def sequences(self) -> list[Sequence]:
        """Return every unfinished sequence."""
        return [*self.running, *self.waiting]

    def parked(self) -> list[Sequence]:
        """Return the running sequences that wait for experts."""
        return [sequence for sequence in self.running if sequence.awaited]

    def look(self, generations: Mapping[str, int], other_classes: frozenset[str]) -> None:
        """Notice expert actors that are gone, replaced, or run without native code.

        ``other_classes`` are the last group's kernel classes; see :meth:`Prefixes.look`.
        """
        if other_classes and other_classes != self._other_classes and self._is_independent:
            logger.info(
                "sharing no pages, and computing resumed requests one token a step, while some "
                "experts are computed without native code (%s)",
                ", ".join(sorted(other_classes)),
            )
        self._other_classes = other_classes
        if self.prefixes is not None:
            self.prefixes.look(generations, bool(other_classes))

    def schedule(self) -> list[ScheduledChunk]:
        """Admit sequences that fit; return the next step's chunks: decodes, then prefill.

        There are none while all running sequences are parked.
        """
        if self.prefixes is not None:
            for sequence in self.running:
                self.prefixes.update(sequence)
        self._admit()
        ready = [s for s in self.running if not s.awaited][: self._limits.max_batch_size]
        decodes = [s for s in ready if s.num_computed == len(s.token_ids) - 1]
        chunks = [ScheduledChunk(s, s.num_computed, len(s.token_ids)) for s in decodes]
        if len(decodes) < len(ready):
            # Decodes are never held back. Without decodes, a prompt gets at least a token a step.
            budget = max(self._limits.max_batch_tokens - len(chunks), 0 if chunks else 1)
            prompts = [s for s in ready if s.num_computed < len(s.token_ids) - 1]
            ends = [s for s in decodes if s.num_generated in (0, len(s.forced) - 1)]
            ending = {s.request.tenant for s in ends}
            # At least every second step computes some of the oldest prompt.
            leaves_out = not self._left_out
            shares = self._shares(prompts, budget, ending, leaves_out)
            self._left_out = leaves_out and not all(shares)
            for sequence, share in zip(prompts, shares, strict=True):
                if share:
                    start = sequence.num_computed
                    chunks.append(ScheduledChunk(sequence, start, start + share))
        return chunks

    def _shares(
        self, sequences: list[Sequence], budget: int, ending: Set[str], leaves_out: bool
    ) -> list[int]:
        """Return how many tokens of each prompt the step computes.

        ``ending`` are the tenants that have other prompts which the step ends.
        """
        of_tenant: defaultdict[str, list[Prompt]] = defaultdict(list)
        prompts = self._prompts_of(sequences)
        for sequence, prompt in zip(sequences, prompts, strict=True):
            of_tenant[sequence.request.tenant].append(prompt)
        budgets = dict.fromkeys(of_tenant, budget)
        if len(of_tenant) > 1:
            budgets = tenant_budgets(of_tenant, budget)
        shares = {
            name: iter(divide(own, budgets[name], name in ending, leaves_out, budget))
            for name, own in of_tenant.items()
        }
        return [next(shares[sequence.request.tenant]) for sequence in sequences]

    def _prompts_of(self, sequences: list[Sequence]) -> list[Prompt]:
        left = [len(s.token_ids) - s.num_computed for s in sequences]
        request_left: Counter[str] = Counter()
        for sequence, num_tokens in zip(sequences, left, strict=True):
            request_left[sequence.request.request_id] += num_tokens
        return [
            Prompt(
                num_tokens,
                request_left[sequence.request.request_id],
                len(sequence.token_ids),
                sequence.request.priority,
                sequence.arrival,
                1 + sequence.num_computed / self._even_context,
            )
            for sequence, num_tokens in zip(sequences, left, strict=True)
        ]

    def _admit(self) -> None:
        if not self.waiting:
            return
        # Parked sequences keep their pages, but do not count toward the batch. When they resume,
        # more sequences may run than a batch holds; the oldest are computed first.
        computed = [s for s in self.running if not s.awaited]
        num_ready = len(computed)
        held = {page for sequence in self.parked() for page in sequence.pages}
        num_attainable = self._pool.num_pages - len(held)
        while num_ready < self._limits.max_batch_size:
            sequence = self.waiting.next(self._pool.num_free, num_attainable)
            if sequence is None:
                return
            needed = pages_needed(sequence.max_length, self._pool.page_size)
            if self._is_independent and not self._other_classes:
                sequence.append_forced()
            if self.prefixes is None:
                sequence.occupy(self._pool.take(needed), self._pool.page_size)
            else:
                self.prefixes.occupy(sequence, needed)
            self.running.append(sequence)
            num_ready += 1

    def finish(self, sequence: Sequence, error: ExpertMeshError | None = None) -> None:
        """Remove a running or waiting sequence, possibly with an error; free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.close()
        if self.prefixes is not None:
            self.prefixes.release(sequence, error)
            return
        self._pool.give_back(sequence.pages)
        sequence.pages = []

    def use(self) -> float:
        """Return the used share of the cache or of the batch, whichever is larger.

        Waiting sequences count toward the batch, so the share may exceed 1. May be called on any
        thread.
        """
        of_batch = (len(self.running) + len(self.waiting)) / self._limits.max_batch_size
        return max(of_batch, 1 - self.num_free_pages / self.num_pages)

    @property
    def num_free_pages(self) -> int:
        """The number of free cache pages, including pages kept only for sharing."""
        return self._pool.num_free
