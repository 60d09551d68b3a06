"""Which router of a mixture a gateway calls over a link of its own, and how it finds them."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time

from ray.serve.handle import DeploymentHandle

from router.messages.link import LinkAddress
from router.messages.prediction_link import LinkCall, PredictionLink, Wire

REFRESH_S = 1.0
"""While requests come, the routers are asked for so often."""
ASK_TIMEOUT_S = 5.0

logger = logging.getLogger("expertmesh.link")


def _load_of(link: PredictionLink) -> tuple[bool, int, float]:
    return link.is_silent(), link.num_unanswered, link.called_at_s


class RouterLinks:
    """The links to the routers of one mixture, for the replicas that Serve knows.

    They are used on one event loop.

    Serve says which replicas run, and each of them where it listens. They are asked in the
    background, and only while requests come. Where a replica cannot be reached, its requests go by
    Serve's calls.
    """

    def __init__(self, routers: DeploymentHandle, tls: ssl.SSLContext | None) -> None:
        """``routers`` is the handle of the mixture's deployment."""
        self._routers = routers
        self._tls = tls
        self._links: dict[LinkAddress, PredictionLink] = {}
        self._asked_at_s = -REFRESH_S
        self._asking: asyncio.Task[None] | None = None

    def call(self, wire: Wire) -> LinkCall | None:
        """Send a request to the router that owes this gateway the fewest answers.

        A silent one comes last. Returns ``None`` where there is no link.
        """
        self._keep_fresh()
        links = [link for link in self._links.values() if link.is_open]
        if not links:
            return None
        return min(links, key=_load_of).call(wire)

    def _keep_fresh(self) -> None:
        now_s = time.monotonic()
        if self._asking is None and now_s - self._asked_at_s >= REFRESH_S:
            self._asked_at_s = now_s
            self._asking = asyncio.create_task(self._refresh())

    async def _refresh(self) -> None:
        try:
            answers = await self._routers.broadcast("link").results_async(
                timeout_s=ASK_TIMEOUT_S, return_exceptions=True
            )
            self._links = {a: link for a, link in self._links.items() if link.is_open}
            addresses = [answer for answer in answers if isinstance(answer, LinkAddress)]
            await asyncio.gather(*map(self._open, addresses))
            if not any(isinstance(answer, BaseException) for answer in answers):
                self._leave_others(addresses)
        except Exception as error:
            logger.warning("the routers cannot be asked for links (%s)", type(error).__name__)
        finally:
            self._asking = None

    async def _open(self, address: LinkAddress) -> None:
        if address in self._links:
            return
        try:
            self._links[address] = await PredictionLink.open(address, self._tls)
        except OSError as error:
            logger.warning("no link to a router (%s); Serve's calls carry its requests", error)

    def _leave_others(self, addresses: list[LinkAddress]) -> None:
        """Leave the routers that Serve does not list any more: it ends them."""
        for address in self._links.keys() - addresses:
            self._links.pop(address).leave()
