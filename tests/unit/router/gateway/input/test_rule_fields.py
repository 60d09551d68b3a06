"""The rules for single tokens as clients write them, over HTTP and gRPC alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import InvalidRequestError
from router.client import Client, Sampling
from router.gateway.input.request.model import Generation
from router.gateway.input.tokens import check_rules
from router.messages.request import TokenEvent
from router.messages.rules import TokenRules
from tests.unit.gateway_fakes import (
    EOS,
    FakeUpstream,
    goes_on,
    grpc_server,
    says,
    served,
    tokenizer,
)
from tests.unit.http_calls import chat, completion, events

FIELDS: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "presence_penalty": -0.25,
    "repetition_penalty": 1.5,
    "logit_bias": {7: 2.0, 5: -100.0, 9: 0.0},
    "min_tokens": 2,
    "stop_token_ids": [9, 4, 9],
    "bad_words": ["word"],
}


def test_every_surface_brings_the_same_rules() -> None:
    upstream = FakeUpstream(says(" was"))
    given = {**FIELDS, "logit_bias": {str(k): v for k, v in FIELDS["logit_bias"].items()}}
    for ask in (completion, chat):
        assert ask(upstream, **given).status_code == 200
    with grpc_server(upstream) as address, Client(address) as client:
        client.generate("in", Sampling(**FIELDS))
    words = tuple(tuple(tokenizer().encode(text, False)) for text in ("word", " word"))
    expected = TokenRules(0.5, -0.25, 1.5, ((5, -100.0), (7, 2.0)), 2, (4, 9), words)
    assert [request.sampling.rules for request in upstream.requests] == [expected] * 3
    assert upstream.requests[-1].sampling.ends((EOS,)) == {EOS, 4, 9}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1},
        {"logit_bias": {}, "min_tokens": 0, "stop_token_ids": [], "bad_words": []},
        {"logit_bias": {"5": 0}},
    ],
)
def test_what_changes_nothing_is_no_rule(given: dict[str, Any]) -> None:
    upstream = FakeUpstream(says(" was"))
    assert completion(upstream, **given).status_code == 200
    assert upstream.requests[-1].sampling.rules is None


def test_a_word_that_the_tokenizer_fails_on_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError

    found = tokenizer()
    monkeypatch.setattr(found, "_tokenizer", fails)
    model = replace(served(), tokenizer=found)
    with pytest.raises(InvalidRequestError, match=r"bad_words\[0\].*the model's tokenizer fails"):
        check_rules(Generation(bad_words=["word"]), model, 5)


def test_no_stop_string_ends_an_answer_before_its_least_number_of_tokens() -> None:
    text = " was the was the"
    ids = tokenizer().encode(text)
    for least, kept in ((0, ""), (1, " was the"), (len(ids), text)):
        answer = completion(
            FakeUpstream(goes_on(text)), stop=[" was"], min_tokens=least, max_tokens=16
        ).json()["choices"][0]
        assert answer["text"] == kept


@pytest.mark.parametrize(("vocab_size", "is_refused"), [(128, True), (129, False)])
def test_rules_that_leave_no_token_are_refused(vocab_size: int, is_refused: bool) -> None:
    model = served()
    small = replace(model, info=replace(model.info, vocab_size=vocab_size))
    given = Generation(stop_token_ids=list(range(128)), min_tokens=1)
    if not is_refused:
        assert check_rules(given, small, 4) is not None
        return
    with pytest.raises(InvalidRequestError, match="could forbid every token"):
        check_rules(given, small, 4)


def test_usage_may_come_with_every_chunk() -> None:
    ids = tuple(tokenizer().encode(" was the word"))

    def script(_: object) -> list[TokenEvent]:
        pieces = [TokenEvent(0, (token_id,), start=i) for i, token_id in enumerate(ids[:-1])]
        return [*pieces, TokenEvent(0, ids[-1:], finish_reason="length", start=len(ids) - 1)]

    options = {"include_usage": True, "continuous_usage_stats": True}
    for ask in (completion, chat):
        chunks = events(ask(FakeUpstream(script), stream=True, stream_options=options))
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert set(counts[:-1]) >= {1, len(ids)}
        assert counts[-1] == len(ids)
        assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {
            chunks[-1]["usage"]["prompt_tokens"]
        }
