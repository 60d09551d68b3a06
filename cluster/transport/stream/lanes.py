"""Idle connections to actors, over which native code sends and receives by itself."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cluster.transport.base import Call
from cluster.transport.stream.channel import Message
from cluster.transport.stream.link import Link


class IdleConnections:
    """Connections without unanswered calls, whose messages need neither a checksum nor TLS.

    ``fields`` are what ``native/wire/exchange.c`` takes: sockets, buffers, and the numbers of
    the latest answers, which it counts on. ``links`` are by actor and generation, in the order of
    the fields, in which ``index_of`` has their places.
    """

    def __init__(self, links: Sequence[Link[Any]]) -> None:
        """Take those of ``links`` that are fit for it."""
        free = [(link, link.channel.free_buffer) for link in links]
        fit = [(link, buffer) for link, buffer in free if buffer is not None]
        self.links = {(link.actor_id, link.generation): link for link, _ in fit}
        self.index_of = {actor: index for index, actor in enumerate(self.links)}
        self.least_bytes = min([len(buffer) for _, buffer in fit], default=0)
        """The size of the smallest buffer."""
        self.fields = (
            array("i", [link.channel.sock.fileno() for link, _ in fit]),
            tuple(buffer for _, buffer in fit),
            array("q", [0] * (len(fit) + 1)),
        )

    def are_of(self, links: Sequence[Link[Any]]) -> bool:
        """Return whether the lanes are still those of ``links``."""
        own = list(self.links.values())
        return links == own and all(
            not link.unanswered and link.channel.free_buffer is buffer
            for link, buffer in zip(own, self.fields[1], strict=True)
        )

    def note_answers(self) -> int:
        """Tell the links which has answered last; returns the number of the latest answer."""
        *answers, latest = self.fields[2]
        for link, answer in zip(self.links.values(), answers, strict=True):
            link.last_answer = max(link.last_answer, answer)
        return latest

    def count_on(self, latest: int) -> None:
        """Take the links' numbers of answers, and that of the latest."""
        for index, link in enumerate(self.links.values()):
            self.fields[2][index] = link.last_answer
        self.fields[2][-1] = latest


class Pending(Protocol):
    """The calls: :class:`cluster.transport.stream.client.StreamCalls`."""

    @property
    def calls(self) -> Sequence[Call]:
        """In the order in which they were sent, or are to be."""
        ...


class Connections(Protocol):
    """What goes on: :class:`cluster.transport.stream.client.StreamTransport`."""

    @property
    def links(self) -> Mapping[str, Link[Any]]:
        """The connections by actor."""
        ...

    def send_one(self, pending: Any, index: int, call: Call, /) -> None:
        """Send a call."""
        ...

    def expect_answer(self, link: Link[Any], pending: Any, index: int, call_id: int, /) -> None:
        """Note that a connection owes the answer of a call that was sent."""
        ...

    def store(self, link: Link[Any], waiting: Any, messages: Sequence[Message], /) -> None:
        """Store the answers of a link with their calls."""
        ...

    def break_off(self, link: Link[Any], error: OSError, /) -> None:
        """Drop a connection that broke."""
        ...


def take_over(
    transport: Connections,
    lanes: IdleConnections,
    pending: Pending,
    first_id: int,
    left: Sequence[int],
    received: Sequence[int],
) -> None:
    """Go on with calls over ``lanes`` that native code has sent, with ids in their order.

    ``left`` has for each how many bytes are left to be sent, or -1 where nothing could be.
    ``received`` has for each how many bytes lie in its connection's buffer.
    """
    for index, (call, left_bytes) in enumerate(zip(pending.calls, left, strict=True)):
        link, call_id = _link_of(transport, lanes, call), first_id + index
        if link is None or left_bytes < 0:
            transport.send_one(pending, index, call)
            continue
        if left_bytes:
            link.channel.send_rest(call_id, call.frame, left_bytes)
        transport.expect_answer(link, pending, index, call_id)
    for call, num_bytes in zip(pending.calls, received, strict=True):
        link = _link_of(transport, lanes, call)
        if link is None or not num_bytes:
            continue
        try:
            messages = link.channel.take(num_bytes)
        except OSError as error:
            transport.break_off(link, error)
        else:
            transport.store(link, pending, messages)


def _link_of(transport: Connections, lanes: IdleConnections, call: Call) -> Link[Any] | None:
    """Return the connection over which a call was sent, if it is still there."""
    link = lanes.links.get((call.actor_id, call.generation))
    return link if transport.links.get(call.actor_id) is link else None
