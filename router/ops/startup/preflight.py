"""Checks a deployment file inside ``serve run`` and ``serve deploy``, before anything starts.

Serve builds an application in a task of the cluster, long after the command has told the user that
all is well, and ``serve run`` does not end when that fails. But while the command reads its file,
it imports the class that a ``request_router_config`` names. Our files name one of this module, for
the controller. So importing it attends the command in its own process: a bad file ends it with one
line and status 2, and a ``serve run`` tells when it is ready. ``expertmesh serve`` and
``expertmesh deploy`` check any file, and fill in Serve's part. Everywhere else importing this does
nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from cluster.errors import CheckpointMissingError, ExpertMeshError
from experts.checkpoint.stored import Stored
from router.config.deployment import parse_deployment, read_document
from router.config.local_paths import bundled, folder_beside, models_in
from router.ops.doctor.access import ENCRYPTION, TOKEN, check_token
from router.ops.doctor.check import Check
from router.ops.doctor.devices import DEVICES
from router.ops.doctor.doctor import check_ray
from router.ops.doctor.probe import (
    access_checks,
    checks_of_a_start,
    read_deployment,
)
from router.ops.doctor.running_ray import Target, dashboard_has_token, look_at, target_of
from router.ops.hashing import checkpoints_of, keep_hashes
from router.ops.startup.announce import announce
from router.ops.startup.ray_token import dashboard_of, token_variable
from router.ops.startup.reach import check_document
from router.ops.startup.slow_start import command_began_at_s, explain_slow_start
from router.security.token_file import make_token, token_exposure
from router.serve.any_replica import AnyReplica as AnyReplica  # the class that a file names

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


def attend(argv: Sequence[str]) -> None:
    """Check the file of a ``serve run`` or ``serve deploy``; does nothing for other command lines.

    A ``serve run`` also says when it is ready (:mod:`router.ops.startup.announce`), and why its
    start is slow (:mod:`router.ops.startup.slow_start`).
    """
    file = deployment_file(argv)
    if file is None:
        return
    address = given_address(argv)
    _check_paths(file)
    if argv[1] == "deploy":
        check_deploy(file, read_document(file), address)
        return
    starts_ray = target_of(address, os.environ) is None
    if starts_ray:
        make_token(os.environ)
    document = read_document(file)
    check_start(file, document, address)
    if starts_ray:
        tell_other_shells(token_variable())
    tell_progress(document, starts_ray)


def _check_paths(file: Path) -> None:
    """End the command at a model's folder that only our own commands would find."""
    for model in models_in(read_document(file)):
        beside = folder_beside(model["path"], file.resolve().parent)
        if beside is not None and not bundled(model["path"]).is_dir():
            _end(
                f"{file}: {model['path']}: is a folder beside the file, where `serve` does not "
                f"look; use `expertmesh serve` or `expertmesh deploy`, or write {beside}"
            )


def tell_progress(document: Mapping[str, Any], starts_ray: bool) -> None:
    """Say when a start is ready, and why it is slow, from threads of this process."""
    say = partial(print, flush=True)
    starts = announce(document, say, command_began_at_s(), Console())
    if starts_ray:
        explain_slow_start(say, starts)


def tell_other_shells(variables: Mapping[str, str]) -> None:
    """Print the variables that Serve's commands need to reach a Ray that this process starts."""
    if variables:
        assignments = " ".join(f"{name}={value}" for name, value in variables.items())
        print(
            f"expertmesh: for commands of Ray and Serve in another shell: export {assignments}",
            flush=True,
        )


def check_start(file: Path, document: Mapping[str, Any], address: str | None) -> None:
    """Exit with status 2 and one line on stderr unless nothing keeps a start of a file.

    ``document`` is the file's. For a start of a Ray of its own this machine is looked at too: Serve
    would wait for ever, say so only in a log, or print a stack. Then checkpoints without kept
    hashes are hashed, because a bar at the terminal is better than a silent start.
    """
    target = target_of(address, os.environ)
    checkpoints = _checkpoints(file, is_needed=target is None)
    _check_document(file, document, reads_files=target is None)
    if target is None:
        _enforce(checks_of_a_start(read_deployment(file), os.environ))
        _keep_hashes(checkpoints)
    else:
        _enforce(_checks_of_a_join(file, document, target))


def check_deploy(file: Path, document: Mapping[str, Any], address: str | None) -> None:
    """Exit as :func:`check_start` does, for a file that is sent to a cluster's dashboard."""
    _checkpoints(file, is_needed=False)
    _check_document(file, document, reads_files=False)
    has_token = dashboard_has_token(dashboard_of(address))
    _enforce([check_token(has_token, token_exposure(os.environ))])


def _checkpoints(file: Path, is_needed: bool) -> Sequence[Stored]:
    """Return the checkpoints of a file; where one is missing, warns or exits."""
    try:
        return checkpoints_of(file)
    except CheckpointMissingError as error:
        # Only a node of the cluster needs it, and this machine need not even be one.
        if is_needed:
            _end(f"{error} (if another machine of a cluster has it: serve run --address=auto)")
        _warn(f"{error}; the cluster looks for it on its nodes")
    except ExpertMeshError as error:
        _end(str(error))
    return ()


def _check_document(file: Path, document: Mapping[str, Any], reads_files: bool) -> None:
    try:
        check_document(document, file, reads_files)
    except ExpertMeshError as error:
        _end(f"{file}: {error}")


def _keep_hashes(checkpoints: Sequence[Stored]) -> None:
    try:
        keep_hashes(checkpoints, Console(stderr=True))
    except ExpertMeshError as error:
        _end(str(error))


def _checks_of_a_join(file: Path, document: Mapping[str, Any], target: Target) -> list[Check]:
    """Check a running cluster; this machine need not have the models of the file."""
    running = look_at(target)
    configs = [config for _, config in parse_deployment(document, file)]
    has_tls = any(config.experts.tls is not None for config in configs)
    return [check_ray(running, ()), *access_checks(has_tls, running, os.environ)]


def _enforce(checks: Sequence[Check]) -> None:
    """End the command at a problem, and warn of what nobody else says in time.

    Ray does not tell of a GPU that gets too full before a process ends by it.
    """
    problem = next((check for check in checks if check.level == "problem"), None)
    if problem is not None:
        _end(f"{problem.name}: {problem.found}. {problem.advice}")
    for check in checks:
        if check.name in (DEVICES, TOKEN, ENCRYPTION) and check.level == "warning":
            _warn(f"{check.name}: {check.found}. {check.advice}")


def _end(message: str) -> NoReturn:
    _warn(message)
    sys.exit(EXIT_BAD_CONFIG)


def _warn(message: str) -> None:
    print(f"expertmesh: {' '.join(message.split())}", file=sys.stderr, flush=True)


attend(sys.argv)
