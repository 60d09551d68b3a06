"""The file of Ray's token: only this user may read it, because it lets run any code in the cluster.

Ray itself would make the file with the rights of the user's umask, usually readable by everybody.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from cluster.errors import ConfigError
from cluster.private_file import exposure
from cluster.tls import ray_is_encrypted

MODE_VARIABLE, TOKEN = "RAY_AUTH_MODE", "token"
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""The variable with which all processes of Ray listen on loopback only, as they do on macOS.

Serve's replicas do not: each listens on all interfaces for other replicas.
"""
_PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"


def token_file(variables: Mapping[str, str]) -> Path | None:
    """Return the file of this user's token, in the places that Ray documents.

    It need not exist. ``None`` if a variable has the token itself.
    """
    if variables.get("RAY_AUTH_TOKEN"):
        return None
    given = variables.get(_PATH_VARIABLE)
    return Path(given) if given else Path.home() / ".ray" / "auth_token"


def user_has_token(variables: Mapping[str, str]) -> bool:
    """Return whether this user has a token of Ray."""
    file = token_file(variables)
    return file is None or file.is_file()


def make_token(variables: Mapping[str, str]) -> None:
    """Make this user's token, unless there is one or Ray is to have none.

    For a start of a Ray of its own, before Ray would make it.
    """
    file = token_file(variables)
    if file is None or file.exists() or not token_is_used(variables) or _PATH_VARIABLE in variables:
        return
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Whole from its first moment: Ray would write another token into an empty file.
    with NamedTemporaryFile("w", dir=file.parent) as made, suppress(FileExistsError):
        made.write(secrets.token_hex(32))
        made.flush()
        os.link(made.name, file)


def token_exposure(variables: Mapping[str, str]) -> str:
    """Return why other users may use the token or Ray's TLS key; empty if they may not.

    The reason ends with what to run.
    """
    file, key = token_file(variables), Path(variables.get("RAY_TLS_SERVER_KEY", ""))
    is_used = file is not None and file.exists() and token_is_used(variables)
    if file and is_used and (reason := exposure(file, stat.S_IRWXG | stat.S_IRWXO)):
        return f"the file of Ray's token, {file}, {reason}"
    if ray_is_encrypted(variables) and key.is_file() and (reason := exposure(key)):
        return f"Ray's TLS key, {key}, {reason}"
    return ""


def require_private_token(variables: Mapping[str, str]) -> None:
    """Raise :class:`ConfigError` if other users may use the token or Ray's TLS key."""
    if reason := token_exposure(variables):
        raise ConfigError(reason)


def token_is_used(variables: Mapping[str, str]) -> bool:
    """Return whether a Ray that a start makes with these variables asks for the token."""
    return variables.get(MODE_VARIABLE, TOKEN).lower() == TOKEN
