"""Who can use a cluster's Ray, and who can read what its nodes send."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.shipped import free_ports
from router.ops.doctor.access import check_encryption, check_token
from router.ops.doctor.probe import access_checks
from router.ops.doctor.running_ray import RunningRay, Target, look_at_dashboard
from router.security.token_file import LOOPBACK
from tests.unit.web_server import Answer, web_server

LOCAL, LAN = ["127.0.0.1"], ["127.0.0.1", "10.1.2.3"]


@pytest.mark.parametrize(
    ("addresses", "has_token", "exposed", "level", "words"),
    [
        (LOCAL, True, "", "ok", "asks for it"),
        (LAN, True, "", "ok", "asks for it"),
        (None, True, "", "ok", "asks for it"),
        (LAN, True, "T may be used by other users; run: chmod 600 T", "problem", "T may be used"),
        (LOCAL, False, "", "warning", "every user of this machine may run code as you"),
        (LAN, False, "", "problem", "listens on 10.1.2.3 and asks nobody for a token"),
        (LAN, False, "T may be used", "problem", "asks nobody"),
        (None, False, "", "problem", "Ray listens and asks nobody"),
        ([], False, "", "problem", "Ray listens and asks nobody"),
        (None, None, "", "warning", "not known"),
    ],
)
def test_a_ray_without_a_token_is_never_ok_and_refused_beyond_loopback(
    addresses: list[str] | None, has_token: bool | None, exposed: str, level: str, words: str
) -> None:
    check = check_token(addresses, has_token, exposed)
    assert (check.name, check.level) == ("token", level)
    assert words in check.found
    assert ("RAY_AUTH_MODE=token" in check.advice) == (has_token is False)
    assert ("chmod" in check.advice) == (has_token is True and bool(exposed))


@pytest.mark.parametrize(
    ("num_nodes", "has_ray_tls", "has_tls", "level", "words"),
    [
        (1, False, False, "ok", "not asked for"),
        (0, False, False, "ok", "not asked for"),
        (1, True, True, "ok", "Ray's calls, streams"),
        (3, True, True, "ok", "Ray's calls, streams"),
        (1, False, True, "problem", "experts.tls needs RAY_USE_TLS=1"),
        (3, False, True, "problem", "experts.tls needs RAY_USE_TLS=1"),
        (3, False, False, "warning", "3 nodes send each other prompts and tokens in plain text"),
        (3, True, False, "warning", "streams and links between nodes are not"),
        (1, True, False, "ok", "not asked for"),
    ],
)
def test_streams_and_rays_calls_are_encrypted_together(
    num_nodes: int, has_ray_tls: bool, has_tls: bool, level: str, words: str
) -> None:
    check = check_encryption(num_nodes, has_ray_tls, has_tls)
    assert (check.name, check.level) == ("encryption", level)
    assert words in check.found
    assert bool(check.advice) == (level != "ok")


@pytest.mark.parametrize(
    ("variables", "level"),
    [
        ({}, "ok"),  # a start turns the token on
        ({"RAY_AUTH_MODE": "token"}, "ok"),
        ({"RAY_AUTH_MODE": "disabled"}, "problem"),
        ({"RAY_AUTH_MODE": "disabled", **LOOPBACK}, "warning"),
    ],
)
def test_a_ray_of_a_starts_own_is_judged_by_its_variables(
    variables: dict[str, str], level: str
) -> None:
    token, encryption = access_checks(False, None, {"RAY_AUTH_TOKEN": "x", **variables})
    assert (token.level, encryption.level) == (level, "ok")


@pytest.mark.parametrize("variables", [{}, {"RAY_AUTH_MODE": "token"}])
@pytest.mark.parametrize(
    ("addresses", "has_token", "level"),
    [(LAN, False, "problem"), (LAN, True, "ok"), (LOCAL, False, "warning")],
)
def test_a_running_cluster_is_judged_by_what_it_says_and_not_by_the_environment(
    addresses: list[str], has_token: bool, level: str, variables: dict[str, str]
) -> None:
    running = RunningRay(Target("h:1", "F"), "", addresses=addresses, has_token=has_token)
    variables = {"RAY_AUTH_TOKEN": "x", **variables}
    assert access_checks(False, running, variables)[0].level == level


def _of_mode(mode: str, addresses: list[str]) -> Answer:
    def answer(path: str, _: bytes) -> tuple[int, Any]:
        if path == "/api/authentication_mode":
            return 200, {"authentication_mode": mode}
        if mode == "token":
            return 401, "Unauthorized"
        assert path.startswith("/api/v0/nodes?")
        nodes = [{"node_ip": address, "state": "ALIVE"} for address in addresses]
        return 200, {"result": True, "data": {"result": {"total": len(nodes), "result": nodes}}}

    return answer


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (_of_mode("disabled", LOCAL), (LOCAL, False)),
        (_of_mode("disabled", LAN), (LAN, False)),
        (_of_mode("token", LAN), (None, True)),
        (lambda *_: (404, "no such page"), (None, None)),
        (lambda *_: (200, b"<html>"), (None, None)),
        (lambda *_: (200, {"authentication_mode": "disabled"}), (None, None)),
        (lambda *_: (200, []), (None, None)),
    ],
)
def test_a_dashboard_tells_its_mode_and_its_nodes(
    answer: Answer, found: tuple[list[str] | None, bool | None]
) -> None:
    with web_server(answer) as port:
        assert look_at_dashboard(f"http://127.0.0.1:{port}/") == found


def test_a_dashboard_that_is_not_there_tells_nothing() -> None:
    [nobody] = free_ports(1)
    assert look_at_dashboard(f"http://127.0.0.1:{nobody}") == (None, None)
    assert look_at_dashboard("nonsense") == (None, None)
