"""The router replica's delivery of a step, without an engine: what travels early to whom."""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.errors import CancelledRequestError
from router.engine import Emission
from router.link import LinkAddress
from router.replica import RouterReplica, _Request
from router.request import TokenEvent

HERE, THERE = LinkAddress("h", 1, ""), LinkAddress("h", 2, "")


class Links:
    """Keeps the frames that were sent."""

    def __init__(self) -> None:
        self.frames: list[tuple[LinkAddress, list[tuple[str, TokenEvent]]]] = []

    def send(self, address: LinkAddress, events: list[tuple[str, TokenEvent]]) -> None:
        self.frames.append((address, events))


def replica(**streamed: tuple[LinkAddress, bool]) -> tuple[Any, Links]:
    """A replica that has only its requests, by id: for which gateway, and whether streamed."""
    made, links = object.__new__(RouterReplica), Links()
    made._links = links  # type: ignore[assignment]
    made._requests = {
        request_id: _Request(address, flag, asyncio.get_running_loop().create_future(), 1)
        for request_id, (address, flag) in streamed.items()
    }
    return made, links


def step(start: int, *request_ids: str, finish_reason: str | None = None) -> list[Emission]:
    event = TokenEvent(0, (start,), finish_reason=finish_reason, start=start)
    return [Emission(request_id, event) for request_id in request_ids]


def test_a_step_is_one_frame_per_gateway_and_of_unary_requests_only_the_first() -> None:
    async def run() -> None:
        made, links = replica(a=(HERE, True), b=(HERE, False), c=(THERE, False))
        made._deliver(step(0, "a", "b", "c"))
        made._deliver(step(1, "a", "b", "c"))
        made._deliver(step(2, "b", "c", finish_reason="length"))
        told = [(address, [request_id for request_id, _ in e]) for address, e in links.frames]
        assert told == [(HERE, ["a", "b"]), (THERE, ["c"]), (HERE, ["a"])]
        assert not made._requests["a"].done.done()
        assert made._requests["b"].done.done()
        assert [e.token_ids for e in made._requests["c"].events] == [(0,), (1,), (2,)]

    asyncio.run(run())


def test_an_error_ends_its_request_and_no_frame_is_sent() -> None:
    async def run() -> None:
        made, links = replica(a=(HERE, True))
        made._deliver([Emission("a", CancelledRequestError("x")), *step(0, "a", "gone")])
        assert isinstance(made._requests["a"].done.exception(), CancelledRequestError)
        assert links.frames == []

    asyncio.run(run())
