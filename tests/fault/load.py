"""Streams and unary requests that never stop coming, each answer checked token by token.

Used by the chaos test and by ``benchmarks.soak``, so nothing here knows of pytest.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.errors import ExpertMeshError
from router.client import Client, Sampling

END_S = 90.0


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt and the greedy tokens that must come of it."""

    prompt: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(slots=True)
class Outcome:
    """What came of all requests. ``failures`` counts them by reason; a wrong answer is one."""

    requests: int = 0
    tokens: int = 0
    longest_gap_s: float = 0.0
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
    ) -> None:
        """Start ``streams`` + ``unary`` clients; each goes round the cases at its own offset."""
        self._client, self._model, self._timeout_s = client, model, timeout_s
        self._cases = cases
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
            return Outcome(now.requests, now.tokens, now.longest_gap_s, Counter(now.failures))

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
            gap_s, failure = 0.0, ""
            try:
                gap_s = self._stream(case) if streamed else self._unary(case)
            except ExpertMeshError as error:
                failure = f"{error.code.value}: {error}"
            except Exception as error:  # counted, not lost with its thread
                failure = repr(error)
            self._count(case, gap_s, failure)

    def _count(self, case: Case, gap_s: float, failure: str) -> None:
        with self._lock:
            self._outcome.requests += 1
            if failure:
                self._outcome.failures[failure] += 1
                return
            self._outcome.tokens += len(case.expected)
            self._outcome.longest_gap_s = max(self._outcome.longest_gap_s, gap_s)

    def _sampling(self, case: Case) -> Sampling:
        return Sampling(max_tokens=len(case.expected), temperature=0.0, ignore_eos=True)

    def _unary(self, case: Case) -> float:
        [reply] = self._client.generate(
            case.prompt, self._sampling(case), model=self._model, timeout_s=self._timeout_s
        )
        check_next((), reply.token_ids, case.expected)
        check_whole(reply.token_ids, case.expected)
        return 0.0

    def _stream(self, case: Case) -> float:
        """Read one stream; returns the longest time between two of its pieces."""
        came: tuple[int, ...] = ()
        longest_s, last_s = 0.0, 0.0
        for piece in self._client.stream(
            case.prompt, self._sampling(case), model=self._model, timeout_s=self._timeout_s
        ):
            now_s = time.monotonic()
            longest_s = max(longest_s, now_s - last_s) if last_s else 0.0
            last_s = now_s
            check_next(came, piece.token_ids, case.expected)
            came += piece.token_ids
        check_whole(came, case.expected)
        return longest_s


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
