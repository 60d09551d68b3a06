"""The Ray cluster that a ``serve run`` would join, and whether it answers.

``ray start`` writes the address of its cluster into a file. A command without an address joins that
cluster. When the cluster is gone, Ray tries for minutes; when it has another version, Ray prints a
stack.
"""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from router.ops.doctor.machine import run_python

CONNECT_TIMEOUT_S = 3.0
ASK_TIMEOUT_S = 15.0
MAX_ANSWER_BYTES = 16 << 20
ADDRESS_VARIABLE, ADDRESS_OPTION = "RAY_ADDRESS", "--address"
_CLIENT = "ray://"
_ALL_NODES = "/api/v0/nodes?limit=1000&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
# First without a token: a cluster that answers then asks nobody for one. Ray's metadata of a
# cluster has the versions that started it; a driver compares them with its own. A cluster that was
# found, not named, gets this user's token without a setting.
_ASK = """
import json, os, sys
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private.authentication import authentication_token_setup
from ray._raylet import Config, GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import AuthenticationError
mode = os.environ.get("RAY_AUTH_MODE")
os.environ["RAY_AUTH_MODE"] = "disabled"
Config.initialize("")
try:
    get_cluster_metadata(GcsClient(address=sys.argv[1]))
    has_token = False
except AuthenticationError:
    has_token = True
del os.environ["RAY_AUTH_MODE"]
if mode is not None:
    os.environ["RAY_AUTH_MODE"] = mode
Config.initialize("")
if sys.argv[2] == "found":
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
client = GcsClient(address=sys.argv[1])
metadata = get_cluster_metadata(client)
nodes = [n for n in client.get_all_node_info().values() if n.state == GcsNodeInfo.ALIVE]
print(json.dumps([metadata["ray_version"], metadata["python_version"], len(nodes), has_token]))
"""


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

    ``ray_version`` and ``python_version`` are empty where the cluster did not report them, the
    number of its living nodes and whether it refuses clients without its token are ``None``.
    """

    target: Target
    reason: str
    ray_version: str = ""
    python_version: str = ""
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


def look_at(target: Target) -> RunningRay:
    """Ask a cluster for its versions, its nodes and its token.

    Takes at most :data:`CONNECT_TIMEOUT_S` plus :data:`ASK_TIMEOUT_S`.
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
    origin = "named" if target.named_by in (ADDRESS_OPTION, ADDRESS_VARIABLE) else "found"
    try:
        ray_version, python_version, num_nodes, has_token = run_python(
            _ASK, target.address, origin, timeout_s=ASK_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return RunningRay(target, f"answers nothing within {ASK_TIMEOUT_S:.0f} s")
    except ValueError as error:
        reason = f"does not answer as a Ray of this version does ({error!s:.300})"
        return RunningRay(target, reason)
    found = judged(target, ray_version, python_version)
    return replace(found, num_nodes=num_nodes, has_token=has_token)


def look_at_dashboard(url: str) -> tuple[int | None, bool | None]:
    """Return the number of a cluster's nodes, and whether it asks for a token.

    ``url`` is that of its dashboard. Each is ``None`` where it is not known: a command that cannot
    reach the dashboard says so itself. A cluster with a token tells its nodes to nobody.
    """
    try:
        mode = _json_of(f"{url.rstrip('/')}/api/authentication_mode")["authentication_mode"]
        if mode != "disabled":
            return None, True
        return int(_json_of(url.rstrip("/") + _ALL_NODES)["data"]["result"]["total"]), False
    except (OSError, ValueError, LookupError, TypeError, HTTPException):
        return None, None


def _json_of(url: str) -> Any:
    with urlopen(url, timeout=CONNECT_TIMEOUT_S) as answer:
        return json.loads(answer.read(MAX_ANSWER_BYTES))


def judged(target: Target, ray_version: str, python_version: str) -> RunningRay:
    """Compare a cluster's versions with the versions of this process, as a driver of Ray does."""
    ours = (version("ray"), platform.python_version())
    reason = ""
    if (ray_version, python_version) != ours:
        reason = (
            f"is Ray {ray_version} on Python {python_version}; here is Ray {ours[0]} on Python "
            f"{ours[1]}"
        )
    return RunningRay(target, reason, ray_version, python_version)


def raylets() -> list[int]:
    """Return the pids of Ray's node processes on this machine, as far as this user may see."""
    processes = psutil.process_iter(["name"])
    return sorted(process.pid for process in processes if process.info["name"] == "raylet")
