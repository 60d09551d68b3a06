"""A replica's copy of the placement, kept up to date by long polls of the controller.

The engine's thread reads it and waits on it; the replica's event loop writes it. While the
controller is away the last placement stays in force. When Serve deletes the application, the
controller does not come back, and the replica is notified.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import ray

from cluster.placement.placement import Placement
from cluster.reports import KeyUse, Samples
from router.control.client import ControllerClient
from router.control.heard import HeardActors

WATCH_S = 1.0
CALL_TIMEOUT_S = 15.0
LATE_S = WATCH_S + 1.0
"""After this time without an answer to a long poll, Serve is asked about the application."""
RETRY_S = 0.5
T = TypeVar("T")

logger = logging.getLogger("expertmesh.placement")


class PlacementView:
    """The newest placement that this replica knows; safe to read from any thread.

    ``placement`` is ``None`` until :meth:`publish` gets the first placement. ``models`` are the
    keys of all models that any of them had. ``expert_classes`` are the kernel classes of the
    replica's model in its expert actors. ``failed_deploy`` is why the last deployment failed, or
    empty.
    """

    def __init__(self) -> None:
        """Start without a placement."""
        self.failed_deploy = ""
        self.placement: Placement | None = None
        self.models: frozenset[str] = frozenset()
        self.expert_classes: frozenset[str] = frozenset()
        self._looped_at_s: float | None = None
        self._changed = threading.Condition()

    def publish(self, placement: Placement) -> None:
        """Take a placement if it is newer than the current one, and wake waiting threads."""
        with self._changed:
            if self.placement is None or placement.order > self.placement.order:
                self.models |= placement.models()
                self.placement = placement
                self._changed.notify_all()

    def classify(self, epoch: int, expert_classes: frozenset[str]) -> None:
        """Take the model's kernel classes from a controller, unless it is an earlier one."""
        if self.placement is None or epoch >= self.placement.epoch:
            self.expert_classes = expert_classes

    def heard(self, loop_age_s: float) -> None:
        """Record the time since the controller's last loop ended, as the controller says."""
        self._looped_at_s = time.monotonic() - loop_age_s

    def loop_age_s(self) -> float | None:
        """Return the time since the controller's last known loop ended; ``None`` if none is."""
        return None if self._looped_at_s is None else time.monotonic() - self._looped_at_s

    def wait_newer(self, than: Placement | None, timeout_s: float) -> bool:
        """Block until the placement is newer than ``than``; returns false after ``timeout_s``."""
        order = (-1, -1) if than is None else than.order
        with self._changed:
            return self._changed.wait_for(
                lambda: self.placement is not None and self.placement.order > order, timeout_s
            )


class PlacementWatcher:
    """Feeds a view from the controller, on an event loop; also reports suspected actors."""

    def __init__(
        self,
        kind: str,
        view: PlacementView,
        controller: ControllerClient,
        is_wanted: Callable[[], bool],
        on_deleted: Callable[[], None],
        samples: Callable[[], Samples],
        model: str = "",
        kernel_class: Callable[[], str] = lambda: "",
        hear_uses: Callable[[Mapping[str, Mapping[str, KeyUse]]], None] = lambda uses: None,
    ) -> None:
        """``kind``, ``router`` or ``gateway``, is shown in the cluster's status.

        ``model`` is the key of a router's model; the controller keeps its experts for it.
        ``kernel_class`` returns the class of a router's dense part.

        ``samples`` returns the replica's samples; each long poll sends them, with the actors that
        its dispatchers note in ``heard``. ``hear_uses`` gets the answer's uses of quotas.

        ``on_deleted`` is called once, when Serve deletes the application. The controller says so;
        while it does not answer, ``is_wanted`` asks Serve, and may block.
        """
        self.heard = HeardActors()
        self._asks_own = False
        self._kind = kind
        self._is_wanted = is_wanted
        self._on_deleted = on_deleted
        self._samples = samples
        self._model = model
        self._kernel_class = kernel_class
        self._hear_uses = hear_uses
        self._asking: asyncio.Task[None] | None = None
        self._view = view
        self._controller = controller
        self._reporting: set[tuple[str, int]] = set()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._watch_forever(), name="placement watch")

    def stop(self) -> None:
        """Stop polling."""
        self._task.cancel()
        if self._asking is not None:
            self._asking.cancel()

    def suspect(self, actor_id: str, generation: int) -> None:
        """Report to the controller that an actor does not answer; callable from any thread.

        An actor is not reported again while a report of it is under way.
        """
        asyncio.run_coroutine_threadsafe(self._report(actor_id, generation), self._loop)

    async def _report(self, actor_id: str, generation: int) -> None:
        if (actor_id, generation) in self._reporting:
            return
        self._reporting.add((actor_id, generation))
        try:
            hears_others = self.heard.hears_others(actor_id)
            await self._bounded(
                lambda: self._controller.suspect(actor_id, generation, hears_others)
            )
        finally:
            self._reporting.discard((actor_id, generation))

    async def _watch_forever(self) -> None:
        node = ray.get_runtime_context().get_node_id()
        while True:
            answer = await self._watch_once(node)
            if answer is None:
                self._ask_serve()
                await asyncio.sleep(RETRY_S)
                continue
            if answer["is_deleted"]:
                self._on_deleted()
                return
            self._asks_own = answer["asks_own"]
            self._view.heard(answer["loop_age_s"])
            # An earlier build's controller does not say it.
            self._view.failed_deploy = answer.get("failed_deploy", "")
            self._hear_uses(answer["uses"])
            # Before the placement, so that an actor's class is known when it is first asked.
            self._view.classify(answer["epoch"], answer["expert_classes"])
            if answer["placement"] is not None:
                self._view.publish(answer["placement"])

    async def _watch_once(self, node: str) -> dict[str, Any] | None:
        current = self._view.placement
        known = (-1, -1) if current is None else current.order
        call = asyncio.create_task(
            self._bounded(
                lambda: self._controller.watch(
                    self._kind,
                    os.getpid(),
                    node,
                    known,
                    WATCH_S,
                    self._samples(),
                    self._model,
                    self._kernel_class(),
                    self.heard.ages(),
                    current if self._asks_own else None,
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
        """Ask Serve in the background whether the application is deleted."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._end_if_deleted())

    async def _end_if_deleted(self) -> None:
        try:
            wanted = await asyncio.to_thread(self._is_wanted)
        except Exception as error:  # Serve itself is down: the application may still be wanted
            logger.warning("Serve does not answer (%s)", type(error).__name__)
            return
        if not wanted and not self._task.done():
            self._task.cancel()
            self._on_deleted()

    async def _bounded(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """Return the answer of a call, or ``None`` if the controller does not answer."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await call()
        except Exception as error:  # down, restarting, or slow: the view stays as it is
            logger.warning("the controller does not answer (%s)", type(error).__name__)
            return None
