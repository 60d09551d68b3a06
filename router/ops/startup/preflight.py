"""Checks and completes a deployment file inside ``serve run`` and ``serve deploy``.

Serve builds an application in a task of the cluster, long after the command has told the user that
all is well, and ``serve run`` does not end when that fails. But while the command reads its file,
it imports the class that a ``request_router_config`` names. Our files name the one below (Serve's
own default), so that importing this module attends the command in its own process, before Ray
starts: a bad file ends the command with one line and status 2, Serve is started by the completed
file (:mod:`router.serve.options`), and a ``serve run`` tells when it is ready. ``expertmesh serve``
does the same for a file that names no class. Everywhere else importing this does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from rich.console import Console

from cluster.errors import CheckpointMissingError, ExpertMeshError
from experts.checkpoint.stored import Stored
from router.config import parse_deployment, read_document
from router.ops.doctor.access import ENCRYPTION, check_token
from router.ops.doctor.check import Check
from router.ops.doctor.devices import DEVICES
from router.ops.doctor.doctor import check_ray
from router.ops.doctor.probe import (
    access_checks,
    checks_of_a_start,
    completed_here,
    is_open,
    read_deployment,
)
from router.ops.doctor.running_ray import Target, look_at, look_at_dashboard, target_of
from router.ops.hashing import checkpoints_of, keep_hashes
from router.ops.startup.announce import announce
from router.ops.startup.completion import complete_sent_file, start_serve_with
from router.ops.startup.ray_token import (
    dashboard_of,
    dashboard_variable,
    require_token,
    send_token,
)
from router.ops.startup.reach import check_document
from router.ops.startup.slow_start import command_began_at_s, explain_slow_start
from router.ops.startup.termination import Termination
from router.serve.options import HAPROXY, serve_variables

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


def attend(argv: Sequence[str], file: Path | None = None) -> None:
    """Check the file of a ``serve run`` or ``serve deploy``, and have Serve started by it.

    The ``file`` is found in the command line if it is not given; does nothing for other command
    lines. A ``serve run`` also says when it is ready (:mod:`router.ops.startup.announce`), why its
    start is slow (:mod:`router.ops.startup.slow_start`) and what another shell needs to reach its
    Ray (:mod:`router.ops.startup.ray_token`). It ends cleanly, and leaves nothing of a Ray that it
    starts (:mod:`router.ops.startup.termination`).
    """
    document = checked_document(argv, file)
    if document is None:
        return
    if argv[1] == "deploy":
        send_token(given_address(argv))
        complete_sent_file(HAPROXY in serve_variables(document))
        return
    say = partial(print, flush=True)
    starts_ray = _target(argv) is None
    termination = Termination(_write_line, starts_ray)
    variables = require_token() if starts_ray else {}

    def on_ray() -> None:
        termination.handle_sigterm()
        if starts_ray:
            _tell_other_shells(say, variables)

    termination.install()
    start_serve_with(document, on_ray, termination.serves)
    starts = announce(document, say, command_began_at_s(), Console())
    if starts_ray:
        explain_slow_start(say, starts)


def _tell_other_shells(say: Callable[[str], None], variables: Mapping[str, str]) -> None:
    """Print the variables that Serve's commands need to reach the Ray that has been started."""
    dashboard = ray.get_runtime_context().worker.node.address_info["webui_url"]
    variables = {**variables, **dashboard_variable(dashboard)}
    if dashboard and variables:
        assignments = " ".join(f"{name}={value}" for name, value in variables.items())
        say(
            "expertmesh: for `serve deploy`, `serve status` and `serve shutdown` in another shell: "
            f"export {assignments}"
        )


def _write_line(line: str) -> None:
    """Print a line past Python's buffers, which a signal handler must not enter again."""
    with suppress(OSError):  # nobody reads it
        os.write(sys.stdout.fileno(), f"{line}\n".encode())


def checked_document(argv: Sequence[str], file: Path | None = None) -> Mapping[str, Any] | None:
    """Return a command's deployment file, completed, once nothing keeps it from being served.

    Otherwise exits with status 2 and one line on stderr. ``None`` for other command lines. For a
    ``serve run`` that starts a Ray this machine is looked at too: Serve would wait for ever, say so
    in a log alone, or print a stack. Then checkpoints without kept hashes are hashed, because a bar
    at the terminal is better than a silent start.
    """
    file = file or deployment_file(argv)
    if file is None:
        return None
    target = _target(argv)
    starts_ray = argv[1] == "run" and target is None
    checkpoints: Sequence[Stored] = ()
    try:
        checkpoints = checkpoints_of(file)
    except CheckpointMissingError as error:
        # Only a node of the cluster needs it, and this machine need not even be one.
        if starts_ray:
            _end(f"{error} (if another machine of a cluster has it: serve run --address=auto)")
        _warn(f"{error}; the cluster looks for it on its nodes")
    except ExpertMeshError as error:
        _end(str(error))
    document = completed_here(read_document(file), joins=not starts_ray)
    try:
        check_document(document, file, reads_keys=starts_ray)
    except ExpertMeshError as error:
        _end(f"{file}: {error}")
    if starts_ray:
        _heed(checks_of_a_start(read_deployment(file), os.environ))
        _keep_hashes(checkpoints)
    elif target is not None:
        _heed(_checks_of_a_join(file, document, target))
    else:
        num_nodes, has_token = look_at_dashboard(dashboard_of(given_address(argv)))
        _heed([check_token(num_nodes, is_open(document), has_token)])
    if HAPROXY not in serve_variables(document):
        _warn("there is no HAProxy here: Serve's own proxy listens, more slowly")
    return document


def _keep_hashes(checkpoints: Sequence[Stored]) -> None:
    try:
        keep_hashes(checkpoints, Console(stderr=True))
    except ExpertMeshError as error:
        _end(str(error))


def _target(argv: Sequence[str]) -> Target | None:
    """Return the cluster that a ``serve run`` joins, if it joins one."""
    return target_of(given_address(argv), os.environ) if argv[1] == "run" else None


def _checks_of_a_join(file: Path, document: Mapping[str, Any], target: Target) -> list[Check]:
    """Check a running cluster; this machine need not have the models of the file."""
    running = look_at(target)
    configs = [config for _, config in parse_deployment(read_document(file), file)]
    has_tls = any(config.experts.tls is not None for config in configs)
    return [check_ray(running, ()), *access_checks(document, has_tls, running, os.environ)]


def _heed(checks: Sequence[Check]) -> None:
    """End the command at a problem, and warn of what nobody else says in time.

    Ray does not tell of a GPU that gets too full before a process ends by it.
    """
    problem = next((check for check in checks if check.level == "problem"), None)
    if problem is not None:
        _end(f"{problem.name}: {problem.found}. {problem.advice}")
    for check in checks:
        if check.name in (DEVICES, ENCRYPTION) and check.level == "warning":
            _warn(f"{check.name}: {check.found}. {check.advice}")


def _end(message: str) -> NoReturn:
    _warn(message)
    sys.exit(EXIT_BAD_CONFIG)


def _warn(message: str) -> None:
    print(f"expertmesh: {' '.join(message.split())}", file=sys.stderr, flush=True)


attend(sys.argv)
