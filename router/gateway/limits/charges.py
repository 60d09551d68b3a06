"""What a gateway charges callers: requests, and calls' tokens, of which the rest is given back.

The quotas themselves are :mod:`router.gateway.limits.quotas`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from cluster.reports import KeyUse
from router.gateway.limits.quotas import Account, Refusal
from router.gateway.metrics import Metrics
from router.observability import catalogue
from router.security.keys import Caller

BODY_BYTES_PER_TOKEN = 16
"""A body costs a token for so many bytes, before it is read as JSON, tokenised or compiled. What an
accepted call is charged takes its place, unless it has forms, whose compiling it pays for."""
SILENCE_S = 5.0
"""A gateway that hears of no other for so long has an equal share of each limit."""


@dataclass(slots=True)
class Preparation:
    """What a call costs its caller before it is charged, in tokens; by default its body's."""

    cost_tokens: int


Uses = Mapping[str, Mapping[str, KeyUse]]
"""The uses of each other gateway, by the names of keys."""


class Charges:
    """The accounts of all names that have limits; used only on the gateway's event loop."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] | None = None) -> None:
        """``clock`` is a monotonic clock in seconds, by default the process's."""
        self._metrics = metrics
        self._clock = clock or _monotonic_s
        self._accounts: dict[str, Account] = {}
        self._others: Uses = {}
        self._heard_at_s = self._clock()

    def begin(self, caller: Caller) -> None:
        """Charge a caller for one request, at its head.

        Raises :class:`OverloadedError`, with the time to come back, where the caller's name has had
        its requests, or owes tokens.
        """
        account, now_s = self._account(caller), self._clock()
        if account is not None:
            self._raise_refusal(caller, account.request_refusal(now_s))
            account.take_request(now_s)
        if caller.name:
            self._metrics.count(catalogue.KEY_REQUESTS, caller.name)

    @contextmanager
    def preparing(self, caller: Caller, num_bytes: int) -> Iterator[Preparation]:
        """Charge a caller for what is made of a body of so many bytes before its call is charged.

        The body's tokens stay charged if that fails; else what it has cost takes their place.
        Refuses nothing: a name may owe tokens, and its next requests are refused at their heads.
        """
        preparation = Preparation(1 + num_bytes // BODY_BYTES_PER_TOKEN)
        charged = preparation.cost_tokens
        self._spend(caller, charged)
        yield preparation
        self._spend(caller, preparation.cost_tokens - charged)

    def _spend(self, caller: Caller, num_tokens: int) -> None:
        if (account := self._account(caller)) is not None:
            account.spend(num_tokens, self._clock())

    def charge(self, caller: Caller, num_tokens: int, num_prepared: int = 0) -> Charge:
        """Charge a caller for a request's call that may have so many tokens; see :class:`Charge`.

        A call that is refused is charged the ``num_prepared`` that have been tokenised. Raises
        :class:`TooLargeError` where that is more than a limit of the caller's name ever allows, and
        :class:`OverloadedError`, with the time to come back, where it is now.
        """
        account, now_s = self._account(caller), self._clock()
        if account is not None:
            if account.refusal(num_tokens, now_s) is not None:
                account.spend(num_prepared, now_s)
                self._raise_refusal(caller, account.refusal(num_tokens, now_s))
            account.take(num_tokens, now_s)
        return Charge(caller, num_tokens, account, self._metrics, self._clock)

    def headers(self, caller: Caller | None) -> list[tuple[bytes, bytes]]:
        """Return the headers of a reply to a caller; none without a rate that is limited."""
        account = None if caller is None else self._account(caller)
        return [] if account is None else account.headers(self._clock())

    def uses(self) -> dict[str, KeyUse]:
        """Return what this gateway has used of each name's quotas, for the other gateways."""
        now_s = self._clock()
        return {name: account.use(now_s) for name, account in self._accounts.items()}

    def hear(self, others: Uses) -> None:
        """Take off what all other gateways have used, by their newest reports."""
        now_s, known = self._clock(), self._others.keys()
        if self._is_silent(now_s):
            known = {}.keys()
            for account in self._accounts.values():
                account.forget_others()
        for name, account in self._accounts.items():
            account.take_off(_of_name(others, name), known, now_s)
        self._others, self._heard_at_s = others, now_s

    def _raise_refusal(self, caller: Caller, refusal: Refusal | None) -> None:
        if refusal is not None:
            self._metrics.count(catalogue.KEY_REFUSALS, caller.name, refusal.limit)
            raise refusal.error

    def _is_silent(self, now_s: float) -> bool:
        return now_s - self._heard_at_s > SILENCE_S

    def _account(self, caller: Caller) -> Account | None:
        if not caller.limits.has_quota:
            return None
        now_s = self._clock()
        account = self._accounts.get(caller.name)
        if account is None:
            account = Account(caller.limits, now_s, _of_name(self._others, caller.name))
            self._accounts[caller.name] = account
        share = 1 + len(self._others) if self._is_silent(now_s) else 1
        account.change(caller.limits, share, now_s)
        return account


class Charge:
    """One call's part of a caller's quotas; the end of its ``with`` gives back what is unused."""

    def __init__(
        self,
        caller: Caller,
        num_tokens: int,
        account: Account | None,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.caller = caller
        self._num_tokens = num_tokens
        self._num_used = 0
        self._account = account
        self._metrics = metrics
        self._clock = clock

    def __enter__(self) -> Charge:
        return self

    def __exit__(self, *exception: object) -> None:
        account, self._account = self._account, None
        if account is not None:
            unused = max(0, self._num_tokens - self._num_used)
            account.end(self._num_tokens, unused, self._clock())

    def use(self, kind: Literal["prompt", "generated", "rows"], num_tokens: int) -> None:
        """Count what the call has used of its tokens."""
        self._num_used += num_tokens
        if self.caller.name and num_tokens:
            name = self.caller.name
            self._metrics.count(catalogue.KEY_TOKENS, name, kind, by=num_tokens)


def _monotonic_s() -> float:
    return time.monotonic()  # looked up at each call, since a simulated world replaces it


def _of_name(others: Uses, name: str) -> dict[str, KeyUse]:
    return {gateway: uses[name] for gateway, uses in others.items() if name in uses}
