"""The TCP ports that a deployment opens on this machine, and who holds one that is taken."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from router.serve.options import HAPROXY, serve_variables

_EVERYWHERE = ""
_VARIABLES = "controller_options.runtime_env.env_vars"
# Serve's own defaults; what is under env_vars overrides them.
_BEHIND_HAPROXY = (
    ("RAY_SERVE_HAPROXY_STATS_PORT", 8404, "HAProxy's statistics"),
    ("RAY_SERVE_HAPROXY_METRICS_PORT", 9101, "HAProxy's metrics"),
    ("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", 8500, "Serve's fallback proxy, HTTP"),
    ("RAY_SERVE_FALLBACK_PROXY_GRPC_PORT", 9500, "Serve's fallback proxy, gRPC"),
)


@dataclass(frozen=True, slots=True)
class Port:
    """A port that a deployment file has opened: what for, and the key that says another."""

    number: int
    host: str
    purpose: str
    key: str


@dataclass(frozen=True, slots=True)
class TakenPort:
    """A port that cannot be opened, and why: who listens on it, as far as this user may see."""

    port: Port
    reason: str


def ports_of(document: Mapping[str, Any]) -> list[Port]:
    """Return the ports of fixed numbers that Serve opens for a deployment file.

    A gateway's own, behind HAProxy, are the next free ones from 30000 and 40000 on.
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
        ports += [
            Port(_number(variables.get(name), default), _EVERYWHERE, what, f"{_VARIABLES}.{name}")
            for name, default, what in _BEHIND_HAPROXY
        ]
    return ports


def _number(value: Any, default: int) -> int:
    """Return a port as the file has it; what is no number is left to Serve to refuse."""
    return int(value) if str(value).isdecimal() else default


def taken_ports(ports: list[Port]) -> list[TakenPort]:
    """Try to open each port for a moment; returns those that cannot be."""
    found = []
    for port in ports:
        with socket.socket() as one:
            # As servers do: connections of the one before that are still closing do not count.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind((port.host, port.number))
            except (OSError, OverflowError) as error:
                found.append(TakenPort(port, _reason(port, error)))
    return found


def _reason(port: Port, error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return f"taken by {_holder(port.number)}"
    if number == errno.EACCES:
        return "not allowed to this user"
    return f"cannot be opened on {port.host or 'all interfaces'} ({error})"


def _holder(number: int) -> str:
    """Return who listens on a port, as far as this user may see."""
    try:
        for one in psutil.net_connections(kind="tcp"):
            listens = one.status == psutil.CONN_LISTEN
            if listens and one.laddr and one.laddr.port == number and one.pid:
                return f"{psutil.Process(one.pid).name()} (pid {one.pid})"
    except psutil.Error:
        pass
    return "another process"
