"""What the keys of one name may use together."""

from __future__ import annotations

from pydantic import Field

from router.section import Section

MAX_REQUESTS_PER_S = 1e6
MAX_TOKENS = 10**15
MAX_PRIORITY = 2**63 - 1


class KeyLimits(Section):
    """The limits of a name: a missing one does not bound, and ``priority`` only delays.

    ``requests_per_s`` and ``tokens_per_min`` are rates, of which a second and a minute may be used
    at once. ``concurrent_tokens`` bounds the tokens that requests under way may have. A request has
    at least the number ``priority``; the lower a request's, the earlier it is.
    """

    requests_per_s: float | None = Field(
        default=None, gt=0, le=MAX_REQUESTS_PER_S, allow_inf_nan=False
    )
    tokens_per_min: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    concurrent_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    priority: int | None = Field(default=None, ge=-MAX_PRIORITY - 1, le=MAX_PRIORITY)

    @property
    def has_quota(self) -> bool:
        """Whether anything is bounded, priorities aside."""
        bounds = self.requests_per_s, self.tokens_per_min, self.concurrent_tokens
        return any(bound is not None for bound in bounds)


NO_LIMITS = KeyLimits()
