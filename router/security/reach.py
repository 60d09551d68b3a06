"""Where a deployment may listen without keys: on loopback, or where its file says so in words."""

from __future__ import annotations

from ipaddress import ip_address

from cluster.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Return whether nobody reaches a host of a listener but this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def check_reach(host: str, is_protected: bool, where: str) -> None:
    """Raise :class:`ConfigError` for a host that others reach, where nothing asks for a key.

    ``is_protected`` is whether the deployment has keys, or is open on purpose. ``where`` is the key
    of ``host``.
    """
    if is_protected or is_loopback(host):
        return
    raise ConfigError(
        f"given {host!r}, which other machines reach, and no keys: make a key by `expertmesh keys "
        "new NAME --file keys.yaml` and name the file in args.security.keys_file, listen on "
        "127.0.0.1, or write `security: open` into args",
        where,
    )
