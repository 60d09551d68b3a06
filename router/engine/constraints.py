"""Constrained choices: the tokens that a grammar allows next, computed beside the engine's steps.

A matcher (llguidance) reads a choice's tokens and tells which may follow. All matchers of a router
run on a thread of their own, while the experts compute the choice's next step. A choice goes on
elsewhere from its tokens: its matcher reads them again.

Dimension letters: V vocabulary size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from cluster.errors import InvalidRequestError
from router.grammar_limits import FIELD, parser_limits

MAX_KEPT = 32
"""The grammars that a router keeps compiled."""


class Constraint:
    """One choice's matcher, and the tokens that it allows next."""

    def __init__(
        self, pool: ThreadPoolExecutor, make: Callable[[], LLMatcher], vocab_size: int
    ) -> None:
        """``make`` returns a new matcher; called on the thread of ``pool``."""
        self._pool = pool
        self._make = make
        self._vocab_size = vocab_size
        self._matcher: LLMatcher | None = None
        self._answer = pool.submit(self._next, ())

    def read(self, token_ids: Sequence[int]) -> None:
        """Read the choice's next tokens, and begin to find out which may follow."""
        self._answer = self._pool.submit(self._next, tuple(token_ids))

    def allowed(self, timeout_s: float) -> np.ndarray | None:
        """Return a flag for each token, bool [V]; ``None`` where that is not known in time.

        Raises :class:`InvalidRequestError` where no token may follow, or the tokens so far do not
        fit the grammar, or the grammar takes too much to follow.
        """
        try:
            return self._answer.result(max(0.0, timeout_s))
        except TimeoutError:
            return None

    def _next(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read tokens, and return what may follow; runs on the pool's thread, in order."""
        matcher = self._started()
        matcher.consume_tokens(list(token_ids))
        if not matcher.is_error():
            bits = allocate_token_bitmask(1, self._vocab_size)
            fill_next_token_bitmask(matcher, bits)
        if matcher.is_error():
            reason = matcher.get_error().partition("\n")[0][:200]
            raise InvalidRequestError(f"the answer cannot go on by its grammar: {reason}", FIELD)
        flags = np.unpackbits(bits.view(np.uint8), bitorder="little")[: self._vocab_size]
        if not flags.any():
            raise InvalidRequestError("the grammar allows no token of the model here", FIELD)
        return flags.view(np.bool_)

    def _started(self) -> LLMatcher:
        if self._matcher is None:
            self._matcher = self._make()
        return self._matcher


class Grammars:
    """Makes the constraints of a router; its thread compiles grammars and runs all matchers."""

    def __init__(self, load: Callable[[], LLTokenizer], vocab_size: int) -> None:
        """``load`` returns the model's vocabulary, when a request first needs it."""
        self._load = load
        self._vocab_size = vocab_size
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammars")

    def begin(self, grammar: str) -> Constraint:
        """Return the constraint of a new choice; waits for nothing."""
        return Constraint(self._pool, lambda: self._matcher(grammar), self._vocab_size)

    def close(self) -> None:
        """End the thread after its current work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _matcher(self, grammar: str) -> LLMatcher:
        """Return a new matcher, a copy of the one that is kept compiled."""
        compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            if self._vocabulary is None:
                self._vocabulary = self._load()
            compiled = LLMatcher(self._vocabulary, grammar, log_level=0, limits=parser_limits())
        self._compiled[grammar] = compiled
        while len(self._compiled) > MAX_KEPT:
            self._compiled.popitem(last=False)
        return compiled.deep_copy()
