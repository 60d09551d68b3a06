"""Ray's token: on for a Ray that is started, and sent by commands of this machine alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from router.ops.startup import ray_token
from router.ops.startup.ray_token import dashboard_variable, require_token, send_token

TOKEN = "0123456789abcdef"


class FakeRay:
    """Stands in for Ray's setup of the token; has a token or not."""

    def __init__(self, has_token: bool) -> None:
        self.has = has_token
        self.enabled = 0
        self.AuthenticationTokenLoader = self

    def instance(self) -> FakeRay:
        return self

    def has_token(self, ignore_auth_mode: bool) -> bool:
        assert ignore_auth_mode
        return self.has

    def _enable_token_auth(self) -> None:
        self.enabled += 1


@pytest.fixture
def ray_setup(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Ray with a token, and an environment that says nothing of it."""
    fake = FakeRay(True)
    monkeypatch.setattr(ray_token, "setup", fake)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_DASHBOARD_ADDRESS", raising=False)
    return fake


def test_a_ray_that_is_started_requires_the_token(ray_setup: FakeRay) -> None:
    assert require_token() == {"RAY_AUTH_MODE": "token"}
    assert ray_setup.enabled == 1


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_the_users_own_mode_stays(
    mode: str, ray_setup: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert require_token() == {}
    send_token(None)
    assert (ray_setup.enabled, os.environ["RAY_AUTH_MODE"]) == (0, mode)


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
    option: str | None,
    variable: str | None,
    is_sent: bool,
    ray_setup: FakeRay,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable is not None:
        monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", variable)
    send_token(option)
    assert ray_setup.enabled == is_sent


def test_without_a_token_nothing_is_sent(ray_setup: FakeRay) -> None:
    ray_setup.has = False
    send_token(None)
    assert ray_setup.enabled == 0


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
from ray._private.authentication.http_token_authentication import (
    get_auth_headers_if_auth_enabled as headers,
)
from router.ops.startup.ray_token import send_token
before = headers({})
send_token(None)
print(json.dumps([before, headers({})]))
"""


def test_rays_own_requests_then_have_the_token(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", _HEADERS],
        env={**kept, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    assert before == {}
    assert list(after.values()) == [f"Bearer {TOKEN}"]
