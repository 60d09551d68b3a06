"""Streams and unary requests that never stop coming, each answer checked token by token.

Used by the chaos test and by ``benchmarks.soak``, so nothing here knows of pytest.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.errors import ExpertMeshError
from router.client import Client, Sampling

END_S = 90.0


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt and the greedy tokens that must come of it.

    ``others`` are of models that are deployed under the same id: an answer is wholly one of them.
    """

    prompt: tuple[int, ...]
    expected: tuple[int, ...]
    others: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """A stream's wait, by the monotonic clock, for a piece of so many tokens."""

    began_s: float
    took_s: float
    tokens: int
    is_first: bool

    @property
    def ended_s(self) -> float:
        """When the piece came."""
        return self.began_s + self.took_s


def _ignore(wait: Wait) -> None:
    """Keep nothing of a stream's waits."""


@dataclass(slots=True)
class Outcome:
    """What came of all requests. ``failures`` counts them by reason; a wrong answer is one."""

    requests: int = 0
    tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class Load:
    """Clients that ask again and again until :meth:`end`; each has a thread of its own."""

    def __init__(
        self,
        client: Client,
        model: str,
        cases: Sequence[Case],
        streams: int,
        unary: int,
        timeout_s: float,
        waited: Callable[[Wait], None] = _ignore,
    ) -> None:
        """Start ``streams`` + ``unary`` clients; each goes round the cases at its own offset.

        ``waited`` hears of every piece of every stream, on many threads.
        """
        self._client, self._model, self._timeout_s = client, model, timeout_s
        self._cases = cases
        self._waited = waited
        self._lock = threading.Lock()
        self._outcome = Outcome()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(place, place < streams), daemon=True)
            for place in range(streams + unary)
        ]
        for thread in self._threads:
            thread.start()

    def outcome(self) -> Outcome:
        """Return what has come so far."""
        with self._lock:
            now = self._outcome
            return Outcome(now.requests, now.tokens, Counter(now.failures))

    def end(self) -> Outcome:
        """Let every request under way come to its end, and return what came of all."""
        self._ended.set()
        for thread in self._threads:
            thread.join(self._timeout_s + END_S)
        hung = sum(thread.is_alive() for thread in self._threads)
        if hung:
            with self._lock:
                self._outcome.failures["no end"] += hung
        return self.outcome()

    def _ask(self, place: int, streamed: bool) -> None:
        while not self._ended.is_set():
            case = self._cases[place % len(self._cases)]
            place += 1
            failure = ""
            try:
                if streamed:
                    self._stream(case)
                else:
                    self._unary(case)
            except ExpertMeshError as error:
                failure = f"{error.code.value}: {error}"
            except Exception as error:  # counted, not lost with its thread
                failure = repr(error)
            self._count(case, failure)

    def _count(self, case: Case, failure: str) -> None:
        with self._lock:
            self._outcome.requests += 1
            if failure:
                self._outcome.failures[failure] += 1
                return
            self._outcome.tokens += len(case.expected)

    def _sampling(self, case: Case) -> Sampling:
        return Sampling(max_tokens=len(case.expected), temperature=0.0, ignore_eos=True)

    def _unary(self, case: Case) -> None:
        [reply] = self._client.generate(
            case.prompt, self._sampling(case), model=self._model, timeout_s=self._timeout_s
        )
        [expected, *_] = answers_of(case, reply.token_ids)
        check_whole(reply.token_ids, expected)

    def _stream(self, case: Case) -> None:
        came, expected = (), case.expected
        last_s = time.monotonic()
        for piece in self._client.stream(
            case.prompt, self._sampling(case), model=self._model, timeout_s=self._timeout_s
        ):
            now_s = time.monotonic()
            [expected, *_] = answers_of(case, (*came, *piece.token_ids))
            self._waited(Wait(last_s, now_s - last_s, len(piece.token_ids), not came))
            came += piece.token_ids
            last_s = now_s
        check_whole(came, expected)


def answers_of(case: Case, came: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the answers that begin with these tokens; raises where there is none."""
    found = [answer for answer in (case.expected, *case.others) if answer[: len(came)] == came]
    if not found:
        check_next((), came, case.expected)
    return found


class WrongTokensError(Exception):
    """An answer that came without an error is not the right one."""


def check_next(came: tuple[int, ...], piece: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise unless a piece goes on where the last one ended: none lost, doubled or other."""
    if piece != expected[len(came) : len(came) + len(piece)]:
        raise WrongTokensError(f"wrong tokens at index {len(came)}")


def check_whole(came: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise unless all tokens came."""
    if len(came) != len(expected):
        raise WrongTokensError(f"{len(came)} tokens instead of {len(expected)}")
