"""When to try again: one policy for the gateway's resends, the dispatcher's backoff and the client.

Delays grow exponentially up to a cap, with full jitter (Brooker, "Exponential Backoff and Jitter",
2015); a budget as in gRPC's retry throttling (gRFC A6) keeps those who all failed from failing the
rest. Nothing here waits or has a clock of its own.
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
    """How long to wait after each failure.

    The longest delay after failure ``i`` (from 0) is ``first_delay_s * multiplier ** i``, at most
    ``max_delay_s``; what is waited is evenly drawn from nothing to that. Raises
    :class:`ConfigError` for numbers that are none of a backoff.
    """

    first_delay_s: float = 0.1
    multiplier: float = 2.0
    max_delay_s: float = 2.0

    def __post_init__(self) -> None:
        _check("retry.first_delay_s", self.first_delay_s, 0.0)
        _check("retry.multiplier", self.multiplier, 1.0)
        _check("retry.max_delay_s", self.max_delay_s, self.first_delay_s)

    def longest_s(self, failures: int) -> float:
        """Return the longest delay after so many failures before this one."""
        # As a logarithm, since the power itself overflows where a wait goes on for hours.
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
        """Return how long to wait, or ``None`` where the wait would reach the deadline.

        ``draw`` is a number in [0, 1). What the other side asks for (``retry_after_s``) is waited
        in any case, and the jittered delay after it, so that not all come back at once.
        """
        delay_s = draw * self.longest_s(failures) + max(0.0, retry_after_s or 0.0)
        return delay_s if delay_s < remaining_s else None


class RetryBudget:
    """What all requests of one caller may retry together; safe to use from several threads.

    A failure takes one token, a success gives ``token_ratio`` back, and nobody retries while half
    the tokens or less are left.
    """

    def __init__(self, max_tokens: float = 200.0, token_ratio: float = 0.1) -> None:
        """Start full. Raises :class:`ConfigError` for numbers that are not positive."""
        _check("retry.max_tokens", max_tokens, 1.0)
        _check("retry.token_ratio", token_ratio, 0.0)
        self._max_tokens = max_tokens
        self._token_ratio = token_ratio
        self._tokens = max_tokens
        self._lock = threading.Lock()

    def failed(self) -> bool:
        """Count a failure; returns whether it may be tried again."""
        with self._lock:
            self._tokens = max(0.0, self._tokens - 1.0)
            return self._tokens > self._max_tokens / 2

    def succeeded(self) -> None:
        """Count a success."""
        with self._lock:
            self._tokens = min(self._max_tokens, self._tokens + self._token_ratio)


class Retries:
    """The failures of one request so far, and what follows from the next one."""

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
        """Count a failure; return how long to wait for the next attempt, ``None`` for no more.

        ``remaining_s`` is the time until the request's deadline.
        """
        may_retry = self._budget.failed()
        delay_s = self._policy.delay_s(self.failures, self._draw(), remaining_s, retry_after_s)
        self.failures += 1
        return delay_s if may_retry else None

    def progressed(self) -> None:
        """Begin again with short delays: the attempt that has just failed had brought something."""
        self.failures = 0

    def succeeded(self) -> None:
        """Count the request's success."""
        self._budget.succeeded()


def _check(field: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"given {value}, must be a number of at least {least:g}", field)
