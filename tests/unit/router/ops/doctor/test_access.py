"""Who can use a cluster's Ray, and who can read what its nodes send."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.shipped import free_ports
from router.ops.doctor.access import check_encryption, check_token
from router.ops.doctor.probe import access_checks, is_open
from router.ops.doctor.running_ray import RunningRay, Target, look_at_dashboard
from tests.unit.web_server import Answer, web_server


@pytest.mark.parametrize(
    ("num_nodes", "is_open", "has_token", "level", "words"),
    [
        (1, False, False, "ok", "one machine"),
        (1, False, True, "ok", "one machine"),
        (None, False, None, "ok", "one machine"),
        (2, False, True, "ok", "asks for it"),
        (2, False, False, "problem", "2 nodes, and Ray asks nobody for a token"),
        (2, True, False, "problem", "2 nodes, and"),
        (1, True, False, "problem", "a gateway listens beyond loopback, and Ray asks nobody"),
        (None, True, False, "problem", "a gateway listens beyond loopback"),
        (1, True, True, "ok", "asks for it"),
        (None, True, None, "ok", "not known"),
        (2, False, None, "ok", "not known"),
    ],
)
def test_a_ray_without_a_token_serves_no_other_machine(
    num_nodes: int | None, is_open: bool, has_token: bool | None, level: str, words: str
) -> None:
    check = check_token(num_nodes, is_open, has_token)
    assert (check.name, check.level) == ("token", level)
    assert words in check.found
    assert ("RAY_AUTH_MODE=token" in check.advice) == (level == "problem")


@pytest.mark.parametrize(
    ("num_nodes", "has_ray_tls", "has_tls", "level", "words"),
    [
        (1, False, False, "ok", "not asked for"),
        (None, False, False, "ok", "not asked for"),
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
    num_nodes: int | None, has_ray_tls: bool, has_tls: bool, level: str, words: str
) -> None:
    check = check_encryption(num_nodes, has_ray_tls, has_tls)
    assert (check.name, check.level) == ("encryption", level)
    assert words in check.found
    assert bool(check.advice) == (level != "ok")


def listening(*listens: dict[str, Any]) -> dict[str, Any]:
    """Return a deployment file with an application for each section of ``gateway.listen``."""
    return {
        "applications": [
            {"import_path": "router.app:build", "args": {"gateway": {"listen": listen}}}
            for listen in listens
        ]
    }


@pytest.mark.parametrize(
    ("document", "is_found_open"),
    [
        ({}, False),
        (listening({}), False),
        (listening({"host": "0.0.0.0"}), True),
        (listening({"admin_host": "10.1.2.3"}), True),
        (listening({}, {"host": "::1", "admin_host": "localhost"}), False),
        (listening({}, {"host": "gateway.lan"}), True),
        ({"applications": [{"import_path": "other:app"}]}, False),
    ],
)
def test_a_file_is_open_where_any_gateway_is_reached_from_elsewhere(
    document: dict[str, Any], is_found_open: bool
) -> None:
    assert is_open(document) == is_found_open


@pytest.mark.parametrize(
    ("host", "variables", "levels"),
    [
        ("127.0.0.1", {}, ["ok", "ok"]),
        ("localhost", {"RAY_AUTH_MODE": "disabled"}, ["ok", "ok"]),
        ("0.0.0.0", {}, ["ok", "ok"]),  # a start turns the token on
        ("::", {"RAY_AUTH_MODE": "token"}, ["ok", "ok"]),
        ("0.0.0.0", {"RAY_AUTH_MODE": "disabled"}, ["problem", "ok"]),
        (None, {"RAY_AUTH_MODE": "disabled"}, ["ok", "ok"]),
    ],
)
def test_a_ray_of_a_starts_own_has_the_token_that_the_start_gives_it(
    host: str | None, variables: dict[str, str], levels: list[str]
) -> None:
    document = {} if host is None else listening({"host": host})
    checks = access_checks(document, False, None, variables)
    assert [check.level for check in checks] == levels


@pytest.mark.parametrize("variables", [{}, {"RAY_AUTH_MODE": "token"}])
@pytest.mark.parametrize(
    ("num_nodes", "has_token", "level"), [(2, False, "problem"), (2, True, "ok"), (1, False, "ok")]
)
def test_a_running_cluster_is_judged_by_what_it_says_and_not_by_the_environment(
    num_nodes: int, has_token: bool, level: str, variables: dict[str, str]
) -> None:
    running = RunningRay(Target("h:1", "F"), "", num_nodes=num_nodes, has_token=has_token)
    assert access_checks({}, False, running, variables)[0].level == level


def _of_mode(mode: str, num_nodes: int) -> Answer:
    def answer(path: str, _: bytes) -> tuple[int, Any]:
        if path == "/api/authentication_mode":
            return 200, {"authentication_mode": mode}
        if mode == "token":
            return 401, "Unauthorized"
        assert path.startswith("/api/v0/nodes?")
        return 200, {"result": True, "data": {"result": {"total": num_nodes, "result": []}}}

    return answer


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (_of_mode("disabled", 1), (1, False)),
        (_of_mode("disabled", 3), (3, False)),
        (_of_mode("token", 3), (None, True)),
        (lambda *_: (404, "no such page"), (None, None)),
        (lambda *_: (200, b"<html>"), (None, None)),
        (lambda *_: (200, {"authentication_mode": "disabled"}), (None, None)),
        (lambda *_: (200, []), (None, None)),
    ],
)
def test_a_dashboard_tells_its_mode_and_its_nodes(
    answer: Answer, found: tuple[int | None, bool | None]
) -> None:
    with web_server(answer) as port:
        assert look_at_dashboard(f"http://127.0.0.1:{port}/") == found


def test_a_dashboard_that_is_not_there_tells_nothing() -> None:
    [nobody] = free_ports(1)
    assert look_at_dashboard(f"http://127.0.0.1:{nobody}") == (None, None)
    assert look_at_dashboard("nonsense") == (None, None)
