"""How a client's connections are encrypted: whom it trusts, and the certificate that it shows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

from cluster.errors import ConfigError

AUTHORITY_VARIABLE = "EXPERTMESH_TLS_CA"
CERTIFICATE_VARIABLE = "EXPERTMESH_TLS_CERT"
KEY_VARIABLE = "EXPERTMESH_TLS_KEY"


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM files: the authority of the server's certificate, and a certificate of the client's own.

    Certificate and key are for a server that asks for them. The server's certificate must have the
    name or address that the client asks.
    """

    authority: str
    certificate: str | None = None
    key: str | None = None

    @classmethod
    def of_environment(cls, variables: Mapping[str, str] = os.environ) -> ClientTls | None:
        """Return what ``EXPERTMESH_TLS_CA``, ``_CERT`` and ``_KEY`` name; ``None`` without any.

        Raises :class:`ConfigError` for a certificate or key without an authority.
        """
        names = (AUTHORITY_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE)
        authority, certificate, key = (variables.get(name) or None for name in names)
        if authority is not None:
            return cls(authority, certificate, key)
        if certificate is not None or key is not None:
            raise ConfigError("missing: TLS needs the authority of the server", AUTHORITY_VARIABLE)
        return None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return gRPC's credentials of the files as they are now.

        Raises :class:`ConfigError` for a file that cannot be read, and for half of a pair.
        """
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a client's certificate and its key need each other", "tls")
        return grpc.ssl_channel_credentials(
            _read(self.authority), _read(self.key), _read(self.certificate)
        )


def channel_opener(
    module: ModuleType, tls: ClientTls | None, options: Sequence[tuple[str, Any]]
) -> Callable[[str], Any]:
    """Return the function that opens channels of ``grpc`` or ``grpc.aio`` to an address.

    ``tls`` is by default that of the environment, and without it connections are not encrypted.
    Raises as :meth:`ClientTls.credentials` does.
    """
    tls = ClientTls.of_environment() if tls is None else tls
    if tls is None:
        return partial(module.insecure_channel, options=options)
    return partial(module.secure_channel, credentials=tls.credentials(), options=options)


def _read(path: str | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "tls") from None
