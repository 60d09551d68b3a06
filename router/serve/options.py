"""Serve's part of a deployment file: written once, in ``deploy/base.yaml``.

Imports nothing of Ray, so that a command can complete a file before it starts any.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from importlib.resources import files
from typing import Any

import yaml

HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
CALLBACK = "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"
NARROW_PROXIES = "router.serve.listening:narrow_proxies"
"""The callback by which Serve's proxies listen as a deployment file says."""
REPLICA_VARIABLES = (
    "RAY_SERVE_LOG_TO_STDERR",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP",
)
"""What of Serve's variables a replica goes by, whatever its Serve was started with."""


def base_text() -> str:
    """Return ``deploy/base.yaml`` as it is written, with its comments."""
    return (files("deploy") / "base.yaml").read_text(encoding="utf-8")


def base_document() -> dict[str, Any]:
    """Return ``deploy/base.yaml`` as plain data."""
    document: dict[str, Any] = yaml.safe_load(base_text())
    return document


def starter_text() -> str:
    """Return a whole deployment file, of the bundled model, with all that Serve is told."""
    example = (files("deploy") / "cluster.yaml").read_text(encoding="utf-8")
    return base_text() + example[example.index("\napplications:") + 1 :]


def completed(
    document: Mapping[str, Any], *, joins: bool = False, has_haproxy: bool = True
) -> dict[str, Any]:
    """Return a deployment file's document with what it leaves out of Serve's part filled in.

    What the file says stays, key by key. Where Serve ``joins`` a Ray cluster that runs, the host of
    HTTP is left to Serve, which then listens for other machines too. Without ``has_haproxy``
    nothing asks for HAProxy that the file does not ask for. Where an application has keys, gRPC's
    reflection is left off.
    """
    base = base_document()
    if _has_keys(document):
        base["grpc_options"]["enable_reflection"] = False
    if joins:
        del base["http_options"]["host"]
    if not has_haproxy:
        del serve_variables(base)[HAPROXY]
    return _filled_in(base, document)


def _has_keys(document: Mapping[str, Any]) -> bool:
    """Return whether an application of a file, which may still be malformed, has keys."""
    for application in document.get("applications") or ():
        args = application.get("args") if isinstance(application, Mapping) else None
        security = args.get("security") if isinstance(args, Mapping) else None
        if isinstance(security, Mapping) and security.get("keys_file"):
            return True
    return False


def _filled_in(base: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    whole = deepcopy(base)
    for key, value in given.items():
        default = base.get(key)
        if isinstance(default, dict) and value is None:
            continue  # the key has nothing below it
        if isinstance(default, dict) and isinstance(value, Mapping):
            whole[key] = _filled_in(default, value)
        else:
            whole[key] = deepcopy(value)
    return whole


def serve_variables(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the environment variables that a deployment file gives to Serve's controller.

    Proxies and replicas have them from there.
    """
    runtime_env = (document.get("controller_options") or {}).get("runtime_env") or {}
    variables: dict[str, Any] = runtime_env.get("env_vars") or {}
    return variables


def replica_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a replica needs and a builder's ``environment`` does not have.

    A builder has those of Serve's controller. It lacks them where Serve was started without our
    part of the file.
    """
    base = serve_variables(base_document())
    return {name: base[name] for name in REPLICA_VARIABLES if name not in environment}
