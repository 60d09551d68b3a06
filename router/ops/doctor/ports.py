"""The TCP ports that a deployment opens on this machine, and the process behind a taken port."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from router.config import IMPORT_PATH, GatewayConfig
from router.serve.options import HAPROXY, serve_variables

_EVERYWHERE, _LOOPBACK = "", "127.0.0.1"
_VARIABLES = "controller_options.runtime_env.env_vars"
_STATISTICS = "RAY_SERVE_HAPROXY_STATS_PORT"
_METRICS = "RAY_SERVE_HAPROXY_METRICS_PORT"
# The default ports of Serve; the variables under env_vars override them.
_BEHIND_HAPROXY = (
    (_STATISTICS, 8404, "HAProxy's statistics"),
    (_METRICS, 9101, "HAProxy's metrics"),
    ("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", 8500, "Serve's fallback proxy, HTTP"),
    ("RAY_SERVE_FALLBACK_PROXY_GRPC_PORT", 9500, "Serve's fallback proxy, gRPC"),
)


@dataclass(frozen=True, slots=True)
class Port:
    """A port that a deployment file opens: its purpose, and the key that sets its number."""

    number: int
    host: str
    purpose: str
    key: str


@dataclass(frozen=True, slots=True)
class TakenPort:
    """A port that cannot be opened, and the reason: the process that listens, if visible."""

    port: Port
    reason: str


def ports_of(document: Mapping[str, Any]) -> list[Port]:
    """Return the fixed ports that Serve opens for a deployment file.

    The gateways behind HAProxy are not among them: they take free ports from 30000 and 40000 on.
    """
    http, grpc = document.get("http_options") or {}, document.get("grpc_options") or {}
    variables = serve_variables(document)
    host = str(http.get("host", "127.0.0.1"))
    host = _EVERYWHERE if host in ("0.0.0.0", "::") else host
    ports = [
        Port(_number(http.get("port"), 8000), host, "HTTP", "http_options.port"),
        Port(_number(grpc.get("port"), 9000), host, "gRPC", "grpc_options.port"),
    ]
    if variables.get(HAPROXY) == "1":
        for name, default, purpose in _BEHIND_HAPROXY:
            number = _number(variables.get(name), default)
            of_machine = _LOOPBACK if name in (_STATISTICS, _METRICS) else host
            ports.append(Port(number, of_machine, purpose, f"{_VARIABLES}.{name}"))
    ports += [
        Port(port, listens, "gRPC for operators", f"applications[{index}].args.gateway.admin_port")
        for index, (listens, port) in enumerate(admin_addresses(document))
        if port is not None
    ]
    return ports


def admin_addresses(document: Mapping[str, Any]) -> list[tuple[str, int | None]]:
    """Return where the gateways of each application answer operators; the port may be off."""
    after = _number((document.get("grpc_options") or {}).get("port"), 9000) + 1
    gateways = [
        GatewayConfig.model_validate((application.get("args") or {}).get("gateway") or {})
        for application in document.get("applications") or ()
        if application.get("import_path") == IMPORT_PATH
    ]
    return [
        (gateway.admin_host, gateway.admin_port or (after if after > 1 else None))
        for gateway in gateways
    ]


def _number(value: Any, default: int) -> int:
    """Return the port in the file, else the default; Serve itself refuses another kind of value."""
    return int(value) if str(value).isdecimal() else default


def taken_ports(ports: list[Port]) -> list[TakenPort]:
    """Try to open each port for a moment; return the ports that cannot be opened."""
    taken = []
    for port in ports:
        with socket.socket() as trial:
            # As servers do: a former server's connections that still close do not hold the port.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((port.host, port.number))
            except (OSError, OverflowError) as error:
                taken.append(TakenPort(port, _reason(port, error)))
    return taken


def _reason(port: Port, error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return f"taken by {_holder(port.number)}"
    if number == errno.EACCES:
        return "not allowed to this user"
    return f"cannot be opened on {port.host or 'all interfaces'} ({error})"


def _holder(number: int) -> str:
    """Return the name and pid of the process that listens on a port, if this user may see it."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.pid
            if listens and connection.laddr and connection.laddr.port == number:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another process"
