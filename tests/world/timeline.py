"""What happened in a world, as lines of text by its clock: for people who look for a cause."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.world.kernel import current_process, kernel

if TYPE_CHECKING:
    from tests.world.clients import Answer
    from tests.world.world import Outcome

PREFIX = "expertmesh:world:"
"""Of the names of actors; it says nothing in a world."""
WORLD = "world"
"""Who says what no process says."""
BROKEN = "BROKEN "
"""Begins the line of a breach in a trace."""


@dataclass(frozen=True)
class Line:
    """Something that happened: when, in which process or :data:`WORLD`, and what."""

    at_s: float
    who: str
    what: str

    def __str__(self) -> str:
        first, *more = self.what.splitlines() or [""]
        begin = f"{self.at_s:9.4f}  {self.who:<14.14}  "
        return "\n".join([begin + first, *(" " * len(begin) + line for line in more)])


class Records(logging.Handler):
    """Keeps what the product logs, with the world's time and the process."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[Line] = []

    def emit(self, record: logging.LogRecord) -> None:
        process = current_process()
        who = WORLD if process is None else short(process.name)
        text = f"{record.levelname.lower()} of {record.name}: {record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            text += f" ({record.exc_info[1]!r})"
        self.lines.append(Line(kernel().now_s, who, text))


@contextmanager
def recorded(level: int = logging.WARNING) -> Iterator[Records]:
    """Keep what is logged inside, and print none of it."""
    root, records = logging.getLogger(), Records(level)
    disabled, handlers, before = logging.root.manager.disable, root.handlers[:], root.level
    logging.disable(logging.NOTSET)
    root.handlers[:] = [records]
    root.setLevel(level)
    try:
        yield records
    finally:
        root.handlers[:] = handlers
        root.setLevel(before)
        logging.disable(disabled)


def short(name: str) -> str:
    return name.removeprefix(PREFIX)


def lines_of(outcome: Outcome, logged: Sequence[Line] = ()) -> list[Line]:
    """Return all that happened, by time: the trace, the requests, and what was logged."""
    names = {process.name: short(process.name) for process in outcome.processes}
    found = [*map(_requests_begin, outcome.answers), *map(_requests_end, outcome.answers)]
    for entry in outcome.trace:
        time_s, what = float(entry[:9]), entry[10:]
        first, _, rest = what.partition(" ")
        is_of = first in names
        found.append(Line(time_s, names[first] if is_of else WORLD, rest if is_of else what))
    shown = [Line(one.at_s, one.who, one.what.replace(PREFIX, "")) for one in [*found, *logged]]
    return sorted(shown, key=lambda line: line.at_s)


def text(outcome: Outcome, logged: Sequence[Line] = ()) -> str:
    return "\n".join(map(str, lines_of(outcome, logged)))


def outcome_of(answer: Answer) -> str:
    if answer.ended_at_s is None:
        return "no answer"
    if answer.error:
        return answer.error
    return "cancelled" if answer.is_cancelled else "whole"


def asked(answer: Answer) -> str:
    plan = answer.plan
    parts = [f"{len(plan.prompt)}+{plan.max_tokens} tokens in {plan.timeout_s:g} s"]
    parts += [f"n={plan.n}"] if plan.n > 1 else []
    parts += [] if plan.is_streamed else ["unary"]
    parts += [plan.on_expert_loss] if plan.on_expert_loss != "strict" else []
    parts += [f"priority {plan.priority}"] if plan.priority else []
    return ", ".join(parts)


def name_of(answer: Answer) -> str:
    """Return a request's name, which is its time, as breaches have it."""
    return f"{answer.plan.at_s:.3f}"


def _requests_begin(answer: Answer) -> Line:
    return Line(
        answer.begun_at_s,
        f"client {answer.plan.client}",
        f"request {name_of(answer)}: {asked(answer)}",
    )


def _requests_end(answer: Answer) -> Line:
    got = "+".join(str(len(choice.token_ids)) for choice in answer.choices)
    models = ",".join(sorted({choice.identity for choice in answer.choices} - {""}))
    parts = [f"request {name_of(answer)}: {outcome_of(answer)}", f"{got} tokens"]
    parts += [f"of {models}"] if models else []
    parts += [f"{answer.lost_gateways} gateways lost"] if answer.lost_gateways else []
    parts += [answer.message[:200]] if answer.message else []
    ended_s = answer.begun_at_s if answer.ended_at_s is None else answer.ended_at_s
    return Line(ended_s, f"client {answer.plan.client}", ", ".join(parts))
