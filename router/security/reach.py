"""Where a deployment may listen without keys: on loopback, or if its file says `security: open`."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address

from cluster.errors import ConfigError
from router.security.config import SecurityConfig


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a listener's host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def check_listen(hosts: Mapping[str, str], security: SecurityConfig, where: str) -> None:
    """Raise :class:`ConfigError` for a host that others reach, where nothing asks for a key.

    ``hosts`` are by their keys in the section ``where``.
    """
    for key, host in hosts.items():
        if security.is_protected or is_loopback(host):
            continue
        raise ConfigError(
            f"must be an address of this machine if there are no keys; got {host!r}. Make a key by "
            "`expertmesh keys new NAME --file keys.yaml` and name the file in "
            "args.security.keys_file, listen on 127.0.0.1, or write `security: open` into args.",
            f"{where}.{key}",
        )
