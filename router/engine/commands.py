"""The commands of other threads to an engine, and the wait for requests that come together."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

QUIET_S = 0.01
GATHER_S = 0.05
"""How long at most an idle engine waits for the next request of a burst, and for all of it."""

Command = Callable[[], None]


class Commands:
    """Callables that run on the engine's thread, in their order.

    :meth:`put` may be called from any thread, the others on the engine's alone.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._most_together = 0
        self._latest_step_s = 0.0

    def put(self, command: Command) -> None:
        """Have a command run; wakes the engine where it waits for commands."""
        self._queue.put(command)

    def run(self, wait_s: float) -> bool:
        """Run all commands that are there; wait so long for the first, and return whether it came.

        With a ``wait_s`` of 0 nothing is waited for.
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
        """Note a step of so many choices that took so long."""
        self._most_together = max(self._most_together, num_choices)
        self._latest_step_s = duration_s

    def run_burst(self, wait_s: float, num_choices: Callable[[], int]) -> None:
        """Run the commands of an idle engine as :meth:`run` does, and those that come soon after.

        Choices that were computed together are often followed by as many that come together, and
        one step for all their prompts takes less time than several. So once there is a choice,
        commands are waited for until there are as many as in any step since the engine was last
        idle, none has come for as long as the latest step took, at most :data:`QUIET_S`, or
        :data:`GATHER_S` have passed. Where there was one choice at a time, nothing is waited for.
        ``num_choices`` tells how many there are.
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
