"""The Serve that runs an application: its proxies, and its applications."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import RayServeException

from cluster.ray_private import app_status
from router.serve.options import NO_PROXIES
from router.serve.process import setup_logging

_HAS_PROXIES = (
    "Serve runs proxies, and the gateways listen by themselves: shut Serve down, and write "
    f"`{NO_PROXIES}` at the top of the deployment file, or start it by `expertmesh serve`"
)

logger = logging.getLogger("expertmesh.serve")


def applications(timeout_s: float) -> list[str]:
    """Return the names of all applications of Serve, in whatever state.

    There is none where no Serve runs. Raises :class:`TimeoutError` when Serve does not answer.
    """
    answers: SimpleQueue[Mapping[str, Any] | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            answers.put(serve.status().applications)
        except Exception as error:
            answers.put(error)

    Thread(target=ask, name="Serve's status", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except Empty:
        raise TimeoutError(f"Serve does not answer within {timeout_s:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return list(answer)


def serve_has_ended() -> bool:
    """Return whether the Serve that this process has used was shut down, by whatever process."""
    try:
        app_status("")
    except ActorDiedError:
        return True
    except Exception as error:  # Ray itself may be away for a while
        logger.debug("Serve does not answer: %s", error)
    return False


def refuse_proxies() -> None:
    """Raise ``RayServeException`` where proxies of Serve run: they would hold a gateway's port.

    It is logged, too, since Serve tells of it only in its status.
    """
    if ray.is_initialized() and serve.status().proxies:
        setup_logging()
        logger.error(_HAS_PROXIES)
        raise RayServeException(_HAS_PROXIES)
