"""Constrained choices: the tokens that a grammar allows next, computed beside the engine's steps.

A matcher (llguidance) reads a choice's tokens and tells which may follow. A router compiles
grammars on one thread and follows them on another, while the experts compute the choices' next
step. That thread takes all choices that have read a token, and tells of them together: an engine
that is woken for each, or competes with the thread for the interpreter's lock for each, loses more
time than the matchers need. A choice goes on elsewhere from its tokens: its matcher reads them
again.

Dimension letters: V vocabulary size, W words of 32 bits with a bit for each token.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from cluster.errors import ExpertMeshError, InternalError, InvalidRequestError
from router.grammar_limits import FIELD, grammar_pool, parser_limits

MAX_KEPT = 32
"""The grammars that a router keeps compiled."""
TOGETHER_S = 0.002
"""For how long the thread keeps answers back, to tell of more of them together."""

Answer = np.ndarray | BaseException
"""A bit for each token that may follow, uint32 [W]; or why none is known."""

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
        """``marks`` are the special tokens that may come where the grammar has them."""
        self.vocab_size = grammars.vocab_size
        self.answer: Answer | None = None
        """The answer to all tokens so far, once it is known. :class:`Grammars` guards it."""
        self.unread: list[int] = []
        """The tokens that no thread has taken yet; guarded too."""
        self.is_taken = True
        """Whether a thread has it, or will take it; guarded too."""
        self._grammars = grammars
        self._grammar = grammar
        self._marks = [token_id for token_id in marks if token_id < grammars.vocab_size]
        self._mark_words: np.ndarray | None = None
        self._matcher: LLMatcher | None = None
        self._token_ids: list[int] = []

    def read(self, token_id: int) -> None:
        """Read the choice's next token, and find out which may follow, after all before it."""
        self._grammars.follow(self, token_id)

    def close(self) -> None:
        """Find out nothing more; the choice has ended."""
        self._grammars.leave(self)

    def allowed(self, timeout_s: float) -> np.ndarray | None:
        """Return a bit for each token, uint32 [W]; ``None`` where that is not known in time.

        Raises :class:`InvalidRequestError` where no token may follow, or the tokens so far do not
        fit the grammar, or the grammar takes too much to follow.
        """
        answer = self.answer
        if answer is None:
            answer = self._grammars.wait_for(self, max(0.0, timeout_s))
        if answer is None or isinstance(answer, np.ndarray):
            return answer
        if isinstance(answer, ExpertMeshError):
            raise answer
        # Also a panic of Rust, which is no Exception and would end the engine's thread.
        logger.error("a grammar's matcher failed", exc_info=answer)
        raise InternalError(f"the grammar's matcher failed ({type(answer).__name__})")

    def answer_after(self, token_ids: Sequence[int]) -> Answer:
        """Read tokens, and return the answer; each call ends before the next begins."""
        try:
            return self._next(token_ids)
        except BaseException as error:
            return error

    def _next(self, token_ids: Sequence[int]) -> np.ndarray:
        self._token_ids += token_ids
        if self._matcher is None:
            self._matcher = self._grammars.matcher(self._grammar)
        vocabulary = self._grammars.vocabulary()
        words = _words_after(self._matcher, token_ids, vocabulary.num_tokens)
        if words is None:
            # Matchers of one grammar share its lexer, which others may have filled to its limit.
            self._matcher = self._grammars.matcher(self._grammar, is_compiled_again=True)
            words = _words_after(self._matcher, self._token_ids, vocabulary.num_tokens)
        if words is None:
            reason = self._matcher.get_error().partition("\n")[0][:200]
            told = f"the answer cannot go on by its grammar: {reason}"
            raise InvalidRequestError(told, FIELD)
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


