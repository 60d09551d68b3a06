"""Constrained choices: the tokens that a grammar allows next, computed beside the engine's steps.

A matcher (llguidance) reads a choice's tokens and tells which may follow. A router compiles
grammars on one thread and follows them on another, while the experts compute the choices' next
step. All choices of a step are followed by one call, which needs no interpreter: an engine that
competes with the thread for the interpreter's lock at each choice loses more time than the matchers
need. A choice goes on elsewhere from its tokens: its matcher reads them again.

Dimension letters: G choices, V vocabulary size, W words of 32 bits with a bit for each token.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from cluster.errors import ExpertMeshError, InternalError, InvalidRequestError
from router.grammar_limits import FIELD, grammar_pool, parser_limits, start_grammar_thread

MAX_KEPT = 32
"""The grammars that a router keeps compiled."""
MOST_TOGETHER = 64
"""The choices that one call follows."""
QUICK_S = 0.0002
"""What a choice takes of a call at most, on average, while its mates go on together."""

Answer = np.ndarray | BaseException
"""A bit for each token that may follow, uint32 [W]; or why none is known."""
Notes = list[tuple["Constraint", int | Answer]]
"""The tokens that choices have read, in their order; or the first answer of one that is new."""

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


class Answered(NamedTuple):
    """What may follow the first tokens of a choice."""

    num_read: int
    answer: Answer


class Constraint:
    """One choice's matcher, and the tokens that it allows next.

    The engine's thread reads and asks; the matcher belongs to the thread that compiles, and then to
    the one that follows.
    """

    def __init__(self, grammars: Grammars, grammar: str, marks: Sequence[int] = ()) -> None:
        """``marks`` are the special tokens that may come where the grammar has them."""
        self.vocab_size = grammars.vocab_size
        self.num_read = 0
        self.is_ended = False
        self.answered: Answered | None = None
        """The newest answer, which may be that to fewer tokens."""
        self.unread: list[int] = []
        """The tokens that the matcher reads next."""
        self.matcher: LLMatcher | None = None
        self.is_slow = False
        """Whether its matcher, or those of a call that it had part in, took long."""
        self._grammars = grammars
        self._grammar = grammar
        self._marks = [token_id for token_id in marks if token_id < grammars.vocab_size]
        self._mark_words: np.ndarray | None = None
        self._token_ids: list[int] = []

    def read(self, token_id: int) -> None:
        """Read the choice's next token; :meth:`Grammars.follow` finds out which may follow."""
        self.num_read += 1
        self._grammars.note(self, token_id)

    def close(self) -> None:
        """Find out nothing more; the choice has ended."""
        self.is_ended, self.answered = True, Answered(0, not_followed())

    @property
    def known(self) -> Answer | None:
        """The answer to all tokens so far, or why there will be none; ``None`` before it is known.

        An error is the answer to all later tokens too.
        """
        if self.answered is None:
            return None
        num_read, answer = self.answered
        return answer if num_read == self.num_read or isinstance(answer, BaseException) else None

    def allowed(self, timeout_s: float) -> np.ndarray | None:
        """Return a bit for each token, uint32 [W]; ``None`` where that is not known in time.

        Raises :class:`InvalidRequestError` where no token may follow, or the tokens so far do not
        fit the grammar, or the grammar takes too much to follow.
        """
        answer = self.known
        if answer is None:
            answer = self._grammars.wait_for(self, max(0.0, timeout_s))
        if answer is None or isinstance(answer, np.ndarray):
            return answer
        if isinstance(answer, ExpertMeshError):
            raise answer
        # Also a panic of Rust, which is no Exception and would end the engine's thread.
        logger.error("a grammar's matcher failed", exc_info=answer)
        raise InternalError(f"the grammar's matcher failed ({type(answer).__name__})")

    def tell(self, answer: Answer) -> None:
        """Take the answer to what the matcher has read."""
        if not self.is_ended:
            self.answered = Answered(len(self._token_ids), answer)

    @property
    def is_waiting(self) -> bool:
        """Whether tokens wait that can be read."""
        answered = self.answered
        return bool(self.unread) and answered is not None and type(answered.answer) is np.ndarray

    def take_unread(self) -> list[int]:
        """Return what the matcher reads now."""
        token_ids, self.unread = self.unread, []
        self._token_ids += token_ids
        return token_ids

    def answer_alone(self, token_ids: Sequence[int]) -> Answer:
        """Return the answer once the matcher has read what was taken; a new matcher reads all."""
        begun_at_s = time.thread_time()
        try:
            return self._next(token_ids)
        except BaseException as error:
            return error
        finally:
            self.is_slow = time.thread_time() - begun_at_s > QUICK_S

    def _next(self, token_ids: Sequence[int]) -> np.ndarray:
        matcher, num_tokens = self.matcher, self._grammars.vocabulary().num_tokens
        if matcher is None:
            matcher, token_ids = self._grammars.matcher(self._grammar), self._token_ids
        words = _words_after(matcher, token_ids, num_tokens)
        if words is None:
            # Matchers of one grammar share its lexer, which others may have filled to its limit.
            matcher = self._grammars.matcher(self._grammar, is_compiled_again=True)
            words = _words_after(matcher, self._token_ids, num_tokens)
        self.matcher = matcher
        if words is None:
            reason = matcher.get_error().partition("\n")[0][:200]
            told = f"the answer cannot go on by its grammar: {reason}"
            raise InvalidRequestError(told, FIELD)
        words &= self.may_come(matcher.is_accepting())
        if not words.any():
            raise _barred()
        return words

    def may_come(self, is_accepting: bool) -> np.ndarray:
        """Return the tokens that an answer may have, whatever its grammar says, uint32 [W]."""
        vocabulary = self._grammars.vocabulary()
        words = vocabulary.may_end if is_accepting else vocabulary.may_not_end
        if self._marks:
            if self._mark_words is None:
                self._mark_words = _words_of(self._marks, vocabulary.num_tokens)
            words = words | self._mark_words
        return words


