"""Serve's part of a deployment file, which each file in ``deploy/`` has.

Imports nothing of Ray, so that a command can complete a file before it starts any.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from importlib.resources import files
from typing import Any

import yaml

from cluster.errors import ConfigError

NO_PROXIES = "proxy_location: Disabled"
CONTROLLER, GATEWAY = "Controller", "Gateway"
"""The names of deployments; a gateway's goes on by a hyphen and what tells it from its successor.

The controller's name also stands in deployment files."""
REPLICA_VARIABLES = {
    "RAY_SERVE_LOG_TO_STDERR": "0",  # Serve's own lines go to its log files; ours come to stderr
    # One event loop in a replica: a gateway then sees how fast each client reads.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""Serve's variables as each replica needs them, whatever Serve itself was started with."""


def starter_text() -> str:
    """Return a whole deployment file, of the bundled model, with its comments."""
    return (files("deploy") / "cluster.yaml").read_text(encoding="utf-8")


def completed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deployment file's document with what it leaves out of Serve's part filled in.

    What the file says stays, key by key.
    """
    whole: dict[str, Any] = yaml.safe_load(starter_text())
    del whole["applications"]
    return _filled_in(whole, document)


def check_serve_part(document: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` for what Serve's proxies would need, which do not run here.

    Serve itself runs them where a document does not say that it must not.
    """
    http, grpc = document.get("http_options"), document.get("grpc_options")
    if http is not None or grpc is not None:
        section = "grpc_options" if http is None else "http_options"
        listen = _listen_of(http, grpc)
        advice = "leave it out"
        if listen:
            lines = yaml.safe_dump({"listen": listen}, default_flow_style=True)
            advice = (
                f"write instead, under the application's args.gateway: {' '.join(lines.split())}"
            )
        raise ConfigError(
            f"is of Serve's proxies, and the gateways listen by themselves; {advice}", section
        )
    location = document.get("proxy_location")
    if location != "Disabled":
        given = "nothing" if location is None else location
        raise ConfigError(
            f"must be Disabled, because the gateways listen by themselves; got {given}. Write "
            f"`{NO_PROXIES}` at the top of the file.",
            "proxy_location",
        )
    for index, application in enumerate(document.get("applications") or ()):
        prefix = application.get("route_prefix", "/")
        if prefix not in ("/", None):
            raise ConfigError(
                f"must be / or null, because each application has its own ports; got {prefix}",
                f"applications[{index}].route_prefix",
            )


def _listen_of(http: Any, grpc: Any) -> dict[str, Any]:
    """Return what ``gateway.listen`` says in place of options of Serve's proxies."""
    http, grpc = (given if isinstance(given, Mapping) else {} for given in (http, grpc))
    tls = {
        "certificate": http.get("ssl_certfile"),
        "key": http.get("ssl_keyfile"),
        "client_authority": http.get("ssl_ca_certs"),
    }
    found = {
        "host": http.get("host", "0.0.0.0" if http else None),
        "http_port": http.get("port"),
        "grpc_port": grpc.get("port"),
        "tls": {name: path for name, path in tls.items() if path} or None,
    }
    return {name: value for name, value in found.items() if value}


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
