"""Ray's token, for a ``serve run`` that starts a Ray and for the commands of another shell.

A Ray that ``ray.init`` starts asks every client for a token. A client sends its token only where
its mode is ``token``, and Ray reads the mode from one variable of the client's own environment
(``ray/_private/authentication/http_token_authentication.py``). No file and no cluster can set it.
``serve deploy FILE`` imports this package, which sets the mode for it. ``serve status`` and
``serve shutdown`` import nothing of ours, so ``serve run`` prints the line that they need.
"""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from ray._private.authentication import authentication_token_setup as setup

MODE_VARIABLE, TOKEN = "RAY_AUTH_MODE", "token"
DASHBOARD_VARIABLE = "RAY_DASHBOARD_ADDRESS"
DEFAULT_DASHBOARD = "http://localhost:8265"
"""The dashboard that Serve's commands ask, unless they are given another one."""


def require_token() -> dict[str, str]:
    """Have the Ray that this process starts require the token, unless the user set the mode.

    Ray does the same by itself, and tells the user how to switch the token off. Returns the
    variable that another shell needs then. Where the user set it, another shell has it, too.
    """
    if MODE_VARIABLE in os.environ:
        return {}
    setup._enable_token_auth()
    return {MODE_VARIABLE: TOKEN}


def send_token(address: str | None) -> None:
    """Have this process send its user's token to the dashboard of this machine's cluster.

    ``address`` is the command's ``--address``. As with Ray's own commands, a cluster of another
    machine gets the token only where the user has set the mode.
    """
    if MODE_VARIABLE in os.environ or not _is_local(dashboard_of(address)):
        return
    if setup.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        setup._enable_token_auth()


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
