"""Ray's token, for a start of a Ray of its own and for the commands of another shell.

A Ray that ``ray.init`` starts asks every client for a token. A client sends its token only where
``RAY_AUTH_MODE`` is ``token`` in its own environment. Ray reads it once, as it is imported: so
``expertmesh serve`` and ``deploy`` set it before. Serve's own commands import nothing of ours, so a
start prints the line that they need.
"""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from router.security.token_file import LOOPBACK, MODE_VARIABLE, TOKEN, user_has_token

DASHBOARD_VARIABLE = "RAY_DASHBOARD_ADDRESS"
DEFAULT_DASHBOARD = "http://localhost:8265"
"""The dashboard that Serve's commands ask, unless they are given another one."""


def token_variable() -> dict[str, str]:
    """Return the variable that another shell needs for a Ray that this process starts.

    Where the user set it, another shell has it, too.
    """
    return {} if MODE_VARIABLE in os.environ else {MODE_VARIABLE: TOKEN}


def loopback_variable() -> dict[str, str]:
    """Return the variable that keeps a Ray of this process to loopback; another shell needs it."""
    return {name: value for name, value in LOOPBACK.items() if name not in os.environ}


def send_token(address: str | None) -> None:
    """Have this process send its user's token to the dashboard of this machine's cluster.

    ``address`` is the command's ``--address``. As with Ray's own commands, a cluster of another
    machine gets the token only where the user has set the mode. To be called before Ray is
    imported.
    """
    if _is_local(dashboard_of(address)) and user_has_token(os.environ):
        os.environ.update(token_variable())


def dashboard_of(address: str | None) -> str:
    """Return the dashboard that a command asks whose ``--address`` this is."""
    return address or os.environ.get(DASHBOARD_VARIABLE) or DEFAULT_DASHBOARD


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def dashboard_variable(dashboard: str) -> dict[str, str]:
    """Return the variable by which Serve's commands find a dashboard at this host and port.

    They find the default one without it; ``dashboard`` is empty where there is none.
    """
    if not dashboard:
        return {}
    url = f"http://{dashboard}"
    if _is_local(url) and urlsplit(url).port == urlsplit(DEFAULT_DASHBOARD).port:
        return {}
    return {DASHBOARD_VARIABLE: url}
