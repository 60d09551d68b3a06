"""Routers whose calls a test answers, and a deployment without a controller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any, Generic, TypeVar

import pytest
from opentelemetry.trace import Span
from ray.exceptions import ActorDiedError

from cluster.reports import Samples
from router.gateway.upstream import deployment as deployment_module
from router.gateway.upstream.deployment import Deployment
from router.messages.link import LinkAddress


class Call:
    """A router's call under way: what it was asked, and the future of its reply."""

    def __init__(self, wire: dict[str, Any]) -> None:
        self.wire = wire
        self.reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.was_cancelled = False

    def __await__(self) -> Any:
        return self.reply.__await__()

    def cancel(self) -> None:
        self.was_cancelled = True

    def fail(self, error: BaseException) -> None:
        self.reply.set_exception(error)


AnyCall = TypeVar("AnyCall", bound=Call)


class Routers(Generic[AnyCall]):
    """Stands in for ``RouterCalls`` of ``router_links``; ``way`` is that of calls."""

    def __init__(self, kind: type[AnyCall], way: str = "links") -> None:
        self.kind, self.way = kind, way
        self.calls: list[AnyCall] = []
        self.spans: list[Span] = []
        self.counted: list[str] = []
        self.on_node: Callable[[str], None] = lambda node: None
        self.addresses: list[LinkAddress] = []
        """The routers that there are links to."""

    def has_other(self, asked: set[LinkAddress]) -> bool:
        return not asked.issuperset(self.addresses)

    def call(
        self,
        wire: dict[str, Any],
        span: Span,
        by_serve: bool,
        asked: Collection[LinkAddress] = (),
    ) -> AnyCall:
        if isinstance(asked, set):
            asked.update([address for address in self.addresses if address not in asked][:1])
        self.counted.append("serve" if by_serve else self.way)
        self.spans.append(span)
        self.calls.append(self.kind(wire))
        return self.calls[-1]

    async def until(self, count: int) -> list[AnyCall]:
        """Return all calls once there are so many."""
        while len(self.calls) < count:
            await asyncio.sleep(0)
        return self.calls

    async def called(self, count: int) -> AnyCall:
        """Return the last of so many calls."""
        return (await self.until(count))[count - 1]


class CrashedError(ActorDiedError):
    """Ray's error of a process that ended by itself."""

    def __str__(self) -> str:
        return "The actor is dead because its worker process has died. Connection closed."


def quiet_deployment(routers: Any, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """A deployment of these models without a controller; needs a running loop."""
    monkeypatch.setattr(deployment_module, "PlacementWatcher", lambda *_, **__: None)
    samples = Samples(0.0, {})
    return Deployment(
        None, routers, "strict", lambda: True, lambda: False, lambda: samples, lambda uses: None
    )
