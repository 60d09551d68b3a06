"""What SIGTERM and Ctrl-C do to an ``expertmesh serve``.

systemd, Docker and Kubernetes send SIGTERM, and kill what is still there after a while.

| Signal | while | Effect |
|---|---|---|
| either | it starts | it ends, with its Ray |
| SIGTERM | it serves | new requests are refused, those under way end, then Serve and Ray end |
| SIGINT | it serves | requests end with UNAVAILABLE, then Serve and Ray end |
| either | requests end | they end with UNAVAILABLE now |
| either | Serve and Ray end | their processes are killed |

While Ray starts it handles SIGTERM itself, and prints a stack of C++.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from enum import Enum, auto
from queue import SimpleQueue
from types import FrameType

import ray
from ray import serve

from router.ops.startup.drain import Gateways, ServedGateways, UnderWay, drain, end_requests
from router.ops.startup.leftovers import end_descendants, kill_descendants

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
_WAKE, _WAKE_PERIOD_S = signal.SIGUSR1, 0.1


class _Phase(Enum):
    STARTING = auto()
    SERVING = auto()
    DRAINING = auto()
    ENDING = auto()


class Termination:
    """The end of one command. Signal handlers run on the main thread."""

    def __init__(self, say: Callable[[str], None], owns_ray: bool) -> None:
        """``say`` prints a line, and may be called in a signal handler.

        ``owns_ray`` tells whether this command starts its Ray.
        """
        self._say = say
        self._owns_ray = owns_ray
        self._phase = _Phase.STARTING
        self._asked: SimpleQueue[int] = SimpleQueue()  # a signal handler may put into it
        self._cut = threading.Event()
        self._has_left = False
        """Whether the main thread has left its sleep."""
        self._exit_code = INTERRUPTED

    def install(self) -> None:
        """Handle SIGTERM and SIGINT from now on; call it on the main thread, before Ray starts.

        A SIGINT that is ignored, as in a shell's background, stays ignored. Where this command
        starts its Ray, all descendants of this process end before it.
        """
        threading.Thread(target=self._end_when_asked, name="termination", daemon=True).start()
        self.handle_sigterm()
        signal.signal(_WAKE, self._on_wake)
        usual = signal.getsignal(signal.SIGINT)
        if callable(usual):
            self._interrupt = usual
            signal.signal(signal.SIGINT, self._on_signal)
        if self._owns_ray:
            # Exit handlers run in the opposite order of their registration: before Ray's own.
            atexit.register(self._at_exit)

    def handle_sigterm(self) -> None:
        """Handle SIGTERM; to be called again once Ray has started and set its own handlers."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def serves(self) -> None:
        """Note that this command serves, and that its main thread only sleeps from now on."""
        self._phase = _Phase.SERVING

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._phase is _Phase.ENDING:
            self._kill(number)
        elif self._phase is _Phase.DRAINING:
            self._say(f"expertmesh: {signal.Signals(number).name}: ending the requests now")
            self._phase = _Phase.ENDING
            self._cut.set()
        elif self._phase is _Phase.SERVING:
            self._phase = _Phase.DRAINING if number == signal.SIGTERM else _Phase.ENDING
            self._asked.put(number)
        elif number == signal.SIGTERM:
            self._phase, self._exit_code = _Phase.ENDING, TERMINATED
            self._say("expertmesh: SIGTERM: ending")
            raise SystemExit(TERMINATED)
        else:
            self._phase = _Phase.ENDING
            self._interrupt(number, frame)

    def _on_wake(self, number: int, frame: FrameType | None) -> None:
        if not self._has_left:
            self._has_left = True
            raise SystemExit(self._exit_code)

    def _end_when_asked(self) -> None:
        """End requests and Serve once a signal has come, and have the main thread leave."""
        number = self._asked.get()
        self._exit_code = 128 + number
        if number == signal.SIGINT:
            self._say("expertmesh: SIGINT: ending")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it tells of each handle
        gateways = ServedGateways()
        try:
            left = self._drain(gateways) if number == signal.SIGTERM else 0
            self._phase = _Phase.ENDING
            if left or number == signal.SIGINT:
                end_requests(gateways)
            serve.shutdown()
            self._exit_code = TERMINATED if left else 0
        except Exception as error:  # what is left of Serve ends with its Ray
            self._say(f"expertmesh: Serve did not end by itself ({type(error).__name__}: {error})")
        finally:
            self._wake_main_thread()

    def _wake_main_thread(self) -> None:
        """Have the main thread leave its sleep; one signal may come just before it sleeps."""
        main = threading.main_thread()
        while main.ident is not None and not self._has_left:
            signal.pthread_kill(main.ident, _WAKE)
            time.sleep(_WAKE_PERIOD_S)

    def _drain(self, gateways: Gateways) -> int:
        """Wait for the requests under way, and say so; returns how many are left."""
        begun: list[UnderWay] = []

        def on_begin(under_way: UnderWay) -> None:
            begun.append(under_way)
            self._say(
                "expertmesh: SIGTERM: ends once the requests under way are done "
                f"({under_way.requests}, at most {under_way.limit_s:.0f} s); another signal ends "
                "them now"
            )

        left = drain(gateways, self._cut, on_begin)
        if not begun:
            self._say("expertmesh: SIGTERM: ending")
        elif left and not self._cut.is_set():
            self._say(f"expertmesh: requests not done in time: {left}; ending them now")
        return left

    def _kill(self, number: int) -> None:
        self._say(f"expertmesh: {signal.Signals(number).name}: killing what is left")
        if self._owns_ray:
            kill_descendants()
        _leave_at_once(128 + number)

    def _at_exit(self) -> None:
        """End Ray, and all descendants of this process.

        Where a signal came while Ray started, this ends the process, too: Ray's half-made
        connection would crash the interpreter at its end.
        """
        is_half_made = self._phase is _Phase.ENDING and not ray.is_initialized()
        self._phase = _Phase.ENDING
        end_descendants()
        if is_half_made:
            _leave_at_once(self._exit_code)


def _leave_at_once(exit_code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
