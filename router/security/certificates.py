"""The certificate that clients see, and the authority of theirs; read again when files change.

``gateway.listen.tls`` of a deployment file names the files. Between nodes it is
:mod:`cluster.tls`, where both ends have certificates of one authority.
"""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from cluster.errors import ConfigError
from cluster.private_file import exposure
from cluster.tls import Followed, Stamp, shake_hands, stamp_of

CERTIFICATE, KEY, AUTHORITY = "certificate", "key", "client_authority"
SECTION = "gateway.listen.tls"


@dataclass(frozen=True, slots=True)
class Certificate:
    """A usable certificate with its chain and key, and the authority of clients' own, if any.

    The texts are PEM. ``context`` is of the side that listens.
    """

    chain: bytes
    key: bytes
    authority: bytes | None
    context: ssl.SSLContext


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Paths of PEM files: certificate with its chain, key, and the authority of clients, if any."""

    certificate: str
    key: str
    authority: str | None = None

    def stamp(self) -> Stamp:
        """Return what changes whenever a file does."""
        return tuple(stamp_of(path) for path in self._paths().values())

    def read(self) -> Certificate:
        """Return what the files have now.

        TLS is 1.2 or later. Raises :class:`ConfigError` with the file's key for a file that cannot
        be used: not PEM, a key that another certificate has, an encrypted key, a certificate that
        is of no use to servers or not of this time, an authority that has ended.
        """
        stamp = self.stamp()
        texts = {name: _read(path, name) for name, path in self._paths().items()}
        if reason := exposure(Path(self.key)):
            raise ConfigError(f"{self.key} {reason}", _at(KEY))
        context = self._context()
        if stamp != self.stamp():
            raise ConfigError("files of TLS change while they are read", SECTION)
        return Certificate(texts[CERTIFICATE], texts[KEY], texts.get(AUTHORITY), context)

    def _paths(self) -> dict[str, str]:
        paths = {CERTIFICATE: self.certificate, KEY: self.key}
        return paths if self.authority is None else paths | {AUTHORITY: self.authority}

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # An encrypted key would make OpenSSL ask the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except OSError as error:
            reason = f"cannot be used: {error}"
            if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
                reason = f"{self.certificate} does not fit its key, {self.key}"
            raise ConfigError(reason, _at(CERTIFICATE)) from None
        self._check_validity(context)
        if self.authority is not None:
            _require_certificates(context, self.authority)
        return context

    def _check_validity(self, server: ssl.SSLContext) -> None:
        """Raise :class:`ConfigError` unless a client that trusts the certificate accepts it."""
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the file has no root
        client.load_verify_locations(self.certificate)
        try:
            shake_hands(server, client)
        except ssl.SSLCertVerificationError as error:
            reason = f"{self.certificate} is refused by TLS: {error.verify_message}"
            raise ConfigError(reason, _at(CERTIFICATE)) from None
        except ssl.SSLError as error:
            raise ConfigError(f"cannot be used: {error}", _at(CERTIFICATE)) from None


class Certificates:
    """The certificate in force: that of its files; safe for several threads.

    Changed files come into use with the next connection. Of files that cannot be used an error is
    logged, and the earlier ones stay.
    """

    def __init__(self, files: CertificateFiles) -> None:
        """Raises :class:`ConfigError` for files that cannot be used."""
        self._followed = Followed(files.stamp, files.read)

    @property
    def problem(self) -> str:
        """Why the files, as they are now, cannot be used; empty else."""
        return self._followed.problem

    def current(self) -> Certificate:
        """Return the certificate in force: the same object until the files change."""
        return self._followed.current()

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return credentials for one port of a gRPC server, which follow the files."""
        shown = self.current()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            current = self.current()
            if current is shown:
                return None
            shown = current
            return _configuration(current)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(shown), fetch, shown.authority is not None
        )


def _configuration(certificate: Certificate) -> grpc.ServerCertificateConfiguration:
    pair = (certificate.key, certificate.chain)
    return grpc.ssl_server_certificate_configuration([pair], certificate.authority)


def _require_certificates(context: ssl.SSLContext, authority: str) -> None:
    """Let a context ask clients for a certificate of an authority."""
    try:
        context.load_verify_locations(authority)
    except OSError as error:
        raise ConfigError(f"cannot be used: {error}", _at(AUTHORITY)) from None
    ends_s = [ssl.cert_time_to_seconds(str(one["notAfter"])) for one in context.get_ca_certs()]
    if not ends_s or max(ends_s) < time.time():
        reason = f"{authority} has no certificate of an authority, or they have expired"
        raise ConfigError(reason, _at(AUTHORITY))
    context.verify_mode = ssl.CERT_REQUIRED


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", _at(name)) from None


def _at(name: str) -> str:
    return f"{SECTION}.{name}"
