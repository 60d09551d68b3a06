"""A replica's copy of the placement, kept up to date by long polls of the controller.

The engine's thread reads it and waits on it; the replica's event loop writes it. While the
controller is away the last placement stays in force; when it is for ever, since Serve deletes the
application, the replica is told.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray

from cluster.placement.placement import Placement
from cluster.reports import Samples
from router.control.client import ControllerClient

WATCH_S = 1.0
CALL_TIMEOUT_S = 15.0
LATE_S = WATCH_S + 1.0
"""After so long without an answer to a long poll Serve is asked whether the controller is gone."""
RETRY_S = 0.5

logger = logging.getLogger("expertmesh.placement")


class PlacementView:
    """The newest placement that this replica has heard of; safe to read from any thread.

    ``placement`` is ``None`` before the first one, and only :meth:`publish` sets it.
    """

    def __init__(self) -> None:
        """Start without a placement."""
        self.placement: Placement | None = None
        self._looped_s: float | None = None
        self._changed = threading.Condition()

    def publish(self, placement: Placement) -> None:
        """Take a placement if it is newer than the current one, and wake those who wait."""
        with self._changed:
            if self.placement is None or placement.order > self.placement.order:
                self.placement = placement
                self._changed.notify_all()

    def heard(self, loop_age_s: float) -> None:
        """Take the controller's word on how long ago its last loop ended."""
        self._looped_s = time.monotonic() - loop_age_s

    def loop_age_s(self) -> float | None:
        """Return how long ago the controller's last loop that is known of ended, if any is."""
        return None if self._looped_s is None else time.monotonic() - self._looped_s

    def wait_newer(self, than: Placement | None, timeout_s: float) -> bool:
        """Block until the placement is newer than ``than``; returns whether it became so."""
        order = (-1, -1) if than is None else than.order
        with self._changed:
            return self._changed.wait_for(
                lambda: self.placement is not None and self.placement.order > order, timeout_s
            )


class PlacementWatcher:
    """Feeds a view from the controller, on an event loop; also passes suspicions on."""

    def __init__(
        self,
        kind: str,
        view: PlacementView,
        controller: ControllerClient,
        is_wanted: Callable[[], bool],
        on_deleted: Callable[[], None],
        samples: Callable[[], Samples],
    ) -> None:
        """``kind`` is ``router`` or ``gateway``, as it is to appear in the status.

        ``samples`` returns what the replica measures; each long poll brings that along.

        ``on_deleted`` is called, once, when Serve deletes the application. The controller tells of
        it; while that does not answer, ``is_wanted`` asks Serve, and may block.
        """
        self._kind = kind
        self._is_wanted = is_wanted
        self._on_deleted = on_deleted
        self._samples = samples
        self._asking: asyncio.Task[None] | None = None
        self._view = view
        self._controller = controller
        self._telling: set[tuple[str, int]] = set()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._watch_forever(), name="placement watch")

    def stop(self) -> None:
        """Stop polling."""
        self._task.cancel()
        if self._asking is not None:
            self._asking.cancel()

    def suspect(self, actor_id: str, generation: int) -> None:
        """Tell the controller that an actor gives no answer; callable from any thread.

        What it has not taken yet is not said to it once more.
        """
        asyncio.run_coroutine_threadsafe(self._tell(actor_id, generation), self._loop)

    async def _tell(self, actor_id: str, generation: int) -> None:
        if (actor_id, generation) in self._telling:
            return
        self._telling.add((actor_id, generation))
        try:
            await self._bounded(lambda: self._controller.suspect(actor_id, generation))
        finally:
            self._telling.discard((actor_id, generation))

    async def _watch_forever(self) -> None:
        node = ray.get_runtime_context().get_node_id()
        while True:
            answered, told = await self._watch_once(node)
            if not answered:
                self._ask_serve()
                await asyncio.sleep(RETRY_S)
                continue
            if told["is_deleted"]:
                self._on_deleted()
                return
            self._view.heard(told["loop_age_s"])
            if told["placement"] is not None:
                self._view.publish(told["placement"])

    async def _watch_once(self, node: str) -> tuple[bool, Any]:
        current = self._view.placement
        known = (-1, -1) if current is None else current.order
        call = asyncio.create_task(
            self._bounded(
                lambda: self._controller.watch(
                    self._kind, os.getpid(), node, known, WATCH_S, self._samples()
                )
            )
        )
        try:
            while not (await asyncio.wait([call], timeout=LATE_S))[0]:
                self._ask_serve()
            return call.result()
        finally:
            call.cancel()

    def _ask_serve(self) -> None:
        """Look whether the controller is away for ever; nobody waits for the answer."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._end_if_deleted())

    async def _end_if_deleted(self) -> None:
        try:
            wanted = await asyncio.to_thread(self._is_wanted)
        except Exception as error:  # Serve itself is away, which says nothing
            logger.warning("Serve does not answer (%s)", type(error).__name__)
            return
        if not wanted and not self._task.done():
            self._task.cancel()
            self._on_deleted()

    async def _bounded(self, call: Callable[[], Awaitable[Any]]) -> tuple[bool, Any]:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return True, await call()
        except Exception as error:  # away, restarting, or slow: the view stays as it is
            logger.warning("the controller does not answer (%s)", type(error).__name__)
            return False, None
