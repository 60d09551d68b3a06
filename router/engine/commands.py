"""Commands from other threads to an engine, and the wait for requests that arrive together."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

QUIET_S = 0.01
GATHER_S = 0.05
"""The longest that an idle engine waits for a burst's next request, and for the whole burst."""

Command = Callable[[], None]


class Commands:
    """Callables that run on the engine's thread, in order.

    :meth:`put` may be called from any thread, the other methods only from the engine's.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._most_together = 0
        self._latest_step_s = 0.0

    def put(self, command: Command) -> None:
        """Queue a command; wakes the engine if it is waiting for commands."""
        self._queue.put(command)

    def run(self, wait_s: float) -> bool:
        """Run all queued commands; wait ``wait_s`` for the first, and return whether it came.

        A ``wait_s`` of 0 means no wait.
        """
        if wait_s:
            try:
                self._queue.get(timeout=wait_s)()
            except queue.Empty:
                return False
        while not self._queue.empty():  # no other thread takes commands
            self._queue.get_nowait()()
        return True

    def note_step(self, num_choices: int, duration_s: float) -> None:
        """Note how many choices a step had and how long it took."""
        self._most_together = max(self._most_together, num_choices)
        self._latest_step_s = duration_s

    def run_burst(self, wait_s: float, num_choices: Callable[[], int]) -> None:
        """Run an idle engine's commands as :meth:`run` does, and those that arrive soon after.

        Choices computed together are often followed by as many that arrive together, and one step
        for all their prompts takes less time than several. So once there is a choice, the engine
        waits for more commands. It stops waiting when it has as many choices as any step since it
        was last idle, when none has come for as long as the latest step took (at most
        :data:`QUIET_S`), or after :data:`GATHER_S`. If choices came one at a time, it does not
        wait. ``num_choices`` returns how many there are.
        """
        self.run(wait_s)
        if not num_choices():
            return
        num_expected, self._most_together = self._most_together, 0
        ends_at_s = time.monotonic() + GATHER_S
        quiet_s = min(self._latest_step_s, QUIET_S)
        while 0 < num_choices() < num_expected:
            wait_s = min(quiet_s, ends_at_s - time.monotonic())
            if wait_s <= 0 or not self.run(wait_s):
                return