def not_followed() -> InternalError:
    """Return the error of a choice whose matcher will tell nothing."""
    return InternalError("the grammar is not followed any more")


def _barred() -> InvalidRequestError:
    return InvalidRequestError("the grammar allows no token of the model here", FIELD)


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


def _words_together(
    executor: LLExecutor, matchers: Sequence[LLMatcher], token_ids: Sequence[int], num_tokens: int
) -> np.ndarray:
    """Have each matcher read a token, and return a bit for each that may follow, uint32 [G, W].

    The words of a matcher in error have no meaning.
    """
    executor.consume_token_par(list(zip(matchers, token_ids, strict=True)))
    words = np.zeros((len(matchers), -(-num_tokens // 32)), np.uint32)
    places = [(matcher, place) for place, matcher in enumerate(matchers)]
    executor.unsafe_compute_mask_ptr(places, words.ctypes.data, words[0].nbytes, len(places))
    return words


class Grammars:
    """Makes the constraints of a router, and has its threads and its compiled grammars.

    One thread compiles, and answers a new choice. Another takes its answer, and what choices read.
    """

    def __init__(self, load: Callable[[], LLTokenizer], vocab_size: int) -> None:
        """``load`` returns the model's vocabulary, when a request first needs it."""
        self.vocab_size = vocab_size
        self._load = load
        self._vocabulary: _Vocabulary | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._noted: Notes = []
        """What choices have read since they were followed; the engine's thread alone has it."""
        self._waiting: SimpleQueue[Notes | None] = SimpleQueue()
        """What the thread that follows takes next; ``None`` ends it."""
        self._is_closed = False
        self._changed = threading.Condition()
        """Notified of answers, and of the end."""
        # To follow a grammar takes little of a stack, unlike to compile it.
        self._executor = LLExecutor(num_threads=1)
        self._compiling = grammar_pool()
        start_grammar_thread(self._follow_all)

    def begin(self, grammar: str, marks: Sequence[int] = ()) -> Constraint:
        """Return the constraint of a new choice, whose grammar is compiled meanwhile.

        ``marks`` are the special tokens that the grammar may ask for.
        """
        constraint = Constraint(self, grammar, marks)
        self._compiling.submit(self._begin, constraint)
        return constraint

    def note(self, constraint: Constraint, token_id: int) -> None:
        """Note that a choice has read a token; :meth:`follow` hands over what was noted."""
        self._noted.append((constraint, token_id))

    def follow(self) -> None:
        """Have a thread read what choices have noted, and answer; waits for nothing."""
        if self._noted:
            self._waiting.put(self._noted)
            self._noted = []

    def wait_for(self, constraint: Constraint, timeout_s: float) -> Answer | None:
        """Return the answer to all tokens of a choice; ``None`` where it takes longer than that."""
        self.follow()
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or constraint.known is not None, timeout_s
            )
            answer = constraint.known
        return not_followed() if answer is None and self._is_closed else answer

    def close(self) -> None:
        """End the threads after their current work; what waits is not answered."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._waiting.put(None)
        self._compiling.shutdown(wait=False, cancel_futures=True)

    def _begin(self, constraint: Constraint) -> None:
        """Compile the grammar of a new choice, and find out which tokens may come first."""
        if not constraint.is_ended:
            self._waiting.put([(constraint, constraint.answer_alone(()))])

    def _follow_all(self) -> None:
        late: dict[Constraint, None] = {}
        """The choices that are followed alone, each in turn after the quick ones that wait."""
        while (noted := self._next_noted(bool(late))) is not None and not self._is_closed:
            try:
                late |= dict.fromkeys(self._answer(noted))
                if late:
                    choice = next(iter(late))
                    del late[choice]
                    if not choice.is_waiting:  # it has ended meanwhile
                        continue
                    self._tell([(choice, choice.answer_alone(choice.take_unread()))])
            except BaseException as error:  # a thread that ended would leave all others waiting
                self._tell([(constraint, error) for constraint, _ in noted])

    def _next_noted(self, is_busy: bool) -> Notes | None:
        """Return all that waits, and wait for it unless busy; ``None`` at the end."""
        noted: Notes | None = [] if is_busy else self._waiting.get()
        while noted is not None and not self._waiting.empty():  # this thread alone takes
            more = self._waiting.get()
            noted = None if more is None else noted + more
        return noted

    def _answer(self, noted: Notes) -> list[Constraint]:
        """Answer the quick choices that were noted, together; returns the others."""
        for constraint, read in noted:
            if isinstance(read, int):
                constraint.unread.append(read)
            else:  # it is compiled
                self._tell([(constraint, read)])
        choices = list(dict.fromkeys(choice for choice, _ in noted if choice.is_waiting))
        together = [
            each
            for each in choices
            if len(each.unread) == 1 and each.matcher is not None and not each.is_slow
        ]
        for at in range(0, len(together), MOST_TOGETHER):
            self._tell(self._answers_together(together[at : at + MOST_TOGETHER]))
        return [each for each in choices if each.unread]

    def _answers_together(self, choices: Sequence[Constraint]) -> list[tuple[Constraint, Answer]]:
        """Return the answers of choices that have one token to read each."""
        begun_at_s = time.monotonic()
        read = [token_id for choice in choices for token_id in choice.take_unread()]
        matchers = [choice.matcher for choice in choices if choice.matcher is not None]
        try:
            words = _words_together(self._executor, matchers, read, self.vocabulary().num_tokens)
        except BaseException:  # which of them panicked is unknown, and what the others have read
            for choice in choices:
                choice.matcher = None
            return [(choice, choice.answer_alone(())) for choice in choices]
        if time.monotonic() - begun_at_s > QUICK_S * len(choices):
            for choice in choices:
                choice.is_slow = True
        # All at once too: the engine computes meanwhile, and wants the interpreter.
        pairs = list(zip(choices, matchers, strict=True))
        may_come = [choice.may_come(matcher.is_accepting()) for choice, matcher in pairs]
        words &= np.concatenate(may_come).reshape(words.shape)
        may_go_on: list[bool] = words.any(axis=1).tolist()  # type: ignore[union-attr,assignment]
        answers: list[tuple[Constraint, Answer]] = []
        for (choice, matcher), row, is_any in zip(pairs, words, may_go_on, strict=True):
            if matcher.is_error():
                choice.matcher = None
                answers.append((choice, choice.answer_alone(())))
            else:
                answers.append((choice, row if is_any else _barred()))
        return answers

    def _tell(self, answers: Iterable[tuple[Constraint, Answer]]) -> None:
        with self._changed:
            for constraint, answer in answers:
                constraint.tell(answer)
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
