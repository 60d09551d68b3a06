"""What a web page of another site may not do, and what every other client goes on doing."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest

from cluster.errors import ConfigError
from router.config.deployment import parse_args
from router.gateway.browsers import BrowserRules
from tests.unit.gateway_fakes import FakeUpstream, http_app, says
from tests.unit.http_calls import COMPLETIONS
from tests.unit.http_calls import OF_JSON as JSON

LOCAL, ELSEWHERE = BrowserRules(is_local=True), BrowserRules()
BODY = b'{"model": "tiny", "prompt": "in the", "max_tokens": 2}'
CHAT_PAGE = "https://chat.example.com"


def ask(
    rules: BrowserRules, headers: dict[str, str], method: str = "POST", path: str = COMPLETIONS
) -> httpx.Response:
    """Send a request whose only headers are these, and those that HTTP itself has."""
    upstream = FakeUpstream(says(" was"))
    app = http_app(upstream, browsers=rules)

    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as one:
            request = one.build_request(method, path, headers=headers)
            if method == "POST":
                request = httpx.Request(method, request.url, headers=headers, content=BODY)
            return await one.send(request)

    answered = asyncio.run(answer())
    assert bool(upstream.requests) == (answered.status_code == 200 and method == "POST")
    return answered


def refused(response: httpx.Response, status: int, field: str) -> str:
    """Return the message of a refusal that names a header."""
    assert response.status_code == status
    error: dict[str, Any] = response.json()["error"]
    assert error["param"] == field
    assert "access-control-allow-origin" not in response.headers
    return str(error["message"])


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "my.localhost:1"],
)
def test_a_client_of_this_machine_is_answered(host: str) -> None:
    assert ask(LOCAL, {"host": host, **JSON}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example.com", "evil.example.com:8000", "localhost.evil.com"]
)
def test_a_name_that_another_site_may_have_is_refused_on_loopback_alone(host: str) -> None:
    message = refused(ask(LOCAL, {"host": host, **JSON}), 403, "host")
    assert message == f"host: must be one of localhost, an IP address; got '{host}'"
    assert ask(ELSEWHERE, {"host": host, **JSON}).status_code == 200
    named = BrowserRules(is_local=True, hosts=(host.partition(":")[0],))
    assert ask(named, {"host": host, **JSON}).status_code == 200


@pytest.mark.parametrize("rules", [LOCAL, ELSEWHERE])
@pytest.mark.parametrize(
    "origin", ["https://evil.example.com", "null", "http://localhost:9999", "http://[x"]
)
def test_a_page_of_another_site_is_refused(rules: BrowserRules, origin: str) -> None:
    headers = {"host": "localhost:8000", "origin": origin, **JSON}
    message = refused(ask(rules, headers), 403, "origin")
    assert message.endswith(f"gateway.origins; got '{origin}'")
    asking = headers | {"access-control-request-method": "POST"}
    refused(ask(rules, asking, "OPTIONS"), 403, "origin")


def test_a_page_of_the_gateways_own_is_answered() -> None:
    headers = {"host": "Localhost:8000", "origin": "http://localhost:8000", **JSON}
    assert ask(LOCAL, headers).status_code == 200


def test_a_page_that_the_file_names_is_answered_and_may_read_the_answer() -> None:
    rules = BrowserRules(is_local=True, origins=(CHAT_PAGE,))
    headers = {"host": "localhost:8000", "origin": CHAT_PAGE}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "x-any"}
    before = ask(rules, headers | asked, "OPTIONS")
    assert before.status_code == 200
    assert "POST" in before.headers["access-control-allow-methods"]
    answered = ask(rules, headers | JSON)
    assert answered.status_code == 200
    assert answered.headers["access-control-allow-origin"] == CHAT_PAGE
    refused(ask(rules, headers | JSON | {"origin": "https://evil.example.com"}), 403, "origin")


@pytest.mark.parametrize(
    "given", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; a=b"]
)
def test_a_body_that_a_form_may_send_is_refused(given: str) -> None:
    headers = {"host": "localhost", "content-type": given} if given else {"host": "localhost"}
    message = refused(ask(LOCAL, headers), 415, "content-type")
    assert message == f"content-type: must be application/json; got '{given}'"


@pytest.mark.parametrize("given", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_by_its_name_is_taken(given: str) -> None:
    assert ask(LOCAL, {"host": "localhost", "content-type": given}).status_code == 200


@pytest.mark.parametrize(
    ("given", "status"),
    [("", 404), ("application/octet-stream", 404), ("application/json", 404), ("text/plain", 415)],
)
def test_tensors_come_with_any_type_but_that_of_a_form(given: str, status: int) -> None:
    headers = {"host": "localhost"} | ({"content-type": given} if given else {})
    answered = ask(ELSEWHERE, headers, path="/v2/models/nothing/infer")
    assert answered.status_code == status


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics"])
def test_reading_needs_no_type(path: str) -> None:
    assert ask(LOCAL, {"host": "localhost"}, "GET", path).status_code == 200
    assert ask(LOCAL, {"host": "evil.example.com"}, "GET", path).status_code == 403


def test_a_host_that_is_none_is_wrong() -> None:
    refused(ask(LOCAL, {"host": "[x", **JSON}), 400, "host")


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("origins", "chat.example.com"),
        ("origins", "https://chat.example.com/"),
        ("origins", "*"),
        ("origins", "null"),
        ("hosts", "https://chat.example.com"),
        ("hosts", "chat.example.com:80"),
        ("hosts", "Chat"),
        ("hosts", "*"),
    ],
)
def test_a_wrong_name_in_the_file_is_refused(key: str, given: str) -> None:
    args = {"models": [{"id": "m", "path": "p"}], "gateway": {key: [given]}}
    with pytest.raises(
        ConfigError, match=re.escape(f"args.gateway.{key}: Value error, '{given}' is no ")
    ):
        parse_args(args)
