"""What SIGTERM and Ctrl-C do to an ``expertmesh serve``.

systemd, Docker and Kubernetes send SIGTERM, and kill what is still there after a while.

| Signal | while | Effect |
|---|---|---|
| either | it starts | it is killed, with its Ray (:mod:`router.ops.startup.supervisor`) |
| SIGTERM | it serves | new requests are refused, those under way end, then Serve and Ray end |
| SIGINT | it serves | requests end with UNAVAILABLE, then Serve and Ray end |
| `serve shutdown` | it serves | the command ends with 0 once Serve has ended |
| either | requests end | they end with UNAVAILABLE now |
| either | Serve and Ray end | their processes are killed |
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
from contextlib import suppress
from enum import Enum, auto
from queue import Empty, SimpleQueue
from types import FrameType

from ray import serve

from router.ops.startup.drain import Gateways, ServedGateways, UnderWay, drain, end_requests
from router.ops.startup.leftovers import end_descendants, kill_descendants
from router.serve.instance import serve_has_ended

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
_WAKE, _WAKE_PERIOD_S, LOOK_PERIOD_S = signal.SIGUSR1, 0.1, 2.0


class _Phase(Enum):
    SERVING = auto()
    DRAINING = auto()
    ENDING = auto()


class Termination:
    """The end of one command. Signal handlers run on the main thread."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """``say`` prints a line, and may be called in a signal handler."""
        self._say = say
        self._phase = _Phase.SERVING
        self._asked: SimpleQueue[int] = SimpleQueue()  # a signal handler may put into it
        self._cut = threading.Event()
        self._has_left = False
        """Whether the main thread has left its sleep."""
        self._exit_code = INTERRUPTED

    def install(self) -> None:
        """Handle SIGTERM and SIGINT from now on; call it on the main thread, once Ray runs.

        Ray's start sets handlers of its own. A SIGINT that is ignored, as in a shell's background,
        stays ignored. All descendants of this process end before it. The main thread is to do
        nothing but wait from now on.
        """
        threading.Thread(target=self._end_when_asked, name="termination", daemon=True).start()
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(_WAKE, self._on_wake)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._on_signal)
        # Exit handlers run in the opposite order of their registration: before Ray's own.
        atexit.register(end_descendants)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._phase is _Phase.ENDING:
            self._kill(number)
        elif self._phase is _Phase.DRAINING:
            self._say(f"expertmesh: {signal.Signals(number).name}: ending the requests now")
            self._phase = _Phase.ENDING
            self._cut.set()
        else:
            self._phase = _Phase.DRAINING if number == signal.SIGTERM else _Phase.ENDING
            self._asked.put(number)

    def _on_wake(self, number: int, frame: FrameType | None) -> None:
        if not self._has_left:
            self._has_left = True
            raise SystemExit(self._exit_code)

    def _end_when_asked(self) -> None:
        """End requests and Serve once a signal has come, and have the main thread leave."""
        number = self._wait_for_signal()
        if number is None:
            self._say("expertmesh: Serve was shut down: ending")
            self._phase, self._exit_code = _Phase.ENDING, 0
            self._wake_main_thread()
            return
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

    def _wait_for_signal(self) -> int | None:
        """Return the first signal; ``None`` once another command has shut Serve down."""
        while True:
            with suppress(Empty):
                return self._asked.get(timeout=LOOK_PERIOD_S)
            if serve_has_ended():
                return None

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
        kill_descendants()
        _leave_at_once(128 + number)


def _leave_at_once(exit_code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
