"""Certificates of an authority of a test's own."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import trustme

from cluster.tls import TlsFiles


@dataclass
class Authority:
    """Certificates of one authority, in files."""

    ca: trustme.CA
    files: TlsFiles
    server: ssl.SSLContext
    client: ssl.SSLContext

    def replace(self, ends_at: datetime | None = None) -> None:
        """Replace all files by those of another authority; its certificate ends at that time."""
        self.ca = trustme.CA()
        write(self.files, self.ca, ends_at)


def write(files: TlsFiles, ca: trustme.CA, ends_at: datetime | None = None) -> None:
    """Write a node's new certificate of an authority."""
    node = ca.issue_cert("node.example", not_after=ends_at)
    ca.cert_pem.write_to_path(files.authority)
    node.private_key_pem.write_to_path(files.key)
    for i, pem in enumerate(node.cert_chain_pems):
        pem.write_to_path(files.certificate, append=i > 0)


def new_authority(folder: Path, ca: trustme.CA | None = None) -> Authority:
    """Write a node's certificate of an authority, by default a new one, into a new folder."""
    folder.mkdir()
    ca = trustme.CA() if ca is None else ca
    files = TlsFiles(*(str(folder / name) for name in ("cert.pem", "key.pem", "ca.pem")))
    write(files, ca)
    return Authority(ca, files, files.server_context(), files.client_context())
