"""Requests made from the OpenAPI document are answered as it says; and a fault is found."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI

from router.gateway.http.openai import call
from tests import api_requests as api

SEED = 2
EXAMPLES = 16
BOUNDED = ("/v1/chat/completions", "/tokenize")
"""Routes whose bounds are asked for too; those of completions are nearly the same."""


@pytest.fixture(scope="module")
def app() -> Any:
    with api.gateway() as found:
        yield found


def test_no_answer_of_any_route_is_other_than_described(app: FastAPI) -> None:
    found = api.fuzz(app, SEED, EXAMPLES)
    assert found.failures == {}
    assert len(found.routes) == 23
    never_well = [route for route in found.routes if not found.count(route, 200, 299)]
    assert never_well == ["POST /v1/embeddings"]
    for route in found.routes:
        if route.startswith("POST"):
            assert found.count(route, 400, 499), route


@pytest.mark.parametrize("path", BOUNDED)
def test_each_fields_bounds_are_kept(
    app: FastAPI, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MAX_TOKENS", 1)  # the request is what matters here
    found = api.fuzz(app, SEED, 1, has_bounds=True, path=path)
    assert found.failures == {}
    assert found.total > 100


def broken_usage(usages: Any) -> dict[str, Any]:
    return {"prompt_tokens": 1}


def test_a_fault_is_told_with_its_request(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "usage_object", broken_usage)
    found = api.fuzz(app, SEED, 10, path="/v1/completions")
    told = "POST /v1/completions: response_schema_conformance"
    assert any(told in failure for failure in found.failures)
    assert all(request.startswith("curl -X POST") for request in found.failures.values())


def test_the_same_seed_asks_the_same(app: FastAPI) -> None:
    first, second = (api.fuzz(app, SEED, 5, path="/tokenize") for _ in range(2))
    assert first.answers == second.answers
