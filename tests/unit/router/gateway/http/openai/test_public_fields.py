"""Each field of OpenAI's and vLLM's requests passes, and shows, or is refused by its name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsBase as OpenAiChatRequest,
)
from openai.types.completion_create_params import (
    CompletionCreateParamsBase as OpenAiCompletionRequest,
)

from tests.checkpoints import VOCAB_SIZE, save_mixtral
from tests.local_cluster import MODEL, LocalCluster
from tests.local_gateway import LocalGateway, grammars_of
from tests.unit.http_calls import CHAT, COMPLETIONS, events
from tests.unit.router.gateway.http.openai.public_fields import (
    CASES,
    EOS,
    HELLO,
    PROMPT,
    PUBLIC,
    TOKENS,
    Case,
)

PLAIN: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0},
    CHAT: {"messages": HELLO, "max_tokens": TOKENS, "temperature": 0},
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalGateway]:
    folder: Path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(folder, num_hidden_layers=1)
    grammars = grammars_of(folder, VOCAB_SIZE, EOS)
    cluster = LocalCluster(folder, grammars=grammars)
    yield LocalGateway(folder, cluster)
    cluster.close()
    grammars.close()


def post(gateway: LocalGateway, path: str, body: Mapping[str, Any]) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(gateway.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json={"model": MODEL, **PLAIN[path], **body})

    return asyncio.run(send())


@pytest.fixture(scope="module")
def plain(gateway: LocalGateway) -> dict[str, dict[str, Any]]:
    """The answers without any field beside the required ones."""
    return {path: post(gateway, path, {}).json() for path in PLAIN}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_public_example_passes_or_is_refused_by_name(
    gateway: LocalGateway, plain: dict[str, dict[str, Any]], case: Case
) -> None:
    response = post(gateway, case.path, case.body)
    if case.is_refused:
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        name, _, _ = error["param"].replace("[", ".").partition(".")
        assert name == case.field
        assert any(words in error["message"] for words in ("allowed", "only", "must be"))
        return
    assert response.status_code == 200, response.text
    is_stream = case.body.get("stream", False)
    answer = {"choices": [{}], "events": events(response)} if is_stream else response.json()
    if case.shows is not None:
        assert case.shows(answer, plain[case.path]), answer


def test_no_public_field_is_left_out() -> None:
    public = {path: set(names) for path, names in PUBLIC.items()}
    public[COMPLETIONS] |= {*OpenAiCompletionRequest.__annotations__, "stream"}
    public[CHAT] |= {*OpenAiChatRequest.__annotations__, "stream"}
    found = {path: {case.field for case in CASES if case.path == path} for path in public}
    assert {path: names - found[path] for path, names in public.items()} == {
        path: set() for path in public
    }


def test_fields_that_vllm_has_dropped_are_refused_with_what_takes_their_place(
    gateway: LocalGateway,
) -> None:
    error = post(gateway, COMPLETIONS, {"guided_regex": "[0-9]+"}).json()["error"]
    assert "give structured_outputs.regex" in error["message"]
    error = post(gateway, CHAT, {"guided_decoding_backend": "auto"}).json()["error"]
    assert "leave it out" in error["message"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (COMPLETIONS, "best_of", True),
        (COMPLETIONS, "store", 0),
        (CHAT, "parallel_tool_calls", 1),
        (CHAT, "use_beam_search", 0),
    ],
)
def test_a_harmless_value_has_its_type(
    gateway: LocalGateway, path: str, field: str, value: object
) -> None:
    response = post(gateway, path, {field: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
