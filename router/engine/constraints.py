"""Constrained choices: finds the tokens that a grammar allows next while experts compute.

A matcher (llguidance) reads a choice's tokens and returns which may follow. The engine's thread
runs the matchers itself while it waits for a step's experts, a few in each layer: a second thread
would compete with it for the interpreter's lock. Slow jobs have threads of their own: one compiles
grammars, and one runs slow matchers. A matcher shows that it is slow only after it has run, and
llguidance's limits allow seconds. So after each slow one the engine's thread pauses matching, for a
time in proportion. A choice resumes elsewhere from its tokens: a new matcher reads them again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue

from llguidance import LLMatcher, LLTokenizer

from cluster.errors import ExpertMeshError, InternalError, InvalidRequestError
from router.config.grammar_limits import FIELD, grammar_pool, parser_limits, start_grammar_thread
from router.engine.token_masks import Mask, Vocabulary, bits_of, vocabulary_of, with_bits

MAX_KEPT = 32
"""How many compiled grammars a router keeps."""
QUICK_S = 0.0002
"""The longest that a quick matcher takes to read a token or to find its mask."""
GRAMMAR_PAUSES = 100
"""How long the other thread runs a slow grammar, as a multiple of its matcher's delay."""
ALL_PAUSE = 10
"""How long all grammars stay off the engine thread, as a multiple of a slow matcher's delay."""
AT_ONCE_S = 0.0002
"""How long the engine's thread runs matchers in a layer; a single matcher may take longer."""

Answer = Mask | BaseException
"""The tokens that may follow, or why none is known."""

logger = logging.getLogger("expertmesh.engine")


