"""Tokenising over HTTP and gRPC: the tokenizer's own answers, and refusals by name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import InvalidRequestError, UnknownModelError
from router.client import AsyncClient, Client, Message
from router.gateway.input.tokenizer import Tokenizer
from tests.unit.gateway_fakes import (
    CONTEXT,
    FakeUpstream,
    grpc_server,
    says,
    tokenizer,
    vocab_size,
)
from tests.unit.http_calls import HELLO, call, refusal

TEXT = " was the word 🚀"
UPSTREAM = FakeUpstream(says("x"))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with grpc_server(UPSTREAM) as found:
        yield found


@pytest.fixture
def plain() -> Tokenizer:
    return tokenizer()


def test_a_text_is_tokenised_and_back(plain: Tokenizer, address: str) -> None:
    ids = plain.encode(TEXT)
    answer = call(UPSTREAM, "/tokenize", {"model": "tiny", "prompt": TEXT}).json()
    expected = {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids, "token_strs": None}
    assert answer == expected
    named = {"model": "tiny", "prompt": TEXT, "return_token_strs": True}
    texts = call(UPSTREAM, "/tokenize", named).json()["token_strs"]
    assert texts == [plain.token_text(token_id) for token_id in ids]
    with Client(address) as client:
        single = client.tokens([0, *ids])
    assert [token.id for token in single] == [0, *ids]
    assert [token.text for token in single[1:]] == [plain.token_text(i) for i in ids]
    assert [token.special for token in single] == [True, *[False for _ in ids]]
    assert single[0].text == "<s>"
    back = call(UPSTREAM, "/detokenize", {"model": "tiny", "tokens": ids})
    assert back.json() == {"prompt": TEXT}
    assert call(UPSTREAM, "/detokenize", {"model": "tiny", "tokens": []}).json() == {"prompt": ""}


def test_special_tokens_have_their_names(plain: Tokenizer) -> None:
    special = min(plain.skipped_ids)
    answer = call(UPSTREAM, "/detokenize", {"model": "tiny", "tokens": [special]})
    assert answer.json()["prompt"] == plain.token_text(special) != ""


def test_messages_are_rendered_by_the_template(plain: Tokenizer) -> None:
    for is_opened in (True, False):
        body = {"model": "tiny", "messages": HELLO, "add_generation_prompt": is_opened}
        text = plain.chat_prompt(HELLO, is_opened)
        answer = call(UPSTREAM, "/tokenize", body).json()
        assert answer["tokens"] == plain.encode(text, add_special_tokens=False)
    with_default = call(UPSTREAM, "/tokenize", {"model": "tiny", "messages": HELLO}).json()
    opened = plain.encode(plain.chat_prompt(HELLO), add_special_tokens=False)
    assert with_default["tokens"] == opened


def test_a_text_over_the_context_is_counted() -> None:
    answer = call(UPSTREAM, "/tokenize", {"model": "tiny", "prompt": "in " * CONTEXT}).json()
    assert answer["count"] > CONTEXT == answer["max_model_len"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "in", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": ["in"]}, "prompt"),
        ("/tokenize", {"prompt": "x" * 1_000_000}, "prompt"),
        ("/tokenize", {"prompt": "in", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "in", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "in", "tools": []}, "tools"),
        ("/tokenize", {"prompt": "in", "chat_template_kwargs": {}}, "chat_template_kwargs"),
        ("/tokenize", {"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ("/tokenize", {"prompt": "in", "chat_template": "x"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "in"}, "tokens"),
        ("/detokenize", {"tokens": [0, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [vocab_size()]}, "tokens[0]"),
        ("/detokenize", {"tokens": [5] * (CONTEXT + 1)}, "tokens"),
    ],
)
def test_bad_requests_name_their_field(path: str, body: dict[str, Any], field: str) -> None:
    refusal(call(UPSTREAM, path, {"model": "tiny", **body}), 400, field)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_an_unknown_model_is_refused(path: str) -> None:
    refusal(
        call(
            UPSTREAM,
            path,
            {"model": "nope", "prompt": "in"}
            if path == "/tokenize"
            else {"model": "nope", "tokens": []},
        ),
        404,
        "model",
    )


def test_both_clients_tokenise(address: str, plain: Tokenizer) -> None:
    ids = tuple(plain.encode(TEXT))
    messages = [Message("user", "hi")]
    of_messages = tuple(plain.encode(plain.chat_prompt([{"role": "user", "content": "hi"}]), False))
    with Client(address) as client:
        assert (client.tokenize(TEXT), client.detokenize(ids)) == (ids, TEXT)
        assert client.tokenize(messages=messages, model="tiny") == of_messages
        assert client.detokenize(()) == ""
        for attempt in (lambda: client.tokenize(), lambda: client.detokenize([-1])):
            with pytest.raises(InvalidRequestError):
                attempt()
        with pytest.raises(UnknownModelError):
            client.tokenize("in", model="nope")
        with pytest.raises(InvalidRequestError, match="cannot be sent"):
            client.detokenize([2**70])

    async def ask() -> Any:
        async with asyncio.timeout(30), AsyncClient(address) as client:
            tokens = await client.tokenize(TEXT)
            return tokens, await client.tokenize(messages=messages), await client.detokenize(ids)

    assert asyncio.run(ask()) == (ids, of_messages, TEXT)


def test_embeddings_are_refused_with_a_reason() -> None:
    body = {"model": "tiny", "input": "in"}
    said = refusal(call(UPSTREAM, "/v1/embeddings", body), 400, None)
    assert "embeddings are not served" in said


def test_no_request_for_tokens_went_to_a_router() -> None:
    assert UPSTREAM.requests == []
