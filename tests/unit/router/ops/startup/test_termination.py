"""What each signal does to an ``expertmesh serve``, in each of its phases."""

from __future__ import annotations

import atexit
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from router.ops.startup import drain, termination
from router.ops.startup.drain import UnderWay
from router.ops.startup.termination import Termination

LIMIT_S = 60.0
INT, TERM = signal.SIGINT, signal.SIGTERM


class LeftError(Exception):
    """In the place of the end of this process."""


class Command:
    """A command whose Serve and whose Ray are fakes."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: list[str] = []
        self.requests = 0
        self.begun, self.asleep = threading.Event(), threading.Event()
        self.termination = Termination(self.say)

    def say(self, line: str) -> None:
        self.lines.append(line)
        self.begun.set()

    def shut_down(self, ends_requests: bool) -> UnderWay:
        if ends_requests:
            self.requests = 0
            self.done.append("end requests")
        return UnderWay(self.requests, 60.0)

    def shutdown(self) -> None:
        self.done.append("shutdown")

    def kill(self) -> None:
        self.done.append("kill")

    def leave(self, exit_code: int) -> None:
        raise LeftError(exit_code)

    def sleep_as_serve_run(self) -> None:
        """Sleep as the main thread of Serve's ``run``; a signal has to wake it."""
        self.asleep.set()
        time.sleep(LIMIT_S)

    def wake(self) -> None:
        """Wake the main thread, no sooner than the test sleeps."""
        self.asleep.wait(LIMIT_S)
        Termination._wake_main_thread(self.termination)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """An installed command; the signals' own handlers come back."""
    made = Command()
    monkeypatch.setattr(drain, "POLL_S", 0.001)
    monkeypatch.setattr(termination, "ServedGateways", lambda: made)
    monkeypatch.setattr(termination.serve, "shutdown", made.shutdown)
    monkeypatch.setattr(termination, "kill_descendants", made.kill)
    monkeypatch.setattr(termination, "_leave_at_once", made.leave)
    monkeypatch.setattr(made.termination, "_wake_main_thread", made.wake)
    before = {number: signal.getsignal(number) for number in (INT, TERM, termination._WAKE)}
    made.termination.install()
    yield made
    atexit.unregister(termination.end_descendants)
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(command: Command) -> int:
    """Return the exit code with which the command's main thread leaves its sleep."""
    started_s = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        command.sleep_as_serve_run()
    assert time.monotonic() - started_s < LIMIT_S / 2
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("number", "requests", "done"),
    [(TERM, 0, ["shutdown"]), (INT, 3, ["end requests", "shutdown"])],
)
def test_an_idle_command_ends_by_a_sigterm_and_any_by_ctrl_c(
    command: Command, number: signal.Signals, requests: int, done: list[str]
) -> None:
    command.requests = requests
    signal.raise_signal(number)
    assert ended(command) == 0
    assert command.done == done
    assert command.lines == [f"expertmesh: {number.name}: ending"]


def test_requests_under_way_end_before_a_sigterm_does(command: Command) -> None:
    command.requests = 3
    signal.raise_signal(TERM)
    assert command.begun.wait(LIMIT_S)
    assert command.done == []
    command.requests = 0
    assert ended(command) == 0
    assert command.done == ["shutdown"]
    assert command.lines == [
        "expertmesh: SIGTERM: ends once the requests under way are done (3, at most 60 s); another "
        "signal ends them now"
    ]


@pytest.mark.parametrize("second", [INT, TERM])
def test_a_second_signal_ends_the_requests(command: Command, second: signal.Signals) -> None:
    command.requests = 3
    signal.raise_signal(TERM)
    assert command.begun.wait(LIMIT_S)
    signal.raise_signal(second)
    assert ended(command) == 143
    assert command.done == ["end requests", "shutdown"]
    assert command.lines[1:] == [f"expertmesh: {second.name}: ending the requests now"]


@pytest.mark.parametrize("second", [INT, TERM])
def test_a_signal_while_serve_ends_kills_what_is_left(
    command: Command, second: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, may_end = threading.Event(), threading.Event()

    def shutdown() -> None:
        ends.set()
        may_end.wait(LIMIT_S)

    monkeypatch.setattr(termination.serve, "shutdown", shutdown)
    signal.raise_signal(INT)
    assert ends.wait(LIMIT_S)
    with pytest.raises(LeftError) as caught:
        signal.raise_signal(second)
    assert caught.value.args == (128 + second,)
    assert command.done == ["end requests", "kill"]
    assert command.lines[1:] == [f"expertmesh: {second.name}: killing what is left"]
    may_end.set()
    ended(command)


def test_a_serve_that_is_gone_is_a_line_and_no_stack(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> None:
        raise ConnectionError("no GCS")

    monkeypatch.setattr(termination.serve, "shutdown", gone)
    signal.raise_signal(TERM)
    assert ended(command) == 143
    assert command.lines[1:] == [
        "expertmesh: Serve did not end by itself (ConnectionError: no GCS)"
    ]
