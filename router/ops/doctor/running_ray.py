"""The Ray cluster that a ``serve run`` would join, and whether it answers.

``ray start`` writes the address of its cluster into a file. A command without an address joins that
cluster. When the cluster is gone, Ray tries for minutes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import psutil

from router.ops.doctor.machine import OutputError, run_python
from router.security.reach import is_loopback
from router.security.token_file import LOOPBACK, MODE_VARIABLE, TOKEN, user_has_token

CONNECT_TIMEOUT_S = 3.0
ASK_TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 1 << 16
ADDRESS_VARIABLE, ADDRESS_OPTION = "RAY_ADDRESS", "--address"
_CLIENT = "ray://"
_ASK = """
import json, sys
import ray
try:
    context = ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
except RuntimeError as error:  # another version, and it says which
    print(json.dumps([str(error), 0, ""]))
else:
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    print(json.dumps(["", num_nodes, context.dashboard_url or ""]))
"""
_NO_TOKEN = "Unauthenticated"
"""What Ray's log says while a client without the token tries to connect."""


@dataclass(frozen=True, slots=True)
class Target:
    """The cluster that a command joins, and the source of its name: an option, a variable, a file.

    ``address`` is empty for the cluster that runs on this machine (``auto``).
    """

    address: str
    named_by: str


@dataclass(frozen=True, slots=True)
class RunningRay:
    """The state of a cluster; ``reason`` says why a command cannot join it, and is empty otherwise.

    The number of its living nodes, and whether it refuses clients without its token, are ``None``
    where they are not known.
    """

    target: Target
    reason: str
    num_nodes: int | None = None
    has_token: bool | None = None


def temp_folder(variables: Mapping[str, str]) -> Path:
    """Return the folder of Ray's sessions and of its address file."""
    base = variables.get("RAY_TMPDIR") or (
        variables.get("TMPDIR") if sys.platform.startswith("linux") else None
    )
    return Path(base or "/tmp") / "ray"


def target_of(given: str | None, variables: Mapping[str, str]) -> Target | None:
    """Return the cluster that a command joins; ``None`` when it starts its own.

    ``given`` is the command's ``--address``. Ray itself follows the same rules.
    """
    if given not in (None, "auto"):
        return None if given == "local" else Target(given, ADDRESS_OPTION)
    named = variables.get(ADDRESS_VARIABLE) or ""
    if named and named != "auto":
        return None if named == "local" else Target(named, ADDRESS_VARIABLE)
    file = temp_folder(variables) / "ray_current_cluster"
    try:
        address = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        address = ""
    if address:
        return Target(address, str(file))
    is_asked_for = given == "auto" or named == "auto"
    return Target("", ADDRESS_OPTION if given else ADDRESS_VARIABLE) if is_asked_for else None


def is_stale(target: Target) -> bool:
    """Return whether Ray's own file names a cluster that has ended: nothing of Ray runs here."""
    return target.named_by not in (ADDRESS_OPTION, ADDRESS_VARIABLE) and not raylets()


def look_at(target: Target) -> RunningRay:
    """Try to join a cluster as a start does; returns its nodes, and whether it has a token.

    Takes at most :data:`CONNECT_TIMEOUT_S` plus twice :data:`ASK_TIMEOUT_S`.
    """
    if not target.address:
        return RunningRay(target, "" if raylets() else "is not there: no Ray runs here")
    host, _, port = target.address.removeprefix(_CLIENT).rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S):
            pass
    except ValueError:
        return RunningRay(target, "is no address of the form host:port")
    except OSError as error:
        return RunningRay(target, f"does not answer ({error.strerror or error})")
    if target.address.startswith(_CLIENT):
        return RunningRay(target, "")
    return _ask(target)


def _ask(target: Target) -> RunningRay:
    variables = _variables(target)
    try:
        error, num_nodes, dashboard = run_python(
            _ASK, target.address, timeout_s=ASK_TIMEOUT_S, variables=variables
        )
    except (subprocess.TimeoutExpired, OutputError) as failed:
        if _NO_TOKEN in str(failed.stderr):
            return RunningRay(target, "asks for Ray's token, and this user's is another or none")
        if isinstance(failed, OutputError):
            return RunningRay(target, f"does not answer as a Ray does ({failed!s:.300})")
        return RunningRay(target, f"answers nothing within {ASK_TIMEOUT_S:.0f} s")
    if error:
        return RunningRay(target, f"cannot be joined: {' '.join(error.split())}")
    if variables.get(MODE_VARIABLE, "").lower() != TOKEN:
        return RunningRay(target, "", num_nodes, has_token=False)
    if dashboard:
        asks = dashboard_has_token(f"http://{dashboard}")
    else:
        asks = _refuses_strangers(target, variables)
    return RunningRay(target, "", num_nodes, asks)


def _refuses_strangers(target: Target, variables: Mapping[str, str]) -> bool | None:
    """Try to join a cluster without its token."""
    without = {**variables, MODE_VARIABLE: "disabled"}
    try:
        run_python(_ASK, target.address, timeout_s=ASK_TIMEOUT_S, variables=without)
    except (subprocess.TimeoutExpired, OutputError) as failed:
        return True if _NO_TOKEN in str(failed.stderr) else None
    return False


def _variables(target: Target) -> dict[str, str]:
    """Return the environment of a client: a cluster that was found, not named, gets the token."""
    variables = {**os.environ, **loopback_of(target.address)}
    is_named = target.named_by in (ADDRESS_OPTION, ADDRESS_VARIABLE)
    if not is_named and user_has_token(variables):
        variables.setdefault(MODE_VARIABLE, TOKEN)
    return variables


def dashboard_has_token(url: str) -> bool | None:
    """Return whether a cluster asks for a token; ``url`` is that of its dashboard.

    ``None`` if it is not known: a command that cannot reach the dashboard says so itself.
    """
    try:
        with urlopen(
            f"{url.rstrip('/')}/api/authentication_mode", timeout=CONNECT_TIMEOUT_S
        ) as answer:
            told = json.loads(answer.read(MAX_ANSWER_BYTES))
        return bool(told["authentication_mode"] != "disabled")
    except (OSError, ValueError, LookupError, TypeError, HTTPException):
        return None


def loopback_of(address: str) -> Mapping[str, str]:
    """Return the variable that a process needs to join a Ray that keeps to loopback, if it does.

    ``address`` names one of this machine's, ``auto`` any.
    """
    port = "" if address == "auto" else address.rpartition(":")[2]
    hosts = []
    for pid in raylets():
        with suppress(psutil.Error):
            words = psutil.Process(pid).cmdline()
            flags = dict(word.split("=", 1) for word in words if "=" in word)
            if flags.get("--gcs-address", "").endswith(port):
                hosts.append(flags.get("--node_ip_address", ""))
    return LOOPBACK if hosts and all(map(is_loopback, hosts)) else {}


def raylets() -> list[int]:
    """Return the pids of Ray's node processes on this machine, as far as this user may see."""
    processes = psutil.process_iter(["name"])
    return sorted(process.pid for process in processes if process.info["name"] == "raylet")
