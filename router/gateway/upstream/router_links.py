"""How a gateway calls the routers of a model: over links of its own, or by Serve.

A call of Serve's takes its process more than a millisecond. A link's takes a tenth of that.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from collections.abc import Callable
from typing import Any

from opentelemetry.trace import Span
from ray.serve.handle import DeploymentHandle

from router.gateway.upstream.affinity import SentPrefixes, choose, no_keys
from router.messages.call_link import CallLink, LinkCall, Wire
from router.messages.link import LinkAddress
from router.observability.tracing import as_current

REFRESH_S = 1.0
"""While requests come, and for a while after, the routers are asked for so often."""
KEPT_S = 60.0
"""So long after the latest request the routers are still asked for. Requests that come together
after a pause thus find the links known; without that, Serve would carry all of them."""
ASK_TIMEOUT_S = 5.0
STALE_S = 1.5
"""So long after all routers have told where they listen, a request goes over a link. Serve may be
ending the routers of older links."""
PATIENCE = 10
"""After so many failures in a row a warning says so. Routers that start cannot be asked yet."""

KeysOf = Callable[[Wire], list[bytes]]
"""Returns the keys of the blocks of a request's prompt, by which a router is chosen."""

logger = logging.getLogger("expertmesh.link")


def _load_of(link: CallLink) -> tuple[bool, int, float]:
    return link.is_silent(), link.num_unanswered, link.called_at_s


