"""Tokenising over HTTP and gRPC: the tokenizer's own answers, and refusals by name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import InvalidRequestError, UnknownModelError
from router.client import AsyncClient, Client, Message
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
    assert UPSTREAM.requests == []  # none for tokens goes to a router


def tokenized(**body: Any) -> Any:
    return call(UPSTREAM, "/tokenize", {"model": "tiny", **body}).json()


def detokenized(ids: list[int]) -> Any:
    return call(UPSTREAM, "/detokenize", {"model": "tiny", "tokens": ids}).json()


def test_a_text_is_tokenised_and_back(address: str) -> None:
    plain = tokenizer()
    ids = plain.encode(TEXT)
    expected = {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids, "token_strs": None}
    assert tokenized(prompt=TEXT) == expected
    assert tokenized(prompt=TEXT, add_special_tokens=False)["tokens"] == plain.encode(TEXT, False)
    texts = tokenized(prompt=TEXT, return_token_strs=True)["token_strs"]
    assert texts == [plain.token_text(token_id) for token_id in ids]
    with Client(address) as client:
        single = client.tokens([0, *ids])
    assert [token.id for token in single] == [0, *ids]
    assert [token.text for token in single] == ["<s>", *texts]
    assert [token.special for token in single] == [True, *[False for _ in ids]]
    assert detokenized(ids) == {"prompt": TEXT}
    assert detokenized([]) == {"prompt": ""}
    assert detokenized([0]) == {"prompt": "<s>"}


def test_messages_are_rendered_by_the_template() -> None:
    plain = tokenizer()
    for opened in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": False}):
        text = plain.template.prompt(HELLO, opened.get("add_generation_prompt", True))
        ids = plain.encode(text, add_special_tokens=False)
        assert tokenized(messages=HELLO, **opened)["tokens"] == ids


def test_a_text_over_the_context_is_counted() -> None:
    answer = tokenized(prompt="in " * CONTEXT)
    assert answer["count"] > CONTEXT == answer["max_model_len"]


BAD: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "/tokenize": [
        ("prompt", {}),
        ("prompt", {"prompt": "in", "messages": HELLO}),
        ("prompt", {"prompt": ["in"]}),
        ("prompt", {"prompt": "x" * 1_000_000}),
        ("add_special_tokens", {"prompt": "in", "add_special_tokens": 1}),
        ("add_generation_prompt", {"prompt": "in", "add_generation_prompt": True}),
        ("tools", {"prompt": "in", "tools": []}),
        ("chat_template_kwargs", {"prompt": "in", "chat_template_kwargs": {}}),
        ("messages[0].role", {"messages": [{"role": "robot", "content": ""}]}),
        ("chat_template", {"prompt": "in", "chat_template": "x"}),
    ],
    "/detokenize": [
        ("tokens", {}),
        ("tokens", {"tokens": "in"}),
        ("tokens[1]", {"tokens": [0, -1]}),
        ("tokens[0]", {"tokens": [vocab_size()]}),
        ("tokens", {"tokens": [5] * (CONTEXT + 1)}),
    ],
}


@pytest.mark.parametrize(
    ("path", "field", "body"), [(path, *case) for path, cases in BAD.items() for case in cases]
)
def test_bad_requests_name_their_field(path: str, field: str, body: dict[str, Any]) -> None:
    refusal(call(UPSTREAM, path, {"model": "tiny", **body}), 400, field)


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"prompt": "in"}), ("/detokenize", {"tokens": []})]
)
def test_an_unknown_model_is_refused(path: str, body: dict[str, Any]) -> None:
    refusal(call(UPSTREAM, path, {"model": "nope", **body}), 404, "model")


def test_both_clients_tokenise(address: str) -> None:
    plain, messages = tokenizer(), [Message("user", "hi")]
    ids = tuple(plain.encode(TEXT))
    of_messages = tuple(
        plain.encode(plain.template.prompt([{"role": "user", "content": "hi"}]), False)
    )
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
