"""Refuses a deployment file that would let anybody in or read, before anything starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from router.config import parse_deployment
from router.ops.doctor.ports import admin_addresses
from router.security.certificates import CERTIFICATE, SECTION, CertificateFiles
from router.security.keys import read_callers
from router.security.reach import check_reach
from router.serve.options import CALLBACK, NARROW_PROXIES, serve_variables

SERVES_HOST = "0.0.0.0"
"""Where Serve listens by a file that says nothing of it."""


def check_document(document: Mapping[str, Any], file: Path, reads_keys: bool) -> None:
    """Check the hosts, keys and certificate of ``file``'s completed document.

    ``reads_keys`` is whether the gateways run on this machine, so that their keys and certificate
    must be here. Raises :class:`ConfigError` for a host that others reach where nothing asks for a
    key, for reflection beside keys, for two applications with one port for operators, for a file of
    keys or of TLS that cannot be used, and for a certificate that proxies would not get.
    """
    http = document.get("http_options") or {}
    host = str(http.get("host", SERVES_HOST))
    _check_certificate(CertificateFiles.of(http), serve_variables(document), reads_keys)
    reflects = (document.get("grpc_options") or {}).get("enable_reflection")
    for name, config in parse_deployment(document, file):
        security = config.security
        check_reach(host, security.is_protected, "http_options.host")
        check_reach(config.gateway.admin_host, security.is_protected, "gateway.admin_host")
        if security.keys_file is None:
            continue
        if reflects:
            raise ConfigError(
                f"given true, must be false: application {name} has keys",
                "grpc_options.enable_reflection",
            )
        if reads_keys:
            read_callers(Path(security.keys_file))
    ports = Counter(port for _, port in admin_addresses(document) if port is not None)
    shared = [port for port, applications in ports.items() if applications > 1]
    if shared:
        raise ConfigError(
            f"{shared[0]} is the port for operators of {ports[shared[0]]} applications, each needs "
            "its own",
            "gateway.admin_port",
        )


def _check_certificate(
    files: CertificateFiles | None, variables: Mapping[str, str], reads_files: bool
) -> None:
    if files is None:
        return
    if variables.get(CALLBACK) != NARROW_PROXIES:
        raise ConfigError(
            f"needs {NARROW_PROXIES} in controller_options.runtime_env.env_vars.{CALLBACK}",
            f"{SECTION}.{CERTIFICATE}",
        )
    if reads_files:
        files.read()
