"""Refuses a deployment file that would let anybody in or read, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from router.config.deployment import parse_deployment
from router.security.keys import read_callers
from router.security.reach import check_listen
from router.serve.options import check_serve_part


def check_document(document: Mapping[str, Any], file: Path, reads_files: bool) -> None:
    """Check Serve's part of ``file``'s document, and hosts, ports, keys and certificates.

    ``reads_files`` is whether the gateways run on this machine, so that their keys and certificates
    must be here. Raises :class:`ConfigError` for options of Serve's proxies, a host that others
    reach where nothing asks for a key, a port that two applications have, and a file of keys or of
    TLS that cannot be used.
    """
    check_serve_part(document)
    owners: dict[int, str] = {}
    for name, config in parse_deployment(document, file):
        listen, security = config.gateway.listen, config.security
        check_listen(listen.hosts(), security, "gateway.listen")
        for key, port in listen.ports().items():
            if port in owners:
                raise ConfigError(
                    f"must be another port for each application; got {port} for {owners[port]} "
                    f"and {name}",
                    f"gateway.listen.{key}",
                )
            owners[port] = name
        if reads_files and listen.tls is not None:
            listen.tls.files().read()
        if reads_files and security.keys_file is not None:
            read_callers(Path(security.keys_file))
