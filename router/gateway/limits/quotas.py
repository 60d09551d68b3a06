"""The quotas of keys: what each name may use, what it has used, and when it may come back.

A rate is a bucket that fills steadily and that requests empty: of requests it holds a second's
worth, of tokens a minute's. A request is charged at its head, before its body is read, and refused
there while its name owes tokens. Its body costs tokens before anything is made of it. Its call
is charged the most tokens that it can have when it is accepted, and gets back what it has not used
at its end. Nothing waits here.

All gateways of a deployment share a name's quotas. Each has the whole bucket, and takes off what
the others report that they have used (:class:`cluster.reports.KeyUse`). While no report comes, each
has an equal share of every limit. :mod:`router.gateway.limits.charges` has the accounts of all
names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from cluster.errors import ExpertMeshError, OverloadedError, TooLargeError
from cluster.reports import KeyUse
from router.security.limits import KeyLimits

HELD_RETRY_S = 1.0
"""When to come back for tokens under way: nobody knows when a request ends."""
_ROUNDING = 1e-9
"""Part of a bucket that rounding may take: whoever comes back at the announced time is let in."""
_NOTHING = KeyUse(0, 0, 0, math.inf, math.inf)
Kind = Literal["requests", "tokens"]


RATE_HEADERS = tuple(
    f"x-ratelimit-{what}-{kind}"
    for kind in ("requests", "tokens")
    for what in ("limit", "remaining", "reset")
)
"""OpenAI's headers about a rate: the limit, what is left of it, the time until all of it is."""
_HEADER_NAMES = {
    "requests": [name.encode() for name in RATE_HEADERS[:3]],
    "tokens": [name.encode() for name in RATE_HEADERS[3:]],
}


