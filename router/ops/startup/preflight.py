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
from rich.console import Console

from cluster.errors import CheckpointMissingError, ExpertMeshError
from router.ops.doctor.doctor import Check, check_ray
from router.ops.doctor.probe import checks_of_a_start, read_deployment
from router.ops.doctor.running_ray import Target, look_at, target_of
from router.ops.startup.announce import announce
from router.ops.startup.leftovers import end_with_this_process
from router.served import check_file

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
    target = _target(argv)
    starts_ray = argv[1] == "run" and target is None
    try:
        check_file(file)
    except CheckpointMissingError as error:
        # Only a node of the cluster needs it, and this machine need not even be one.
        if starts_ray:
            _end(f"{error} (if another machine of a cluster has it: serve run --address=auto)")
        print(f"expertmesh: {error}; the cluster looks for it on its nodes", file=sys.stderr)
    except ExpertMeshError as error:
        _end(str(error))
    if starts_ray:
        _end_at_a_problem(checks_of_a_start(read_deployment(file), os.environ))
    elif target is not None:
        _end_at_a_problem([check_ray(look_at(target), ())])


def _target(argv: Sequence[str]) -> Target | None:
    """Return the cluster that a ``serve run`` joins, if it joins one."""
    return target_of(given_address(argv), os.environ) if argv[1] == "run" else None


def _end_at_a_problem(checks: Sequence[Check]) -> None:
    problem = next((check for check in checks if check.level == "problem"), None)
    if problem is not None:
        _end(f"{problem.name}: {problem.found}. {problem.advice}")


def _end(message: str) -> NoReturn:
    print(f"expertmesh: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(EXIT_BAD_CONFIG)


def attend_command_line(argv: Sequence[str]) -> None:
    """Have a ``serve run`` say when it is ready, and leave nothing of a Ray that it starts.

    See :mod:`router.ops.startup.announce` and :mod:`router.ops.startup.leftovers`.
    """
    file = deployment_file(argv)
    if file is None or argv[1] != "run":
        return
    announce(file, partial(print, flush=True), Console())
    if _target(argv) is None:
        end_with_this_process()


check_command_line(sys.argv)
attend_command_line(sys.argv)
