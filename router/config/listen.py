"""The ``gateway.listen`` section of a deployment file: ports, TLS, and limits of connections.

Part of :mod:`router.config.deployment`, which reads the whole of ``args:``.
"""

from __future__ import annotations

from collections import Counter

from pydantic import Field, field_validator, model_validator

from router.section import Section
from router.security.certificates import CertificateFiles

PROBE_HOST = "127.0.0.1"
_HOST = "`127.0.0.1` is only this machine, `0.0.0.0` is every interface."


class ListenTlsConfig(Section):
    """TLS on the ports for HTTP, gRPC and operators.

    Each key is a PEM file at the same path on every node with a gateway. Changed files come into
    use with the next connection, without a restart.
    """

    certificate: str = Field(min_length=1, description="The certificate, with its chain.")
    key: str = Field(min_length=1, description="The private key of that certificate, in clear.")
    client_authority: str | None = Field(
        default=None,
        min_length=1,
        description="The authority that signs clients' certificates. With it, each client needs "
        "one.",
    )

    def files(self) -> CertificateFiles:
        """Return the paths for :mod:`router.security.certificates`."""
        return CertificateFiles(self.certificate, self.key, self.client_authority)


class ListenConfig(Section):
    """Where the gateways listen. Each application needs its own ports."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description=f"The address for clients, by HTTP and gRPC. {_HOST}",
    )
    http_port: int = Field(default=8000, ge=1, le=65_535, description="The port for HTTP.")
    grpc_port: int = Field(default=9000, ge=1, le=65_535, description="The port for gRPC.")
    admin_host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="The address for operators' commands (`expertmesh status`, `scale` and so on).",
    )
    admin_port: int = Field(
        default=9001, ge=1, le=65_535, description="The port for operators' commands, by gRPC."
    )
    health_port: int | None = Field(
        default=None,
        ge=1,
        le=65_535,
        description="A loopback port that answers `GET /-/healthz` in plain HTTP and nothing else, "
        "for a probe that knows no TLS. Without TLS, the HTTP port answers it, too.",
    )
    tls: ListenTlsConfig | None = Field(
        default=None, description="Certificate and key. Without it, ports are in plain text."
    )
    max_connections: int = Field(
        default=4096,
        ge=1,
        le=100_000,
        description="Open connections of one gateway on each of its ports. On the HTTP port, the "
        "one that is idle for longest gives way to a new one.",
    )
    max_connections_per_address: int = Field(
        default=1024,
        ge=1,
        le=100_000,
        description="Open HTTP connections of one client's address. Raise it where a proxy stands "
        "before the gateways.",
    )
    head_timeout_s: float = Field(
        default=10.0,
        gt=0,
        le=300.0,
        description="How long the head of an HTTP request, or a TLS handshake, may take to come.",
    )
    max_head_bytes: int = Field(
        default=65_536, ge=1024, le=1 << 20, description="Largest head of an HTTP request."
    )

    @field_validator("host", "admin_host")
    @classmethod
    def _is_one_address(cls, host: str) -> str:
        if any(sign in host for sign in "[]/ "):
            raise ValueError(f"{host!r} is neither an address nor a name of this machine")
        return host

    @model_validator(mode="after")
    def _ports_differ(self) -> ListenConfig:
        [(port, count)] = Counter(self.ports().values()).most_common(1)
        if count > 1:
            raise ValueError(f"port {port} is given {count} times; each needs its own")
        return self

    def ports(self) -> dict[str, int]:
        """Return the numbers of the ports, by their keys."""
        ports = {
            "http_port": self.http_port,
            "grpc_port": self.grpc_port,
            "admin_port": self.admin_port,
            "health_port": self.health_port,
        }
        return {key: port for key, port in ports.items() if port is not None}

    def hosts(self) -> dict[str, str]:
        """Return the hosts of other machines' requests, by their keys."""
        return {"host": self.host, "admin_host": self.admin_host}

    def host_of(self, key: str) -> str:
        """Return where the port of a key listens."""
        hosts = {"admin_port": self.admin_host, "health_port": PROBE_HOST}
        return hosts.get(key, self.host)
