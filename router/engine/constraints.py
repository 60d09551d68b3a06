"""Constrained choices: the tokens that a grammar allows next, computed beside the engine's steps.

A matcher (llguidance) reads a choice's tokens and tells which may follow. A router compiles
grammars on one thread and follows them on another, while the experts compute the choices' next
step. A choice goes on elsewhere from its tokens: its matcher reads them again.

Dimension letters: V vocabulary size, W words of 32 bits with a bit for each token.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from cluster.errors import ExpertMeshError, InternalError, InvalidRequestError
from router.grammar_limits import FIELD, grammar_pool, parser_limits

MAX_KEPT = 32
"""The grammars that a router keeps compiled."""

logger = logging.getLogger("expertmesh.engine")


class _Vocabulary(NamedTuple):
    """A model's tokens, as grammars need them."""

    tokens: LLTokenizer
    num_tokens: int
    """How many tokens a matcher tells of: the tokenizer's or the model's, whichever are more."""
    may_end: np.ndarray
    """uint32 [W]: the model's tokens but special ones that are no ends: they have no text."""
    may_not_end: np.ndarray
    """uint32 [W]: as before, without ends, where one would stand for its name in the text."""


class Constraint:
    """One choice's matcher, and the tokens that it allows next."""

    def __init__(self, grammars: Grammars, grammar: str, marks: Sequence[int] = ()) -> None:
        """Begin to compile the grammar, and to find out which tokens may come first.

        ``marks`` are the special tokens that may come where the grammar has them.
        """
        self.vocab_size = grammars.vocab_size
        self._grammars = grammars
        self._grammar = grammar
        self._marks = [token_id for token_id in marks if token_id < grammars.vocab_size]
        self._mark_words: np.ndarray | None = None
        self._matcher: LLMatcher | None = None
        self._token_ids: list[int] = []
        self._answer: Future[np.ndarray] = grammars.compiling.submit(self._next, ())

    def read(self, token_id: int) -> None:
        """Read the choice's next token, and find out which may follow, after all before it."""
        before, self._answer = self._answer, Future()
        before.add_done_callback(partial(self._follow, self._answer, token_id))

    def close(self) -> None:
        """Find out nothing more; the choice has ended."""
        self._answer.cancel()

    def allowed(self, timeout_s: float) -> np.ndarray | None:
        """Return a bit for each token, uint32 [W]; ``None`` where that is not known in time.

        Raises :class:`InvalidRequestError` where no token may follow, or the tokens so far do not
        fit the grammar, or the grammar takes too much to follow.
        """
        try:
            error = self._answer.exception(max(0.0, timeout_s))
        except TimeoutError:
            if self._grammars.is_closed:
                raise _not_followed() from None
            return None
        except CancelledError:  # the router ends
            raise _not_followed() from None
        if error is None or isinstance(error, ExpertMeshError):
            return self._answer.result()
        # Also a panic of Rust, which is no Exception and would end the engine's thread.
        logger.error("a grammar's matcher failed", exc_info=error)
        raise InternalError(f"the grammar's matcher failed ({type(error).__name__})")

    def _follow(self, answer: Future[np.ndarray], token_id: int, before: object) -> None:
        """Have a thread find an answer, once the one before it is there."""
        try:
            self._grammars.follow(partial(self._answer_by, answer, token_id))
        except RuntimeError:  # the router ends
            answer.cancel()

    def _answer_by(self, answer: Future[np.ndarray], token_id: int) -> None:
        if not answer.set_running_or_notify_cancel():
            return
        try:
            answer.set_result(self._next((token_id,)))
        except BaseException as error:
            answer.set_exception(error)

    def _next(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read tokens, and return what may follow; each call ends before the next begins."""
        self._token_ids += token_ids
        if self._matcher is None:
            self._matcher = self._grammars.matcher(self._grammar)
        self._matcher.consume_tokens(list(token_ids))
        vocabulary = self._grammars.vocabulary()
        bits = allocate_token_bitmask(1, vocabulary.num_tokens)
        if not _fill(self._matcher, bits):
            # Matchers of one grammar share its lexer, which others may have filled to its limit.
            self._matcher = self._grammars.matcher(self._grammar, is_compiled_again=True)
            self._matcher.consume_tokens(self._token_ids)
            if not _fill(self._matcher, bits):
                reason = self._matcher.get_error().partition("\n")[0][:200]
                told = f"the answer cannot go on by its grammar: {reason}"
                raise InvalidRequestError(told, FIELD)
        words: np.ndarray = bits[0]
        allowed = vocabulary.may_end if self._matcher.is_accepting() else vocabulary.may_not_end
        if self._marks:
            if self._mark_words is None:
                self._mark_words = _words_of(self._marks, vocabulary.num_tokens)
            allowed = allowed | self._mark_words
        words &= allowed
        if not words.any():
            raise InvalidRequestError("the grammar allows no token of the model here", FIELD)
        return words


def _not_followed() -> InternalError:
    return InternalError("the grammar is not followed any more")


def flags_of(words: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the bits of words [..., W] as flags, bool [..., V]."""
    flags = np.unpackbits(words.view(np.uint8), axis=-1, count=vocab_size, bitorder="little")
    return flags.view(np.bool_)


def _words_of(token_ids: Collection[int], num_tokens: int) -> np.ndarray:
    """Return a bit for each token, uint32 [W], which is set for these."""
    flags = np.zeros(-(-num_tokens // 32) * 32, np.bool_)
    flags[list(token_ids)] = True
    return np.packbits(flags, bitorder="little").view(np.uint32)


def _fill(matcher: LLMatcher, bits: np.ndarray) -> bool:
    """Fill a mask of the tokens that may follow; returns whether the matcher is without error."""
    if not matcher.is_error():
        fill_next_token_bitmask(matcher, bits)
    return not matcher.is_error()


class Grammars:
    """Makes the constraints of a router, and has its threads and its compiled grammars."""

    def __init__(self, load: Callable[[], LLTokenizer], vocab_size: int) -> None:
        """``load`` returns the model's vocabulary, when a request first needs it."""
        self.vocab_size = vocab_size
        self.is_closed = False
        self.compiling = grammar_pool()
        self._following = grammar_pool()
        self._waiting: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._load = load
        self._vocabulary: _Vocabulary | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def begin(self, grammar: str, marks: Sequence[int] = ()) -> Constraint:
        """Return the constraint of a new choice; waits for nothing.

        ``marks`` are the special tokens that the grammar may ask for.
        """
        return Constraint(self, grammar, marks)

    def follow(self, work: Callable[[], None]) -> None:
        """Have work done on a thread, after the works before it; it must not raise.

        Raises ``RuntimeError`` where the threads have ended.
        """
        with self._lock:  # a thread takes all that waits: to begin it once a work is dear
            if self.is_closed:
                raise RuntimeError("the threads have ended")
            self._waiting.append(work)
            if len(self._waiting) == 1:
                self._following.submit(self._do_all)

    def _do_all(self) -> None:
        while self._waiting and not self.is_closed:
            self._waiting[0]()
            with self._lock:
                self._waiting.popleft()

    def close(self) -> None:
        """End the threads after their current work; what waits is not done."""
        with self._lock:
            self.is_closed = True
        for pool in (self.compiling, self._following):
            pool.shutdown(wait=False, cancel_futures=True)

    def vocabulary(self) -> _Vocabulary:
        """Return the model's vocabulary, loaded when it is first needed."""
        if self._vocabulary is None:
            tokens = self._load()
            num_tokens = max(self.vocab_size, tokens.vocab_size)
            ends = set(tokens.eos_tokens)
            special = set(filter(tokens.is_special_token, range(tokens.vocab_size)))
            model = set(range(self.vocab_size))
            self._vocabulary = _Vocabulary(
                tokens,
                num_tokens,
                _words_of(model - (special - ends), num_tokens),
                _words_of(model - special - ends, num_tokens),
            )
        return self._vocabulary

    def matcher(self, grammar: str, is_compiled_again: bool = False) -> LLMatcher:
        """Return a new matcher, a copy of the one that is kept compiled.

        One that is compiled again shares nothing with those before it.
        """
        compiled = self._compiled.pop(grammar, None)
        if compiled is None or is_compiled_again:
            tokens = self.vocabulary().tokens
            compiled = LLMatcher(tokens, grammar, log_level=0, limits=parser_limits())
        self._compiled[grammar] = compiled
        while len(self._compiled) > MAX_KEPT:
            self._compiled.popitem(last=False)
        return compiled.deep_copy()
