"""Checks a deployment file inside ``serve run`` and ``serve deploy``, before Ray starts.

Serve builds an application in a task of the cluster, long after the command has told the user that
all is well, and ``serve run`` does not end when that fails. But while the command reads its file,
it imports the class that a ``request_router_config`` names. Our files name the one below (Serve's
own default), so that importing this module checks the whole file in the command's own process: a
bad one ends the command with one line and status 2, and a ``serve run`` of a good one tells when it
is ready. Everywhere else importing this does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter

from cluster.errors import ExpertMeshError
from router.announce import announce
from router.check import check_file
from router.doctor import Check
from router.probe import checks_of_a_start, read_deployment

__all__ = ["PowerOfTwoChoicesRequestRouter"]

COMMANDS = ("run", "deploy")
EXIT_BAD_CONFIG = 2
ADDRESS_OPTIONS = ("--address", "-a")


def deployment_file(argv: Sequence[str]) -> Path | None:
    """Return the file that a ``serve run FILE`` or ``serve deploy FILE`` was given, if this is one.

    ``argv`` is the process's command line, program first.
    """
    if len(argv) < 3 or Path(argv[0]).name != "serve" or argv[1] not in COMMANDS:
        return None
    files = [Path(word) for word in argv[2:] if word.endswith((".yaml", ".yml"))]
    return next((file for file in files if file.is_file()), None)


def given_address(argv: Sequence[str]) -> str | None:
    """Return the ``--address`` of a command line, however it is written."""
    for place, word in enumerate(argv):
        if word in ADDRESS_OPTIONS:
            return next(iter(argv[place + 1 :]), None)
        if word.startswith("--address="):
            return word.removeprefix("--address=")
        if word.startswith("-a") and not word.startswith("--"):
            return word[2:].removeprefix("=")
    return None


def check_command_line(argv: Sequence[str]) -> None:
    """Exit with status 2 and one line on stderr when the command cannot do what it is to do.

    Its deployment file is checked and, for ``serve run``, what would keep Serve from starting:
    Serve would wait for ever, say so in a log alone, or print a stack.
    """
    file = deployment_file(argv)
    if file is None:
        return
    try:
        if argv[1] == "deploy":
            check_file(file)
            return
        checks = checks_of_a_start(read_deployment(file), given_address(argv), os.environ)
    except ExpertMeshError as error:
        _end(str(error))
    problem = next((check for check in checks if check.level == "problem"), None)
    if problem is not None:
        _end(_sentence(problem))


def _sentence(problem: Check) -> str:
    return f"{problem.name}: {problem.found}. {problem.advice}"


def _end(message: str) -> NoReturn:
    print(f"expertmesh: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(EXIT_BAD_CONFIG)


def announce_command_line(argv: Sequence[str]) -> None:
    """Have a ``serve run`` say on stdout when it is ready (:mod:`router.announce`)."""
    file = deployment_file(argv)
    if file is not None and argv[1] == "run":
        announce(file, partial(print, flush=True))


check_command_line(sys.argv)
announce_command_line(sys.argv)
