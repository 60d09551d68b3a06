"""Who is answered where: the rule, and its table in ``docs/security.md``.

    python -m tests.answered [--write]

Prints the table; with ``--write`` it takes the place of that in the document. A test of a real
deployment (``tests/long/test_answered.py``) asks every port and compares each answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path

from router.security.keys import Role

DOCUMENT = Path(__file__).parent.parent / "docs" / "security.md"
BEGIN, END = "<!-- who is answered: begin -->\n", "<!-- who is answered: end -->\n"


class Outcome(StrEnum):
    """What becomes of a call, as the table has it."""

    ANSWERED = "answered"
    NO_KEY = "401"
    FORBIDDEN = "403"
    ABSENT = "absent"
    CLOSED = "no connection"
    NOTHING = "nothing"
    NOT_APPLICABLE = "n/a"


class State(Enum):
    """What a caller shows; the later ones have the right key."""

    NO_KEY = "no key"
    BAD_KEY = "bad key"
    WRONG_ROLE = "key of another role"
    RIGHT = "right key"
    NO_CERTIFICATE = "no certificate"
    EXPIRED = "expired certificate"
    STRANGER = "certificate of another authority"
    PLAIN = "plain text"


CERTIFICATES = (State.NO_CERTIFICATE, State.EXPIRED, State.STRANGER)


class Group(Enum):
    """Methods and paths that are answered alike."""

    PATHS = "`/v1`, `/v2`, `/tokenize`, `/detokenize`, `/openapi.json`"
    METRICS = "`/metrics`"
    PROBES = "`/health`, `/ready`, `/`, `/docs`"
    LISTENS = "`/-/healthz`"
    NOWHERE = "any other path"
    INFERENCE = "`Inference`, `GRPCInferenceService`"
    ADMIN = "`Admin`"
    CHECK = "`Health/Check`"
    WATCH = "`Health/Watch`"
    REFLECTION = "reflection"
    NO_METHOD = "any other method"
    OTHER_PROTOCOL = "all of the other protocol"
    ALL = "all else"


HTTP_GROUPS = (Group.PATHS, Group.METRICS, Group.PROBES, Group.LISTENS, Group.NOWHERE)
GRPC_GROUPS = (
    Group.INFERENCE, Group.ADMIN, Group.CHECK, Group.WATCH, Group.REFLECTION, Group.NO_METHOD,
)  # fmt: skip
OPEN_GROUPS = frozenset({Group.PROBES, Group.LISTENS, Group.CHECK})
"""Answered to callers without a key; a bad key is refused."""
ROLES = {
    Group.PATHS: Role.INFERENCE,
    Group.METRICS: Role.METRICS,
    Group.NOWHERE: Role.INFERENCE,
    Group.INFERENCE: Role.INFERENCE,
    Group.ADMIN: Role.ADMIN,
}
"""The role that a group's methods need."""


@dataclass(frozen=True)
class Port:
    """A kind of port of a deployment with keys and a certificate.

    ``groups`` are answered there, with ``has_keys`` only to callers who have the right key.
    """

    name: str
    has_tls: bool
    groups: tuple[Group, ...]
    is_http: bool
    has_keys: bool = True


HTTP = Port("HTTP", True, HTTP_GROUPS, True)
GRPC = Port("gRPC", True, (Group.INFERENCE, Group.CHECK, Group.WATCH), False)
OPERATORS = Port("operators' gRPC", True, (Group.ADMIN,), False)
PROBE = Port("probes (`health_port`)", False, (Group.LISTENS,), True, False)
_OF_RAY = (Group.REFLECTION, Group.CHECK, Group.WATCH)
RAY = Port("Ray's own, of each process", False, _OF_RAY, False, False)
OTHERS = Port("links, and Serve's between replicas", False, (), True, False)
PORTS = (HTTP, GRPC, OPERATORS, PROBE, RAY, OTHERS)

Cells = Mapping[tuple[Port, Group], Mapping[State, Outcome]]


def groups_of(port: Port) -> tuple[Group, ...]:
    """Return the rows of a port."""
    if port in (RAY, OTHERS):
        return (*port.groups, Group.ALL)
    return (*(HTTP_GROUPS if port.is_http else GRPC_GROUPS), Group.OTHER_PROTOCOL)


def expected(port: Port, group: Group, state: State, asks_clients: bool = True) -> Outcome:
    """Return what becomes of a call; ``asks_clients`` is whether clients must show a certificate.

    A certificate matters only to a port that asks for one.
    """
    if state in CERTIFICATES and not (port.has_tls and asks_clients):
        return Outcome.NOT_APPLICABLE
    if port.has_tls and (state in CERTIFICATES or state is State.PLAIN):
        return Outcome.CLOSED
    return _by_key(port, group, state)


def _by_key(port: Port, group: Group, state: State) -> Outcome:
    if group in (Group.OTHER_PROTOCOL, Group.ALL):
        return Outcome.NOTHING
    if group not in port.groups:
        return Outcome.ABSENT
    return _by_role(group, state) if port.has_keys else Outcome.ANSWERED


def _by_role(group: Group, state: State) -> Outcome:
    """Return what the gateway's check of callers makes of a call."""
    if state is State.BAD_KEY or (state is State.NO_KEY and group not in OPEN_GROUPS):
        return Outcome.NO_KEY
    if state is State.WRONG_ROLE and group in ROLES:
        return Outcome.FORBIDDEN
    return Outcome.ABSENT if group is Group.NOWHERE else Outcome.ANSWERED


def rule(ports: Iterable[Port] = PORTS, asks_clients: bool = True) -> Cells:
    """Return all rows of some ports."""
    return {
        (port, group): {state: expected(port, group, state, asks_clients) for state in State}
        for port in ports
        for group in groups_of(port)
    }


def table(cells: Cells) -> str:
    """Return rows as a table; ports whose cells are the same share a row."""
    ports: dict[tuple[Group, tuple[Outcome, ...]], list[str]] = {}
    for (port, group), outcomes in cells.items():
        row = group, tuple(outcomes[state] for state in State)
        ports.setdefault(row, []).append(port.name)
    groups: dict[tuple[str, tuple[Outcome, ...]], list[str]] = {}
    for (group, outcomes_), names in ports.items():
        groups.setdefault(("; ".join(names), outcomes_), []).append(group.value)
    lines = [["port", "call", *(state.value for state in State)]]
    lines += [[where, ", ".join(calls), *row] for (where, row), calls in groups.items()]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n".replace("| --- ", "|---") for line in lines)


def document_with(new: str, document: str) -> str:
    """Return a document with a new table between its marks."""
    before, rest = document.split(BEGIN)
    return before + BEGIN + new + END + rest.split(END)[1]


def main() -> None:
    """Print the table, or write it into the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="into the document")
    if not parser.parse_args().write:
        sys.stdout.write(table(rule()))
        return
    document = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(document_with(table(rule()), document), encoding="utf-8")


if __name__ == "__main__":
    main()
