"""Coroutines in virtual time: when nothing is left to do, the next timer is due at once."""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")
THREADS_S = 60.0
"""How long to wait for a thread, on the machine's clock."""


class _Clock(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """What the loop waits by; it stands still while one of ``calls`` runs on a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = time.monotonic()
        self.calls: set[object] = set()
        self.num_hung = 0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or (timeout > 0 and len(self.calls) > self.num_hung):
            if not (ready := super().select(THREADS_S)):
                raise TimeoutError(f"no timer is set and no thread ended within {THREADS_S:.0f} s")
            return ready
        self.now_s += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while anything runs."""

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        future = super().run_in_executor(executor, func, *args)
        self._clock.calls.add(future)
        future.add_done_callback(self._clock.calls.discard)
        return future

    async def shutdown_default_executor(self, *args: Any) -> None:
        self._clock.calls.add(self)
        await super().shutdown_default_executor(*args)
        self._clock.calls.discard(self)

    def hang(self, until: threading.Event) -> None:
        """Block one of the loop's threads until an event; meanwhile the clock goes on."""
        self.call_soon_threadsafe(self._hung, 1)
        until.wait(THREADS_S)
        self.call_soon_threadsafe(self._hung, -1)

    def _hung(self, change: int) -> None:
        self._clock.num_hung += change


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in virtual time, which ``time.monotonic`` tells too."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        with mock.patch.object(time, "monotonic", loop.time):
            return runner.run(main)
