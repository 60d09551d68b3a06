"""Both clients get a prompt's log probabilities, whole and in pieces, also from a broken stream."""

from __future__ import annotations

import pytest

from router.client import Message, PromptLogprobs, Reply, Sampling
from tests.local_gateway import LocalGateway
from tests.unit.gateway_fakes import serve_grpc
from tests.unit.router.client.broken import Connect, broken_stream, whole_reply
from tests.unit.router.engine.test_engine import prompt_of

PROMPT = prompt_of(30, 3)
ASKED = Sampling(max_tokens=3, temperature=0.0, ignore_eos=True, prompt_logprobs=2, logprobs=1)


def rows_of(pieces: list[Reply]) -> list[PromptLogprobs | None]:
    return [row for piece in pieces for row in piece.prompt_logprobs]


def test_the_numbers_are_those_of_http(gateway: LocalGateway, connect: Connect) -> None:
    reply = whole_reply(gateway, connect, PROMPT, ASKED)
    first, *rows = reply.prompt_logprobs
    body = {"prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 2}
    over_http = gateway.post(**body).json()["choices"][0]["prompt_logprobs"]
    assert (first, over_http[0], len(reply.token_ids)) == (None, None, 3)
    for token_id, row, expected in zip(PROMPT[1:], rows, over_http[1:], strict=True):
        assert expected[str(token_id)]["logprob"] == row.logprob
        assert expected[str(token_id)]["rank"] == row.rank
        assert [expected[str(i)]["logprob"] for i in row.top_ids] == list(row.top_logprobs)


def test_a_stream_has_them_before_the_first_token(gateway: LocalGateway, connect: Connect) -> None:
    whole = whole_reply(gateway, connect, PROMPT, ASKED)
    with serve_grpc(gateway) as address, connect(address) as client:
        pieces = list(client.stream(PROMPT, ASKED))
    assert tuple(rows_of(pieces)) == whole.prompt_logprobs
    assert sum(bool(piece.prompt_logprobs) for piece in pieces) > 1
    begun = [bool(piece.token_ids) for piece in pieces]
    assert begun == sorted(begun)
    assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_a_broken_stream_goes_on_without_repeating_any(
    gateway: LocalGateway, connect: Connect, count: int
) -> None:
    whole = whole_reply(gateway, connect, PROMPT, ASKED)
    pieces = broken_stream(connect, gateway, gateway, PROMPT, ASKED, count)
    assert tuple(rows_of(pieces)) == whole.prompt_logprobs
    assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids
    assert "".join(piece.text for piece in pieces) == whole.text


def test_an_echo_begins_the_text_once(gateway: LocalGateway, connect: Connect) -> None:
    asked = Sampling(max_tokens=2, temperature=0.0, echo=True, logprobs=1)
    with serve_grpc(gateway) as address, connect(address) as client:
        [whole] = client.generate("the quick", asked)
        pieces = list(client.stream("the quick", asked))
        [chat] = client.generate(messages=[Message("user", "fox")], sampling=asked)
    assert whole.text.startswith("the quick")
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(rows_of(pieces)) == whole.prompt_logprobs
    assert whole.prompt_logprobs[0] is None
    assert chat.text.startswith("user: fox\nassistant:")


def test_a_prompt_alone_is_answered_without_a_token(
    gateway: LocalGateway, connect: Connect
) -> None:
    asked = Sampling(max_tokens=0, prompt_logprobs=0)
    with serve_grpc(gateway) as address, connect(address) as client:
        [reply] = client.generate(PROMPT, asked)
        [single] = client.generate(PROMPT[:1], asked)
    assert (reply.token_ids, reply.finish_reason, reply.text) == ((), "length", "")
    assert [row.top_ids for row in reply.prompt_logprobs[1:]] == [()] * (len(PROMPT) - 1)
    assert single.prompt_logprobs == (None,)
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(PROMPT), 0)