@dataclass(slots=True, eq=False)
class _Compiled:
    """A compiled grammar; each choice has a copy of its matcher.

    ``lock`` is held while one of its matchers computes. All share a lexer, and llguidance waits for
    the lexer while it holds the interpreter's lock.
    """

    matcher: LLMatcher
    slow_until_s: float = 0.0
    """Until when (monotonic) its matchers are slow."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, taken_s: float, num_tokens: int) -> float:
        """Note how long a matcher took to read ``num_tokens`` tokens and to find its mask.

        Returns that time if the matcher is slow, otherwise 0.
        """
        if taken_s <= QUICK_S * (num_tokens + 1):
            return 0.0
        self.slow_until_s = time.monotonic() + GRAMMAR_PAUSES * taken_s
        return taken_s


class Constraint:
    """One choice's matcher, and the tokens that it allows next.

    The engine's thread reads tokens and asks for masks. While ``is_handed_over``, the matcher
    belongs to the thread that compiles or runs it; otherwise it belongs to the engine's.
    """

    def __init__(self, grammars: Grammars, grammar: str, marks: Sequence[int] = ()) -> None:
        """``marks`` are the special tokens that the grammar may allow."""
        self.vocab_size = grammars.vocab_size
        self.token_ids: list[int] = []
        """The choice's tokens so far, to which the engine's thread appends."""
        self.num_answered = -1
        """How many of them ``answer`` covers; set after ``answer``."""
        self.answer: Answer | None = None
        """The newest answer; an error also covers all later tokens."""
        self.is_ended = False
        self.is_handed_over = True
        self._grammars = grammars
        self._grammar = grammar
        self._marks = [token_id for token_id in marks if token_id < grammars.vocab_size]
        self._compiled: _Compiled | None = None
        self._matcher: LLMatcher | None = None
        self._may_come: tuple[bytes, bytes] = b"", b""

    def read(self, token_id: int) -> None:
        """Read the choice's next token; :meth:`Grammars.follow` finds which may follow it."""
        self.token_ids.append(token_id)
        if not self.is_handed_over and len(self.token_ids) == self.num_answered + 1:
            self._grammars.note(self)

    def close(self) -> None:
        """Stop matching; the choice has ended."""
        self.is_ended, self.answer = True, not_followed()

    @property
    def is_slow(self) -> bool:
        """Whether the grammar's matchers were slow recently, or it is not compiled."""
        return self._compiled is None or time.monotonic() < self._compiled.slow_until_s

    @property
    def known(self) -> Answer | None:
        """The answer for all tokens so far, or why there is none; ``None`` until it is known."""
        if self.is_handed_over:
            return None
        if self.num_answered == len(self.token_ids) or isinstance(self.answer, BaseException):
            return self.answer
        return None

    def allowed(self, timeout_s: float) -> Mask | None:
        """Return the tokens that may come next; ``None`` if they are not known in time.

        Raises :class:`InvalidRequestError` if the tokens so far do not match the grammar, or if
        matching exceeds its limits.
        """
        answer = self.known
        if answer is None:
            answer = self._grammars.wait_for(self, timeout_s)
        if answer is None or isinstance(answer, Mask):
            return answer
        if isinstance(answer, ExpertMeshError):
            raise answer
        # This also catches a Rust panic, which is no Exception and would end the engine's thread.
        logger.error("a grammar's matcher failed", exc_info=answer)
        raise InternalError(f"the grammar's matcher failed ({type(answer).__name__})")

    def begin_at_once(self, compiled: _Compiled) -> bool:
        """Find the first tokens; return whether this thread could do so."""
        self._take_copy(compiled)
        self.is_handed_over = not self.answer_at_once()
        return not self.is_handed_over

    def answer_at_once(self) -> bool:
        """Answer the one pending token; return whether this thread could do so."""
        compiled, matcher = self._compiled, self._matcher
        if compiled is None or matcher is None or self.is_slow or self._grammars.is_pausing():
            return False
        if len(self.token_ids) != self.num_answered + 1 or not compiled.lock.acquire(False):
            return False
        try:
            mask, slow_s = self._mask_after(compiled, matcher, self.token_ids[-1:])
        except BaseException:  # it panicked, and will again
            mask, slow_s = None, 0.0
        finally:
            compiled.lock.release()
        if slow_s:
            self._grammars.pause(ALL_PAUSE * slow_s)
        if mask is None:
            self._matcher = None
            return False
        self._tell(len(self.token_ids), mask)
        return True

    def answer_all(self) -> None:
        """Answer all pending tokens."""
        num_tokens = len(self.token_ids)
        try:
            answer: Answer = self._next(self.token_ids[:num_tokens])
        except BaseException as error:
            answer = error
        self._tell(num_tokens, answer)

    def _tell(self, num_tokens: int, answer: Answer) -> None:
        if not self.is_ended:
            self.answer = answer
            self.num_answered = num_tokens

    def _next(self, token_ids: Sequence[int]) -> Mask:
        compiled, matcher = self._compiled, self._matcher
        unread = token_ids[max(0, self.num_answered) :]
        if compiled is None or matcher is None:
            compiled, matcher = self._take_copy(self._grammars.compiled(self._grammar))
            unread = token_ids
        with compiled.lock:
            mask, _ = self._mask_after(compiled, matcher, unread)
        if mask is None:
            # A grammar's matchers share its lexer, which others may have filled to its limit.
            again = self._grammars.compiled(self._grammar, is_compiled_again=True)
            compiled, matcher = self._take_copy(again)
            with compiled.lock:
                mask, _ = self._mask_after(compiled, matcher, token_ids)
        if mask is None:
            reason = matcher.get_error().partition("\n")[0][:200]
            told = f"the answer can no longer match its grammar: {reason}"
            raise InvalidRequestError(told, FIELD)
        return mask

    def _take_copy(self, compiled: _Compiled) -> tuple[_Compiled, LLMatcher]:
        vocabulary = self._grammars.vocabulary()
        self._may_come = vocabulary.may_come
        if self._marks:
            marks, (before, at_end) = bits_of(self._marks, vocabulary.num_words), self._may_come
            self._may_come = with_bits(before, marks), with_bits(at_end, marks)
        self._compiled, self._matcher = compiled, compiled.matcher.deep_copy()
        return compiled, self._matcher

    def _mask_after(
        self, compiled: _Compiled, matcher: LLMatcher, token_ids: Sequence[int]
    ) -> tuple[Mask | None, float]:
        """Read tokens; return the mask of tokens that may follow, and a slow matcher's time.

        The mask is ``None`` for a matcher in error.
        """
        begun_at_s = time.thread_time()
        for token_id in token_ids:
            matcher.consume_token(token_id)
        by_grammar, is_accepting = matcher.compute_bitmask(), matcher.is_accepting()
        slow_s = compiled.note(time.thread_time() - begun_at_s, len(token_ids))
        is_error = matcher.is_error()
        return None if is_error else Mask(by_grammar, self._may_come[is_accepting]), slow_s


def not_followed() -> InternalError:
    """Return the error of a choice whose matcher has stopped."""
    return InternalError("the grammar's matcher has stopped")


