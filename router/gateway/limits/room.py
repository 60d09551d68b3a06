"""The bounds of a gateway: requests and bytes at one time, and the time that a reader may take."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

from cluster.errors import OverloadedError, SlowBodyError, SlowReaderError, TooLargeError
from router.config.deployment import BODIES_AT_ONCE, GatewayConfig

RETRY_AFTER_S = 1.0
BODY_TIMEOUT_S, BODY_BYTES_PER_S = 10.0, 64 << 10
"""How long a body or a message may take to come: this, and so much more as it would take at this
rate."""
GRACE_S = 0.5
"""How long past a request's deadline its router is waited for."""


@asynccontextmanager
async def arrival_timeout(what: str, num_bytes: int) -> AsyncIterator[None]:
    """Raise :class:`SlowBodyError` where a body of so many bytes does not come in time."""
    limit_s = BODY_TIMEOUT_S + num_bytes / BODY_BYTES_PER_S
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError:
        raise SlowBodyError(
            f"the {what} did not arrive within {limit_s:.0f} s: {BODY_TIMEOUT_S:g} s, plus one for "
            f"each {BODY_BYTES_PER_S // 1024} KiB"
        ) from None


class SlowReaderWatch:
    """Ends the work for a client that does not read its stream.

    Each piece of the stream is yielded inside ``with watch:``. While the client does not read, the
    server's write does not end and the generator stays in the ``with``. So the time there is the
    time unread, over HTTP and gRPC alike, with any proxy between client and gateway.

    When a piece takes longer than ``timeout_s``, ``on_cut()`` is called and ``end_work()`` awaited
    on a task of its own, once. If the client reads on after all, the ``with`` raises
    :class:`SlowReaderError`. To be used inside ``async with``, which waits for ``end_work``.
    """

    def __init__(
        self,
        timeout_s: float,
        end_work: Callable[[], Coroutine[Any, Any, None]],
        on_cut: Callable[[], None],
    ) -> None:
        self._timeout_s = timeout_s
        self._end_work, self._on_cut = end_work, on_cut
        self._loop = asyncio.get_running_loop()
        self._handed_at_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    async def __aenter__(self) -> SlowReaderWatch:
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._ending is not None:
            await self._ending

    def __enter__(self) -> None:
        self._handed_at_s = self._loop.time()
        # One timer serves many pieces; a timer for each piece costs more.
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._look)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._handed_at_s = None
        if self._ending is not None and error is None:
            raise SlowReaderError(
                f"the client read nothing for {self._timeout_s:g} s, so the stream was closed"
            )

    def _look(self) -> None:
        self._timer = None
        if self._handed_at_s is None:
            return
        due_at_s = self._handed_at_s + self._timeout_s
        if self._loop.time() < due_at_s:
            self._timer = self._loop.call_at(due_at_s, self._look)
            return
        self._on_cut()
        self._ending = self._loop.create_task(self._end_work())


class Budget:
    """An amount that requests share, counted by names; used only on the gateway's event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.taken = 0
        self.by_name: Counter[str] = Counter()

    def share_of(self, name: str) -> Share:
        """Return an empty share of a request; the end of its ``with`` gives back all it took."""
        return Share(self, name)

    def refusal(self, name: str, amount: int) -> str:
        """Return why a name cannot take so much more, empty where it can."""
        raise NotImplementedError

    def count(self, name: str, amount: int) -> None:
        """Count an amount as taken, or a negative one as given back."""
        self.taken += amount
        self.by_name[name] += amount
        if not self.by_name[name]:
            del self.by_name[name]


class Places(Budget):
    """The places of requests, by models: half of an even share is kept for each model.

    So a model whose requests end late, or come in crowds, leaves places for the others.
    """

    def __init__(self, limit: int, models: Collection[str]) -> None:
        """``models`` are the ids of the served models; a single one may take all places."""
        super().__init__(limit)
        self._models = models
        self._kept = limit // (2 * max(1, len(models)))

    def refusal(self, name: str, amount: int) -> str:
        """See :meth:`Budget.refusal`."""
        others = (model for model in self._models if model != name)
        kept = sum(max(0, self._kept - self.by_name[other]) for other in others)
        if self.taken + amount <= self._limit - kept:
            return ""
        told = f", {kept} reserved for other models" if kept else ""
        return f"at most {self._limit} concurrent requests{told}"


class Bodies(Budget):
    """The bytes of requests' bodies, by names of keys, empty where there are no keys.

    One key's may be as many as it leaves free for the others.
    """

    def refusal(self, name: str, amount: int) -> str:
        """See :meth:`Budget.refusal`."""
        left = self._limit - self.taken - amount
        if name and self.by_name[name] + amount > left:
            return "this key's request bodies would take more bytes than they leave for others"
        return f"at most {self._limit} bytes of request bodies at one time" if left < 0 else ""


class Share:
    """One request's part of a :class:`Budget`."""

    def __init__(self, budget: Budget, name: str) -> None:
        self._budget, self._name = budget, name
        self._amount = 0

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *exception: object) -> None:
        self.give_back()

    def take(self, amount: int) -> None:
        """Take more; raises :class:`OverloadedError` with a hint when the budget is used up."""
        if reason := self._budget.refusal(self._name, amount):
            raise OverloadedError(f"the gateway is full: {reason}", retry_after_s=RETRY_AFTER_S)
        self._budget.count(self._name, amount)
        self._amount += amount

    def take_message(self, data: bytes, most: int) -> None:
        """Take a gRPC message's bytes; raises :class:`TooLargeError` for more than ``most``."""
        if len(data) > most:
            raise TooLargeError(f"the message is over the limit of {most} bytes")
        self.take(len(data))

    def give_back(self) -> None:
        """Give back everything that was taken; a second call does nothing."""
        self._budget.count(self._name, -self._amount)
        self._amount = 0


class Room:
    """The room of a gateway, which its services share: ``places`` of requests, ``bodies``."""

    def __init__(self, limits: GatewayConfig, models: Collection[str]) -> None:
        self._max_requests = limits.max_ongoing_requests
        self.places = Places(limits.max_ongoing_requests, models)
        self.bodies = Bodies(BODIES_AT_ONCE * limits.max_body_bytes)

    def use(self) -> float:
        """Return the requests under way as a share of the limit."""
        return self.places.taken / self._max_requests
