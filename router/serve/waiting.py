"""Logs why replicas find no place, or a deployment failed, which only Serve's status says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus, DeploymentStatus

from cluster.ray_private import AppStatus, app_status

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


async def log_what_serve_says(app: str, on_failed_deploy: Callable[[str], None]) -> None:
    """Log Serve's messages of an application, and of its deployments that are not healthy.

    ``on_failed_deploy`` gets why the last deployment of a file failed; nothing if it did not.
    """
    notices = Notices()
    while True:
        try:
            told = await asyncio.to_thread(app_status, app)
            on_failed_deploy(failed_deploy(told))
            for line in notices.due(messages_of(told), time.monotonic()):
                logger.warning("%s", line)
        except (RayError, RuntimeError, TimeoutError) as error:  # Serve's controller may be down
            logger.warning("Serve did not report the state of its deployments: %s", error)
        await asyncio.sleep(PERIOD_S)


def failed_deploy(told: AppStatus | None) -> str:
    """Return why the last deployment of an application failed, or nothing."""
    if told is None or told.status is not ApplicationStatus.DEPLOY_FAILED:
        return ""
    return " ".join(told.message.split())


def messages_of(told: AppStatus | None) -> dict[str, str]:
    """Return what Serve says of an application that is not as it should, by deployment."""
    states, failed = {} if told is None else told.deployments, failed_deploy(told)
    return ({"the last deployment failed, the former one serves": failed} if failed else {}) | {
        name: state.message
        for name, state in states.items()
        if state.message and state.status is not DeploymentStatus.HEALTHY
    }