def _words_after(
    matcher: LLMatcher, token_ids: Sequence[int], num_tokens: int
) -> np.ndarray | None:
    """Read tokens, and return a bit for each that may follow; ``None`` for a matcher in error."""
    matcher.consume_tokens(list(token_ids))
    if matcher.is_error():
        return None
    words = np.zeros(-(-num_tokens // 32), np.uint32)
    # It is llguidance.numpy's fill_next_token_bitmask, whose checks cost as much as the mask.
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    return None if matcher.is_error() else words


class Grammars:
    """Makes the constraints of a router, and has its threads and its compiled grammars."""

    def __init__(self, load: Callable[[], LLTokenizer], vocab_size: int) -> None:
        """``load`` returns the model's vocabulary, when a request first needs it."""
        self.vocab_size = vocab_size
        self._compiling, self._following = grammar_pool(), grammar_pool()
        self._load = load
        self._vocabulary: _Vocabulary | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._waiting: list[Constraint] = []
        self._is_following = False
        self._is_closed = False
        self._changed = threading.Condition()
        """Guards what threads share: the three before, and the state of each constraint."""

    def begin(self, grammar: str, marks: Sequence[int] = ()) -> Constraint:
        """Return the constraint of a new choice, whose grammar is compiled meanwhile.

        ``marks`` are the special tokens that the grammar may ask for.
        """
        constraint = Constraint(self, grammar, marks)
        self._compiling.submit(self._answer, [constraint])
        return constraint

    def follow(self, constraint: Constraint, token_id: int) -> None:
        """Have a thread read a choice's next token and answer; waits for nothing."""
        with self._changed:
            if isinstance(constraint.answer, BaseException):
                return
            constraint.answer = None
            constraint.unread.append(token_id)
            if not constraint.is_taken:
                self._hand_over(constraint)

    def leave(self, constraint: Constraint) -> None:
        """Answer nothing more of a choice."""
        with self._changed:
            constraint.answer = _not_followed()

    def wait_for(self, constraint: Constraint, timeout_s: float) -> Answer | None:
        """Return the answer to all tokens so far; ``None`` where it takes longer than that."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or constraint.answer is not None, timeout_s
            )
            is_lost = self._is_closed and constraint.answer is None
            return _not_followed() if is_lost else constraint.answer

    def close(self) -> None:
        """End the threads after their current work; what waits is not answered."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for pool in (self._compiling, self._following):
            pool.shutdown(wait=False, cancel_futures=True)

    def _hand_over(self, constraint: Constraint) -> None:
        """Have the thread that follows take a choice."""
        constraint.is_taken = True
        self._waiting.append(constraint)
        if not self._is_following and not self._is_closed:
            self._is_following = True
            self._following.submit(self._follow_all)

    def _follow_all(self) -> None:
        while True:
            with self._changed:
                taken, self._waiting = self._waiting, []
                self._is_following = bool(taken) and not self._is_closed
                if not self._is_following:
                    return
            self._answer(taken)

    def _answer(self, constraints: Iterable[Constraint]) -> None:
        """Read what these choices have not read, and tell of them, few at a time."""
        answers: list[tuple[Constraint, Answer]] = []
        tell_at_s = time.monotonic() + TOGETHER_S
        for constraint in constraints:
            with self._changed:
                if self._is_closed or constraint.answer is not None:  # its choice has ended
                    continue
                token_ids, constraint.unread = constraint.unread, []
            answers.append((constraint, constraint.answer_after(token_ids)))
            if time.monotonic() >= tell_at_s:
                self._tell(answers)
                answers, tell_at_s = [], time.monotonic() + TOGETHER_S
        self._tell(answers)

    def _tell(self, answers: Iterable[tuple[Constraint, Answer]]) -> None:
        with self._changed:
            for constraint, answer in answers:
                constraint.is_taken = False
                if constraint.answer is not None:  # its choice has ended
                    continue
                if constraint.unread and isinstance(answer, np.ndarray):
                    self._hand_over(constraint)
                else:
                    constraint.answer = answer
            self._changed.notify_all()

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
