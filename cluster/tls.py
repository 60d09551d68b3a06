"""TLS of streams between hosts: both ends need a certificate of the configured authority."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files, equal on every node: the node's certificate and key, the authority."""

    certificate: str
    key: str
    authority: str

    def server_context(self, where: str = "experts.tls") -> ssl.SSLContext:
        """Return the TLS context of an actor.

        Raises :class:`ConfigError` for an unusable file; its field is the file's key in ``where``.
        """
        return self._context(ssl.PROTOCOL_TLS_SERVER, where)

    def client_context(self) -> ssl.SSLContext:
        """Return the TLS context of a router; see :meth:`server_context`."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT, "experts.tls")

    def _context(self, protocol: int, where: str) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # Nodes come and go and have addresses alone, so their certificates need no host names.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        for name in ("certificate", "key", "authority"):
            path = getattr(self, name)
            if not Path(path).is_file():
                raise ConfigError(f"no such file: {path}", f"{where}.{name}")
        try:
            context.load_verify_locations(self.authority)
        except OSError as error:
            raise ConfigError(f"cannot be used: {error}", f"{where}.authority") from None
        try:
            # An encrypted key would make OpenSSL ask the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except OSError as error:
            raise ConfigError(f"cannot be used: {error}", f"{where}.certificate") from None
        return context
