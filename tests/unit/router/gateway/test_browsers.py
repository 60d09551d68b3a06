"""What a web page of another site may not do, and what every other client goes on doing."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest

from cluster.errors import ConfigError
from router.config.deployment import parse_args
from router.gateway.http_io import BrowserRules
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
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as one:
            content = BODY if method == "POST" else None
            url = f"http://localhost:8000{path}"
            return await one.send(httpx.Request(method, url, headers=headers, content=content))

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
    headers = {"host": host, **JSON}
    message = refused(ask(LOCAL, headers), 403, "host")
    assert message == f"host: must be one of localhost, an IP address; got '{host}'"
    named = BrowserRules(is_local=True, hosts=(host.partition(":")[0],))
    assert ask(ELSEWHERE, headers).status_code == ask(named, headers).status_code == 200
    refused(ask(LOCAL, {"host": "[x", **JSON}), 400, "host")


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


def test_a_page_of_the_gateways_own_or_of_the_file_is_answered_and_may_read_the_answer() -> None:
    own = {"host": "Localhost:8000", "origin": "http://localhost:8000", **JSON}
    assert ask(LOCAL, own).status_code == 200
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


FORMS = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; a=b")
INFER = "/v2/models/nothing/infer"


@pytest.mark.parametrize(
    ("path", "given", "status"),
    [
        *((COMPLETIONS, form, 415) for form in ("", *FORMS)),
        (COMPLETIONS, "Application/JSON; charset=utf-8", 200),
        *((INFER, given, 404) for given in ("", "application/octet-stream", "application/json")),
        (INFER, "text/plain", 415),
    ],
)
def test_a_body_that_a_form_may_send_is_refused(path: str, given: str, status: int) -> None:
    """Tensors come with any type but that of a form."""
    headers = {"host": "localhost", **({"content-type": given} if given else {})}
    answered = ask(LOCAL, headers, path=path)
    assert answered.status_code == status
    if path == COMPLETIONS and status == 415:
        message = refused(answered, 415, "content-type")
        assert message == f"content-type: must be application/json; got '{given}'"


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics"])
def test_reading_needs_no_type(path: str) -> None:
    assert ask(LOCAL, {"host": "localhost"}, "GET", path).status_code == 200
    assert ask(LOCAL, {"host": "evil.example.com"}, "GET", path).status_code == 403


WRONG = {
    "origins": ("chat.example.com", "https://chat.example.com/", "*", "null"),
    "hosts": ("https://chat.example.com", "chat.example.com:80", "Chat", "*"),
}


@pytest.mark.parametrize(("key", "given"), [(key, given) for key in WRONG for given in WRONG[key]])
def test_a_wrong_name_in_the_file_is_refused(key: str, given: str) -> None:
    args = {"models": [{"id": "m", "path": "p"}], "gateway": {key: [given]}}
    with pytest.raises(
        ConfigError, match=re.escape(f"args.gateway.{key}: Value error, '{given}' must be ")
    ):
        parse_args(args)
