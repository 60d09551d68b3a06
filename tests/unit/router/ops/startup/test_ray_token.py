"""Ray's token: on for a Ray that is started, and sent only by commands of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from router.ops.startup import ray_token
from router.ops.startup.ray_token import dashboard_variable, send_token, token_variable

TOKEN = "0123456789abcdef"


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A token of this user, and an environment that says nothing of it."""
    for name in list(os.environ):
        if name.startswith("RAY_AUTH") or name == "RAY_DASHBOARD_ADDRESS":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text(TOKEN)
    monkeypatch.setattr(ray_token.os, "environ", dict(os.environ))
    return file


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_the_users_own_mode_stays(mode: str, token: Path) -> None:
    assert token_variable() == {"RAY_AUTH_MODE": "token"}
    ray_token.os.environ["RAY_AUTH_MODE"] = mode
    assert token_variable() == {}
    send_token(None)
    assert ray_token.os.environ["RAY_AUTH_MODE"] == mode


@pytest.mark.parametrize(
    ("option", "variable", "is_sent"),
    [
        (None, None, True),
        (None, "http://127.0.0.1:8266", True),
        ("http://[::1]:8265", None, True),
        ("http://localhost:1", "http://10.0.0.1:8265", True),
        (None, "http://10.0.0.1:8265", False),
        ("http://head:8265", None, False),
        ("https://head.example", "http://127.0.0.1:8266", False),
        ("", None, True),
    ],
)
def test_only_a_cluster_of_this_machine_gets_the_token_unasked(
    option: str | None, variable: str | None, is_sent: bool, token: Path
) -> None:
    if variable is not None:
        ray_token.os.environ["RAY_DASHBOARD_ADDRESS"] = variable
    send_token(option)
    assert ("RAY_AUTH_MODE" in ray_token.os.environ) == is_sent
    ray_token.os.environ.pop("RAY_AUTH_MODE", None)
    token.unlink()
    send_token(option)
    assert "RAY_AUTH_MODE" not in ray_token.os.environ


@pytest.mark.parametrize(
    ("dashboard", "variables"),
    [
        ("", {}),
        ("127.0.0.1:8265", {}),
        ("localhost:8265", {}),
        ("127.0.0.1:8266", {"RAY_DASHBOARD_ADDRESS": "http://127.0.0.1:8266"}),
        ("10.0.0.1:8265", {"RAY_DASHBOARD_ADDRESS": "http://10.0.0.1:8265"}),
    ],
)
def test_another_shell_is_told_of_a_dashboard_that_it_would_not_find(
    dashboard: str, variables: dict[str, str]
) -> None:
    assert dashboard_variable(dashboard) == variables


_HEADERS = """
import json
from router.ops.startup.ray_token import send_token
send_token(None)
from ray._private.authentication.http_token_authentication import (
    get_auth_headers_if_auth_enabled as headers,
)
print(json.dumps(headers({})))
"""


def test_rays_own_requests_then_have_the_token(token: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HEADERS],
        env=ray_token.os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout).values()) == [f"Bearer {TOKEN}"]
