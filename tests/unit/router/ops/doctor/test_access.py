"""Who can use a cluster's Ray, and who can read what its nodes send."""

from __future__ import annotations

import pytest

from benchmarks.shipped import free_ports
from router.ops.doctor.access import check_encryption, check_token
from router.ops.doctor.probe import access_checks
from router.ops.doctor.running_ray import RunningRay, Target, dashboard_has_token
from router.security.token_file import LOOPBACK
from tests.unit.web_server import Answer, web_server


@pytest.mark.parametrize("exposed", ["", "T may be used by other users; run: chmod 600 T"])
@pytest.mark.parametrize("has_token", [True, False, None])
def test_only_a_private_token_that_ray_asks_for_is_ok(has_token: bool | None, exposed: str) -> None:
    check = check_token(has_token, exposed)
    refused = has_token is False or exposed
    level = "problem" if refused else "ok" if has_token else "warning"
    assert (check.name, check.level) == ("token", level)
    words = {True: "asks for it", False: "may run any code as you", None: "not known"}[has_token]
    assert (words if has_token is False or not exposed else "T may be used") in check.found
    assert ("RAY_AUTH_MODE=token" in check.advice) == (has_token is False)
    assert ("chmod 600 T" in check.advice) == (has_token is not False and bool(exposed))


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
        ({"RAY_AUTH_MODE": "disabled", **LOOPBACK}, "problem"),
    ],
)
def test_a_ray_of_a_starts_own_is_judged_by_its_variables(
    variables: dict[str, str], level: str
) -> None:
    token, encryption = access_checks(False, None, {"RAY_AUTH_TOKEN": "x", **variables})
    assert (token.level, encryption.level) == (level, "ok")


@pytest.mark.parametrize("variables", [{}, {"RAY_AUTH_MODE": "token"}])
@pytest.mark.parametrize(("has_token", "level"), [(False, "problem"), (True, "ok")])
def test_a_running_cluster_is_judged_by_what_it_says_and_not_by_the_environment(
    has_token: bool, level: str, variables: dict[str, str]
) -> None:
    running = RunningRay(Target("h:1", "F"), "", num_nodes=1, has_token=has_token)
    variables = {"RAY_AUTH_TOKEN": "x", **variables}
    assert access_checks(False, running, variables)[0].level == level


def _of_mode(mode: str) -> Answer:
    return lambda path, _: (
        path == "/api/authentication_mode" and 200,
        {"authentication_mode": mode},
    )


@pytest.mark.parametrize(
    ("answer", "has_token"),
    [
        (_of_mode("disabled"), False),
        (_of_mode("token"), True),
        (lambda *_: (404, "no such page"), None),
        (lambda *_: (200, b"<html>"), None),
        (lambda *_: (200, []), None),
    ],
)
def test_a_dashboard_tells_whether_its_cluster_has_a_token(
    answer: Answer, has_token: bool | None
) -> None:
    with web_server(answer) as port:
        assert dashboard_has_token(f"http://127.0.0.1:{port}/") is has_token


def test_a_dashboard_that_is_not_there_tells_nothing() -> None:
    [nobody] = free_ports(1)
    assert dashboard_has_token(f"http://127.0.0.1:{nobody}") is None
    assert dashboard_has_token("nonsense") is None
