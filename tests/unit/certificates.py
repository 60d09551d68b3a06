"""Certificates of an authority of a test's own."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme

from cluster.tls import TlsFiles


@dataclass
class Authority:
    """Certificates of one authority."""

    files: TlsFiles
    server: ssl.SSLContext
    client: ssl.SSLContext


def new_authority(folder: Path) -> Authority:
    """Write a node's certificate of a new authority into a new folder."""
    folder.mkdir()
    ca = trustme.CA()
    node = ca.issue_cert("node.example")
    ca.cert_pem.write_to_path(folder / "ca.pem")
    node.private_key_pem.write_to_path(folder / "key.pem")
    for i, pem in enumerate(node.cert_chain_pems):
        pem.write_to_path(folder / "cert.pem", append=i > 0)
    files = TlsFiles(*(str(folder / name) for name in ("cert.pem", "key.pem", "ca.pem")))
    return Authority(files, files.server_context(), files.client_context())
