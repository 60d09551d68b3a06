"""Retries: one policy for the gateway's resends, the dispatcher's backoff and the client.

Delays grow exponentially up to a cap, with full jitter (Brooker, "Exponential Backoff and Jitter",
2015). A budget as in gRPC's retry throttling (gRFC A6) keeps the retries of many failed requests
from overloading a server. Nothing here waits or has a clock of its own.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The delays after failures.

    The longest delay after failure ``i`` (from 0) is ``first_delay_s * multiplier ** i``, at most
    ``max_delay_s``. The actual delay is drawn uniformly from 0 to the longest delay. Raises
    :class:`ConfigError` for a delay below 0, a multiplier below 1, or a cap below the first delay.
    """

    first_delay_s: float = 0.1
    multiplier: float = 2.0
    max_delay_s: float = 2.0

    def __post_init__(self) -> None:
        _check("retry.first_delay_s", self.first_delay_s, 0.0)
        _check("retry.multiplier", self.multiplier, 1.0)
        _check("retry.max_delay_s", self.max_delay_s, self.first_delay_s)

    def longest_s(self, failures: int) -> float:
        """Return the longest delay of a failure after ``failures`` earlier failures."""
        # Logarithms, since the power overflows after hours of failures.
        if self.first_delay_s == 0.0:
            return 0.0
        room = math.log(self.max_delay_s / self.first_delay_s)
        if failures * math.log(self.multiplier) >= room:
            return self.max_delay_s
        return min(self.max_delay_s, self.first_delay_s * self.multiplier**failures)

    def delay_s(
        self,
        failures: int,
        draw: float,
        remaining_s: float = math.inf,
        retry_after_s: float | None = None,
    ) -> float | None:
        """Return the delay, or ``None`` where it would reach the deadline.

        ``draw`` is a number in [0, 1). ``retry_after_s`` is the delay that the server asks for. The
        jittered delay is added to it, so that clients do not all come back at once.
        """
        delay_s = draw * self.longest_s(failures) + max(0.0, retry_after_s or 0.0)
        return delay_s if delay_s < remaining_s else None


class RetryBudget:
    """A bound on the retries of all requests of one caller; safe to use from several threads.

    A failure takes one token, and a success gives ``token_ratio`` back. No request is retried
    while half of the tokens or fewer are left.
    """

    def __init__(self, max_tokens: float = 200.0, token_ratio: float = 0.1) -> None:
        """Start full. Raises :class:`ConfigError` for ``max_tokens`` below 1 or a ratio below 0."""
        _check("retry.max_tokens", max_tokens, 1.0)
        _check("retry.token_ratio", token_ratio, 0.0)
        self._max_tokens = max_tokens
        self._token_ratio = token_ratio
        self._tokens = max_tokens
        self._lock = threading.Lock()

    def failed(self) -> bool:
        """Count a failure; returns whether the request may be retried."""
        with self._lock:
            self._tokens = max(0.0, self._tokens - 1.0)
            return self._tokens > self._max_tokens / 2

    def succeeded(self) -> None:
        """Count a success."""
        with self._lock:
            self._tokens = min(self._max_tokens, self._tokens + self._token_ratio)


class Retries:
    """The retries of one request, by its failures so far, a policy and a budget."""

    def __init__(
        self,
        policy: RetryPolicy,
        budget: RetryBudget,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """``draw`` gives numbers in [0, 1)."""
        self.failures = 0
        self._policy = policy
        self._budget = budget
        self._draw = draw

    def next_delay_s(self, remaining_s: float, retry_after_s: float | None = None) -> float | None:
        """Count a failure; returns the delay of the next attempt, ``None`` for no more attempts.

        ``remaining_s`` is the time until the request's deadline.
        """
        may_retry = self._budget.failed()
        delay_s = self._policy.delay_s(self.failures, self._draw(), remaining_s, retry_after_s)
        self.failures += 1
        return delay_s if may_retry else None

    def progressed(self) -> None:
        """Return to short delays, since the current attempt has brought a part of the answer."""
        self.failures = 0

    def succeeded(self) -> None:
        """Count the request's success."""
        self._budget.succeeded()


def _check(field: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"must be a finite number of at least {least:g}; got {value}", field)
