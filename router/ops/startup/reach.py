"""Refuses a deployment file that would let anybody in or read, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from cluster.errors import ConfigError
from router.config.deployment import parse_deployment
from router.section import models_in, unknown_key
from router.security.keys import read_callers
from router.security.reach import check_listen
from router.serve.options import check_serve_part


def check_document(document: Mapping[str, Any], file: Path, reads_files: bool) -> None:
    """Check Serve's part of ``file``'s document, and hosts, ports, keys and certificates.

    ``reads_files`` is whether the gateways run on this machine, so that their keys and certificates
    must be here. Raises :class:`ConfigError` for keys that Serve does not have (it would ignore
    them), options of its proxies, a host that others reach where nothing asks for a key, a port
    that two applications have, and a file of keys or of TLS that cannot be used.
    """
    _check_keys(document, ServeDeploySchema)
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


def _check_keys(given: Any, section: type[BaseModel], path: str = "") -> None:
    if isinstance(given, list):
        for index, one in enumerate(given):
            _check_keys(one, section, f"{path}[{index}]")
    for key, value in given.items() if isinstance(given, Mapping) else ():
        where = f"{path}.{key}".lstrip(".")
        if key not in section.model_fields:
            raise ConfigError(unknown_key(str(key), section.model_fields), where)
        for inner in models_in(section.model_fields[key].annotation):
            _check_keys(value, inner, where)
