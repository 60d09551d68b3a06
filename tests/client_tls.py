"""A server's certificate and a client's, of one authority, in files."""

from __future__ import annotations

import os
import ssl
from datetime import datetime
from pathlib import Path

import trustme

from router.client import ClientTls
from router.security.certificates import CertificateFiles

NAMES = ("127.0.0.1", "localhost", "::1")


class Pair:
    """The files of an authority, of a server's certificate and of a client's."""

    def __init__(self, folder: Path, asks_clients: bool = False) -> None:
        folder.mkdir()
        self.ca = trustme.CA()
        self.authority, self.server, self.key, self.client, self.client_key = (
            str(folder / f"{name}.pem") for name in ("ca", "server", "key", "client", "client-key")
        )
        self.asks_clients = asks_clients
        self.ca.cert_pem.write_to_path(self.authority)
        self.serial = self.replace()
        issued = self.ca.issue_cert("client.example")
        issued.cert_chain_pems[0].write_to_path(self.client)
        issued.private_key_pem.write_to_path(self.client_key)

    def replace(self, ends_at: datetime | None = None, ca: trustme.CA | None = None) -> int:
        """Write a new certificate of the server, key first; returns its number."""
        issued = (ca or self.ca).issue_cert(*NAMES, not_after=ends_at)
        for path, pem in (
            (self.key, issued.private_key_pem),
            (self.server, issued.cert_chain_pems[0]),
        ):
            pem.write_to_path(f"{path}.new")
            os.replace(f"{path}.new", path)
        return number_of(Path(self.server).read_text())

    @property
    def files(self) -> CertificateFiles:
        return CertificateFiles(
            self.server, self.key, self.authority if self.asks_clients else None
        )

    def listen(self) -> dict[str, str]:
        """Return the deployment file's ``gateway.listen.tls``, which names the files."""
        files = self.files
        told = {"certificate": files.certificate, "key": files.key}
        return told if files.authority is None else told | {"client_authority": files.authority}

    def tls(self, has_certificate: bool = True) -> ClientTls:
        """Return what a client is given that trusts the authority."""
        if not has_certificate:
            return ClientTls(self.authority)
        return ClientTls(self.authority, self.client, self.client_key)

    def context(self, has_certificate: bool = True) -> ssl.SSLContext:
        """Return :meth:`tls` as the standard library has it."""
        context = ssl.create_default_context(cafile=self.authority)
        if has_certificate:
            context.load_cert_chain(self.client, self.client_key)
        return context


def number_of(pem: str) -> int:
    """Return the serial number of a certificate."""
    from cryptography import x509

    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def shown_number(host: str, port: int, context: ssl.SSLContext) -> int:
    """Return the serial number of the certificate that a server shows on a new connection."""
    import socket

    with (
        socket.create_connection((host, port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=host) as connection,
    ):
        certificate = connection.getpeercert()
        assert certificate is not None
        return int(str(certificate["serialNumber"]), 16)
