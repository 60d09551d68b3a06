"""The TCP ports that a deployment opens on this machine, and the process behind a taken port."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from router.config.deployment import IMPORT_PATH, GatewayConfig
from router.config.listen import ListenConfig
from router.gateway.listen.claim import why_taken

_PURPOSES = {
    "http_port": "HTTP",
    "grpc_port": "gRPC",
    "admin_port": "gRPC for operators",
    "health_port": "probes",
}


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


def listens_of(document: Mapping[str, Any]) -> list[ListenConfig]:
    """Return where the gateways of each of our applications listen."""
    return [
        GatewayConfig.model_validate((application.get("args") or {}).get("gateway") or {}).listen
        for application in document.get("applications") or ()
        if application.get("import_path") == IMPORT_PATH
    ]


def ports_of(document: Mapping[str, Any]) -> list[Port]:
    """Return the ports that the gateways of a deployment file open."""
    return [
        Port(number, listen.host_of(key), _PURPOSES[key], f"gateway.listen.{key}")
        for listen in listens_of(document)
        for key, number in listen.ports().items()
    ]


def taken_ports(ports: list[Port]) -> list[TakenPort]:
    """Try to open each port for a moment; return the ports that cannot be opened."""
    reasons = {port: why_taken(port.host, port.number) for port in ports}
    return [TakenPort(port, reason) for port, reason in reasons.items() if reason is not None]