class Grammars:
    """Makes a router's constraints; owns the matching threads and the compiled grammars."""

    def __init__(self, load: Callable[[], LLTokenizer], vocab_size: int) -> None:
        """``load`` loads the model's vocabulary when a request first needs it."""
        self.vocab_size = vocab_size
        self._load = load
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[str, _Compiled] = OrderedDict()
        self._noted: deque[Constraint] = deque()
        """The choices that have read a token and are matched at once."""
        self._handed_over: SimpleQueue[Constraint | None] = SimpleQueue()
        """The choices that the matching thread takes; ``None`` ends it."""
        self._pauses_until_s = 0.0
        """Until when (monotonic) the engine's thread runs no matcher."""
        self._is_closed = False
        self._changed = threading.Condition()
        """Notified when a choice is handed back, and on close."""
        self._compiling = grammar_pool()
        start_grammar_thread(self._follow_all)

    def begin(self, grammar: str, marks: Sequence[int] = ()) -> Constraint:
        """Return the constraint of a new choice; a new grammar is compiled in the background.

        ``marks`` are the special tokens that the grammar may allow.
        """
        constraint = Constraint(self, grammar, marks)
        kept = self._kept.get(grammar)
        if kept is not None:
            with suppress(KeyError):  # another thread is making it the newest
                self._kept.move_to_end(grammar)
        if kept is None or not constraint.begin_at_once(kept):
            self._compiling.submit(self._answer, constraint)
        return constraint

    def note(self, constraint: Constraint) -> None:
        """Note that a choice has read a token; :meth:`follow` finds which may follow it."""
        if constraint.is_slow:
            self._hand_over(constraint)
        else:
            self._noted.append(constraint)

    def follow(self) -> None:
        """Answer choices on the engine's thread for a short time; the rest wait."""
        until_s = time.monotonic() + AT_ONCE_S
        while self._noted and time.monotonic() < until_s:
            choice = self._noted.popleft()
            if not (choice.is_ended or choice.answer_at_once()):
                self._hand_over(choice)

    def pause(self, for_s: float) -> None:
        """Keep the engine's thread from running matchers for ``for_s``."""
        self._pauses_until_s = time.monotonic() + for_s

    def is_pausing(self) -> bool:
        """Return whether the engine's thread runs no matchers now."""
        return time.monotonic() < self._pauses_until_s

    def wait_for(self, constraint: Constraint, timeout_s: float) -> Answer | None:
        """Return the answer for all tokens of a choice; ``None`` if it times out."""
        until_s = time.monotonic() + timeout_s
        with suppress(ValueError):  # it may be absent
            self._noted.remove(constraint)
            constraint.answer_at_once()
        while True:
            if not constraint.is_handed_over:
                if (answer := constraint.known) is not None:
                    return answer
                self._hand_over(constraint)
            with self._changed:
                is_back = self._changed.wait_for(
                    lambda: self._is_closed or not constraint.is_handed_over,
                    max(0.0, until_s - time.monotonic()),
                )
            if self._is_closed:
                return not_followed()
            if not is_back:
                return None

    def close(self) -> None:
        """End the threads after their current job; pending choices get no answer."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._handed_over.put(None)
        self._compiling.shutdown(wait=False, cancel_futures=True)

    def _hand_over(self, constraint: Constraint) -> None:
        constraint.is_handed_over = True
        self._handed_over.put(constraint)

    def _answer(self, constraint: Constraint) -> None:
        """Answer a handed-over choice, and hand it back."""
        if not constraint.is_ended:
            constraint.answer_all()
        with self._changed:
            constraint.is_handed_over = False
            self._changed.notify_all()

    def _follow_all(self) -> None:
        """Answer all waiting quick choices, then one slow one, in turn."""
        waiting: list[Constraint] = []
        while (more := self._next_handed_over(is_busy=bool(waiting))) is not None:
            quick: list[Constraint] = []
            slow: list[Constraint] = []
            for choice in waiting + more:  # is_slow is read once, as other threads change it
                (slow if choice.is_slow else quick).append(choice)
            for choice in quick + slow[:1]:
                if self._is_closed:
                    return
                self._answer(choice)
            waiting = slow[1:]

    def _next_handed_over(self, is_busy: bool) -> list[Constraint] | None:
        """Return all waiting choices; block for one unless busy. ``None`` at the end."""
        more: list[Constraint] = []
        while not (is_busy or more) or not self._handed_over.empty():  # only this thread takes
            choice = self._handed_over.get()
            if choice is None:
                return None
            more.append(choice)
        return more

    def vocabulary(self) -> Vocabulary:
        """Return the model's vocabulary, loaded when it is first needed."""
        if self._vocabulary is None:
            self._vocabulary = vocabulary_of(self._load(), self.vocab_size)
        return self._vocabulary

    def compiled(self, grammar: str, is_compiled_again: bool = False) -> _Compiled:
        """Return a compiled grammar; a recompiled one shares nothing with the old one."""
        compiled = self._kept.pop(grammar, None)
        if compiled is None or is_compiled_again:
            tokens = self.vocabulary().tokens
            matcher = LLMatcher(tokens, grammar, log_level=0, limits=parser_limits())
            compiled = _Compiled(matcher)
        self._kept[grammar] = compiled
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return compiled