class Bucket:
    """An amount that comes back at a steady rate until it is whole; below 0 it is owed."""

    def __init__(self, rate_per_s: float, capacity: float, now_s: float) -> None:
        """Start whole at ``now_s``."""
        self.rate_per_s, self.capacity = rate_per_s, capacity
        self._level, self._at_s = capacity, now_s

    def level(self, now_s: float) -> float:
        """Return the amount that may be taken."""
        passed_s = max(0.0, now_s - self._at_s)
        self._level = min(self.capacity, self._level + passed_s * self.rate_per_s)
        self._at_s = max(now_s, self._at_s)
        return self._level

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return the time until ``amount`` may be taken if nothing else is taken; 0 is now."""
        lack = amount - self.level(now_s)
        return 0.0 if lack <= _ROUNDING * self.capacity else lack / self.rate_per_s

    def take(self, amount: float, now_s: float) -> None:
        """Take an amount, whether or not it is there; a negative one is given back."""
        self._level = min(self.capacity, self.level(now_s) - amount)

    def lower(self, level: float, now_s: float) -> None:
        """Have no more than ``level``."""
        self._level = min(self.level(now_s), level)

    def resize(self, rate_per_s: float, capacity: float, now_s: float) -> None:
        """Go on at another rate with another capacity; a smaller bucket is as full as before."""
        self._level = self.level(now_s) * min(1.0, capacity / self.capacity)
        self.rate_per_s, self.capacity = rate_per_s, capacity


class Refusal(NamedTuple):
    """Why a call is refused: the limit, as the file of keys names it, and the error."""

    limit: str
    error: ExpertMeshError


class Account:
    """What one name may use at this gateway, and what it has used; pure but for ``now_s``.

    ``used_requests`` and ``used_tokens`` are sums over the gateway's life, less what was given
    back. ``held_tokens`` are those of calls under way.
    """

    def __init__(self, limits: KeyLimits, now_s: float, others: Mapping[str, KeyUse]) -> None:
        """Start where the ``others``, the newest uses of other gateways, are."""
        self.limits = limits
        self.used_requests = self.used_tokens = self.held_tokens = 0
        self._share = 1
        self._buckets = _buckets(limits, 1, now_s)
        self._others: Mapping[str, KeyUse] = {}
        self.take_off(others, (), now_s)

    def request_refusal(self, now_s: float) -> Refusal | None:
        """Return why one more request is refused now, if it is: also while tokens are owed."""
        waits = []
        if (bucket := self._buckets.get("requests")) is not None:
            waits.append((bucket.wait_s(1, now_s), "requests_per_s"))
        if (bucket := self._buckets.get("tokens")) is not None and bucket.wait_s(0, now_s):
            waits.append((bucket.wait_s(1, now_s), "tokens_per_min"))
        return self._to_come_back(waits)

    def take_request(self, now_s: float) -> None:
        """Take one request."""
        self._take("requests", 1, now_s)
        self.used_requests += 1

    def refusal(self, num_tokens: int, now_s: float) -> Refusal | None:
        """Return why a call of so many tokens is refused now, if it is."""
        return self._too_large(num_tokens) or self._too_early(num_tokens, now_s)

    def take(self, num_tokens: int, now_s: float) -> None:
        """Take a call's tokens, which are then under way."""
        self._take("tokens", num_tokens, now_s)
        self.used_tokens += num_tokens
        self.held_tokens += num_tokens

    def spend(self, num_tokens: int, now_s: float) -> None:
        """Take tokens, which are then owed if they are not there; fewer than 0 are given back."""
        self._take("tokens", num_tokens, now_s)
        self.used_tokens += num_tokens

    def end(self, num_tokens: int, num_unused: int, now_s: float) -> None:
        """End a call that took ``num_tokens``; ``num_unused`` of them are given back."""
        self._take("tokens", -num_unused, now_s)
        self.used_tokens -= num_unused
        self.held_tokens -= num_tokens

    def take_off(self, others: Mapping[str, KeyUse], known: Collection[str], now_s: float) -> None:
        """Take off what other gateways have used since the last call, by their newest uses.

        ``known`` are the gateways of the last report; one of them that had nothing to report had
        used nothing. A gateway that is not among them has the same buckets as this one, so that no
        more is left here than there.
        """
        for gateway, use in others.items():
            before = self._others.get(gateway)
            for kind, bucket in self._buckets.items():
                if before is None and gateway not in known:
                    bucket.lower(getattr(use, f"{kind}_left"), now_s)
                else:
                    bucket.take(getattr(use, kind) - getattr(before or _NOTHING, kind), now_s)
        self._others = dict(others)

    def _take(self, kind: Kind, amount: float, now_s: float) -> None:
        if kind in self._buckets:
            self._buckets[kind].take(amount, now_s)

    def forget_others(self) -> None:
        """Take the next uses of all other gateways for the first ones."""
        self._others = {}

    def change(self, limits: KeyLimits, share: int, now_s: float) -> None:
        """Go on with other limits, of which this gateway has one of ``share`` equal parts."""
        if share == self._share and (limits is self.limits or limits == self.limits):
            return
        wanted = _buckets(limits, share, now_s)
        for kind in wanted.keys() & self._buckets.keys():
            self._buckets[kind].resize(wanted[kind].rate_per_s, wanted[kind].capacity, now_s)
            wanted[kind] = self._buckets[kind]
        self.limits, self._share, self._buckets = limits, share, wanted

    def use(self, now_s: float) -> KeyUse:
        """Return what other gateways need to know."""
        left = {kind: bucket.level(now_s) for kind, bucket in self._buckets.items()}
        return KeyUse(
            self.used_requests,
            self.used_tokens,
            self.held_tokens,
            left.get("requests", math.inf),
            left.get("tokens", math.inf),
        )

    def headers(self, now_s: float) -> list[tuple[bytes, bytes]]:
        """Return :data:`RATE_HEADERS` about the rates that are limited."""
        headers: list[tuple[bytes, bytes]] = []
        for kind, bucket in self._buckets.items():
            level, whole = bucket.level(now_s), bucket.capacity
            lack = whole - level
            reset_s = 0.0 if lack <= _ROUNDING * whole else lack / bucket.rate_per_s
            left = max(0, math.floor(level + _ROUNDING * whole))
            values = (b"%d" % math.floor(whole), b"%d" % left, duration_text(reset_s).encode())
            headers += zip(_HEADER_NAMES[kind], values, strict=True)
        return headers

    def _too_large(self, num_tokens: int) -> Refusal | None:
        for limit in ("tokens_per_min", "concurrent_tokens"):
            bound = getattr(self.limits, limit)
            if bound is not None and num_tokens > bound:
                message = (
                    f"prompts and max_tokens, or rows, add up to {num_tokens:,} tokens; this "
                    f"key's {limit} is {bound:,}"
                )
                return Refusal(limit, TooLargeError(message))
        return None

    def _too_early(self, num_tokens: int, now_s: float) -> Refusal | None:
        waits = []
        if (bucket := self._buckets.get("tokens")) is not None:
            # A call that is larger than a share needs all of it, and owes the rest.
            amount = min(num_tokens, bucket.capacity)
            waits.append((bucket.wait_s(amount, now_s), "tokens_per_min"))
        if not self._has_room(num_tokens):
            waits.append((HELD_RETRY_S, "concurrent_tokens"))
        return self._to_come_back(waits)

    def _to_come_back(self, waits: Sequence[tuple[float, str]]) -> Refusal | None:
        """Return the refusal for the longest of these times, each with its limit."""
        wait_s, limit = max(waits, default=(0.0, ""))
        if not wait_s:
            return None
        bound = getattr(self.limits, limit)
        message = f"too little is left of this key's {limit}, {bound:,}; retry later"
        return Refusal(limit, OverloadedError(message, "", wait_s))

    def _has_room(self, num_tokens: int) -> bool:
        bound = self.limits.concurrent_tokens
        if bound is None:
            return True
        held = self.held_tokens
        if self._share == 1:
            held += sum(use.held_tokens for use in self._others.values())
        return held + num_tokens <= max(num_tokens, bound // self._share)


def _buckets(limits: KeyLimits, share: int, now_s: float) -> dict[Kind, Bucket]:
    """Return the buckets of the rates that are limited, of one of ``share`` equal parts."""
    found: dict[Kind, Bucket] = {}
    if limits.requests_per_s is not None:
        rate_per_s = limits.requests_per_s / share
        found["requests"] = Bucket(rate_per_s, max(1.0, rate_per_s), now_s)
    if limits.tokens_per_min is not None:
        capacity = limits.tokens_per_min / share
        found["tokens"] = Bucket(capacity / 60.0, capacity, now_s)
    return found


def duration_text(seconds: float) -> str:
    """Return a time as OpenAI writes it: ``20ms``, ``1.5s``, ``6m0s``, ``1h0m0s``."""
    milliseconds = math.ceil(seconds * 1000 - _ROUNDING)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    text = f"{milliseconds / 1000:g}s"
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