class RouterCalls:
    """Calls of the routers of one model: over links, and by Serve where there is none.

    They are used on one event loop.

    Serve says which replicas run, and each of them its node and where it listens. They are asked in
    the background, while requests come and for :data:`KEPT_S` after. Where a replica cannot be
    reached, its requests go by Serve's calls. There is no link to a router that has the model of an
    earlier deployment: Serve may have stopped sending it requests since it was asked.
    """

    def __init__(
        self,
        routers: DeploymentHandle,
        model: str,
        node: str,
        method: str,
        tls: ssl.SSLContext | None,
        on_call: Callable[[str], None],
        keys_of: KeysOf = no_keys,
    ) -> None:
        """``routers`` is the handle of the deployment of the model whose key is ``model``.

        ``node`` is the id of this gateway's node. ``method`` is called; ``on_call`` is told each
        call's transport, ``link`` or ``serve``. By ``keys_of`` a request goes to a router that has
        the beginning of its prompt.
        """
        self._keys_of = keys_of
        self._routers = routers
        self._model = model
        self._node = node
        self._method = getattr(routers, method)
        self._tls = tls
        self._on_call = on_call
        self.on_node: Callable[[str], None] = lambda node: None
        """Called with the node of each router that answers, before there is a link to it."""
        self._links: dict[LinkAddress, CallLink] = {}
        self._sent: dict[LinkAddress, SentPrefixes] = {}
        self._unreached: dict[LinkAddress, None] = {}
        """The routers of which is logged that there is no link."""
        self._wanted_at_s = -math.inf
        """When the latest request came."""
        self._asked_at_s = -math.inf
        self._known_at_s = -math.inf
        self._asking: asyncio.Task[None] | None = None
        self._num_failures = 0
        """How often in a row the routers could not be asked."""

    def call(
        self,
        wire: Wire,
        span: Span,
        by_serve: bool = False,
        asked: set[LinkAddress] | None = None,
    ) -> Any:
        """Send a request to a router; returns its call, to be awaited or cancelled.

        It goes over no link to a router in ``asked``; the router of its own link is added to them.
        Serve brings the trace of a sampled request to the router, so Serve carries it. Serve is to
        carry a request again whose link broke: it tells a dead router from a lost connection.
        """
        self._wanted_at_s = time.monotonic()
        self._ask()  # also for a call of Serve's: the gateway needs to know of the routers' nodes
        call = None
        if not by_serve and not span.is_recording():
            call = self._call_over_link(wire, set() if asked is None else asked)
        self._on_call("serve" if call is None else "link")
        if call is not None:
            return call
        with as_current(span):  # Serve sends its context with the call
            return self._method.remote(wire)

    def has_other(self, asked: set[LinkAddress]) -> bool:
        """Return whether there is a link to a router that is not in ``asked``."""
        return any(link.is_open for address, link in self._links.items() if address not in asked)

    def _call_over_link(self, wire: Wire, asked: set[LinkAddress]) -> LinkCall | None:
        """Send a request to a router that had its prefix, or to the one that owes the least.

        That is the fewest answers to this gateway. A silent one comes last. Returns ``None`` where
        there is no link, and where it is not known whether Serve still sends requests to the links'
        routers.
        """
        if time.monotonic() - self._known_at_s > STALE_S:
            return None
        links = [(a, link) for a, link in self._links.items() if link.is_open and a not in asked]
        if not links:
            return None
        address, link = self._chosen(links, wire)
        asked.add(address)
        return link.call(wire)

    def _chosen(
        self, links: list[tuple[LinkAddress, CallLink]], wire: Wire
    ) -> tuple[LinkAddress, CallLink]:
        """Return the link for a request; remembers its prompt where there are several."""
        links.sort(key=lambda each: _load_of(each[1]))
        keys = self._keys_of(wire) if len(links) > 1 else []
        if not keys:
            return links[0]
        ready = [each for each in links if not each[1].is_silent()] or links
        sent = [self._sent.setdefault(address, SentPrefixes()) for address, _ in ready]
        place = choose(
            [link.num_unanswered for _, link in ready], [prefixes.match(keys) for prefixes in sent]
        )
        sent[place].add(keys)
        return ready[place]

    def _ask(self) -> None:
        """Begin to ask the routers, unless they are asked or were just asked."""
        now_s = time.monotonic()
        if self._asking is None and now_s - self._asked_at_s >= REFRESH_S:
            self._asked_at_s = now_s
            self._asking = asyncio.create_task(self._refresh())

    def _ask_again(self) -> None:
        """Ask the routers, unless the latest request came too long ago."""
        if time.monotonic() - self._wanted_at_s < KEPT_S:
            self._ask()

    async def _refresh(self) -> None:
        asked_at_s = self._asked_at_s
        try:
            answers = await self._routers.broadcast("link", self._model, self._node).results_async(
                timeout_s=ASK_TIMEOUT_S, return_exceptions=True
            )
            self._links = {a: link for a, link in self._links.items() if link.is_open}
            self._sent = {a: sent for a, sent in self._sent.items() if a in self._links}
            addresses = [answer for answer in answers if isinstance(answer, LinkAddress)]
            for address in addresses:
                self.on_node(address.node)
            await asyncio.gather(*map(self._open, addresses))
            if not any(isinstance(answer, BaseException) for answer in answers):
                self._leave_others(addresses)
                self._known_at_s = asked_at_s
            self._num_failures = 0
        except Exception as error:
            self._num_failures += 1
            if self._num_failures == PATIENCE:
                name = type(error).__name__
                logger.warning("could not ask the routers for links (%s)", name)
        finally:
            self._asking = None
        asyncio.get_running_loop().call_later(REFRESH_S, self._ask_again)

    async def _open(self, address: LinkAddress) -> None:
        if address in self._links or not address.is_reachable:
            return
        try:
            self._links[address] = await CallLink.open(address, self._tls)
            self._unreached.pop(address, None)
        except OSError as error:
            if address not in self._unreached:
                self._unreached[address] = None
                logger.warning(
                    "no link to a router (%s, %s); its requests go through Serve", address, error
                )

    def _leave_others(self, addresses: list[LinkAddress]) -> None:
        """Leave the routers that Serve does not list any more: it ends them."""
        for address in self._links.keys() - addresses:
            self._links.pop(address).leave()
        self._unreached = dict.fromkeys(a for a in self._unreached if a in addresses)
