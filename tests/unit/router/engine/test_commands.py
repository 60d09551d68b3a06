"""An engine's commands: in order, and waited for where requests come together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from router.engine import commands as commands_module
from router.engine.commands import Commands

LONG_S = 30.0


class Choices:
    """Commands of which each brings a choice, some of them later, from another thread."""

    def __init__(self) -> None:
        self.commands = Commands()
        self.taken: list[int] = []
        self._put = 0

    def __len__(self) -> int:
        return len(self.taken)

    def put(self, count: int) -> None:
        for _ in range(count):
            number, self._put = self._put, self._put + 1
            self.commands.put(lambda number=number: self.taken.append(number))

    def later(self, count: int) -> threading.Thread:
        """Put choices one after another, from another thread."""

        def work() -> None:
            for _ in range(count):
                time.sleep(0.01)
                self.put(1)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def run_burst(self, wait_s: float = LONG_S) -> int:
        self.commands.run_burst(wait_s, self.__len__)
        return len(self)

    def end_all(self) -> None:
        self.taken.clear()


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Choices:
    monkeypatch.setattr(commands_module, "QUIET_S", LONG_S)
    monkeypatch.setattr(commands_module, "GATHER_S", LONG_S)
    return Choices()


def took_s(call: Callable[[], object]) -> float:
    began_at_s = time.monotonic()
    call()
    return time.monotonic() - began_at_s


def test_commands_run_in_their_order(choices: Choices) -> None:
    choices.put(100)
    assert choices.commands.run(0.0)
    assert choices.taken == list(range(100))
    assert choices.commands.run(0.0)
    assert not choices.commands.run(0.001)
    assert choices.taken == list(range(100))


def test_one_choice_at_a_time_waits_for_no_other(choices: Choices) -> None:
    for _ in range(3):
        choices.put(1)
        assert took_s(choices.run_burst) < LONG_S / 2
        choices.commands.note_step(len(choices), LONG_S)
        choices.end_all()


def test_as_many_are_waited_for_as_were_computed_together(choices: Choices) -> None:
    for num_choices in (1, 4, 3):
        choices.commands.note_step(num_choices, LONG_S)
    choices.put(1)
    thread = choices.later(3)
    assert choices.run_burst() == 4
    thread.join(LONG_S)
    choices.end_all()
    choices.put(1)  # none was computed since
    assert choices.run_burst() == 1


@pytest.mark.parametrize(
    ("quiet_s", "steps_s"),
    [(0.05, [LONG_S]), (LONG_S, [LONG_S, 0.001]), (LONG_S, [0.0])],
    ids=["a pause", "the latest step", "no duration"],
)
def test_the_next_choice_is_waited_for_no_longer_than(
    choices: Choices, monkeypatch: pytest.MonkeyPatch, quiet_s: float, steps_s: list[float]
) -> None:
    monkeypatch.setattr(commands_module, "QUIET_S", quiet_s)
    for step_s in steps_s:
        choices.commands.note_step(32, step_s)
    choices.put(5)
    assert took_s(choices.run_burst) < LONG_S / 2
    assert len(choices) == 5


def test_a_choice_that_is_cancelled_meanwhile_ends_the_wait(choices: Choices) -> None:
    choices.commands.note_step(32, LONG_S)
    choices.put(1)
    choices.commands.put(lambda: None)
    thread = threading.Timer(0.01, choices.commands.put, [choices.end_all])
    thread.start()
    assert choices.run_burst() == 0
    thread.join(LONG_S)


def test_a_burst_without_an_end_is_waited_for_no_longer_than_the_bound(
    choices: Choices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands_module, "GATHER_S", 0.2)
    choices.commands.note_step(10_000, LONG_S)
    choices.put(1)
    thread = choices.later(60)
    assert 1 < choices.run_burst() < 60
    thread.join(LONG_S)


def test_an_idle_engine_that_gets_no_choice_expects_as_many_as_before(choices: Choices) -> None:
    choices.commands.note_step(2, LONG_S)
    assert choices.run_burst(wait_s=0.001) == 0
    choices.commands.put(lambda: None)  # the cancellation of a request that has ended
    assert choices.run_burst() == 0
    choices.put(1)
    thread = choices.later(1)
    assert choices.run_burst() == 2
    thread.join(LONG_S)
