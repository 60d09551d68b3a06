"""Logs why replicas find no place, which Serve says in its status alone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ray.exceptions import RayError
from ray.serve.schema import DeploymentStatus

from cluster.ray_private import app_status

PERIOD_S, MAX_PERIOD_S = 10.0, 320.0

logger = logging.getLogger("expertmesh.controller")


@dataclass(slots=True)
class Notices:
    """When a message is logged: as it comes, then ever more seldom while it stays."""

    _since_s: dict[str, float] = field(default_factory=dict)
    _next_s: dict[str, float] = field(default_factory=dict)

    def due(self, messages: Mapping[str, str], now_s: float) -> list[str]:
        """Return what to log now of ``messages``, which are by deployment."""
        told = {f"{name}: {' '.join(text.split())}" for name, text in messages.items()}
        for times in (self._since_s, self._next_s):
            for gone in times.keys() - told:
                del times[gone]
        found = []
        for text in sorted(told):
            waited_s = now_s - self._since_s.setdefault(text, now_s)
            if now_s >= self._next_s.get(text, now_s):
                self._next_s[text] = now_s + min(max(waited_s, PERIOD_S), MAX_PERIOD_S)
                found.append(text)
        return found


async def log_what_serve_says(app: str) -> None:
    """Log Serve's messages of an application's deployments that are not healthy."""
    notices = Notices()
    while True:
        try:
            for line in notices.due(await asyncio.to_thread(messages_of, app), time.monotonic()):
                logger.warning("%s", line)
        except (RayError, RuntimeError, TimeoutError) as error:  # Serve's controller may be down
            logger.warning("Serve did not report the state of its deployments: %s", error)
        await asyncio.sleep(PERIOD_S)


def messages_of(app: str) -> dict[str, str]:
    """Return what Serve says of an application's deployments that are not healthy, by name."""
    told = app_status(app)
    return {
        name: state.message
        for name, state in ({} if told is None else told.deployments).items()
        if state.message and state.status is not DeploymentStatus.HEALTHY
    }
