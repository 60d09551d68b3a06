"""What has come of a prompt's log probabilities, early, late, twice, or after a gap."""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.messages.receipts import DeliveredTokens, merge_events
from router.messages.request import GenerationRequest, PromptLogprobs, Received, TokenEvent
from tests.local_cluster import greedy_request

ROWS = tuple(PromptLogprobs(-float(i), (i,), (-0.5,), i + 1) for i in range(6))
PROMPT = range(7)
WHOLE = TokenEvent(0, (70, 71, 72), (), "length", identity="one", prompt_logprobs=ROWS)


def request(*received: Received) -> GenerationRequest:
    asked = greedy_request("r", PROMPT, 3, prompt_logprobs=1)
    return replace(asked, received=received)


def part(begin: int, end: int) -> TokenEvent:
    return TokenEvent(0, (), identity="one", prompt_logprobs=ROWS[begin:end], prompt_start=begin)


def token(number: int) -> TokenEvent:
    reason = "length" if number == 2 else None
    return TokenEvent(0, (70 + number,), (), reason, start=number, identity="one")


PIECES = [part(0, 2), part(2, 5), part(5, 6), token(0), token(1), token(2)]


def test_an_event_is_the_same_after_its_way() -> None:
    for event in (WHOLE, *PIECES, replace(token(0), cached_tokens=32)):
        wire = msgpack.unpackb(msgpack.packb(event.to_wire()))
        assert TokenEvent.from_wire(wire) == event
    assert len(token(0).to_wire()) == 7  # what most events lack is not sent


@given(st.lists(st.sampled_from([*PIECES, part(1, 4), part(0, 6), WHOLE]), max_size=12))
def test_each_comes_once_in_order_and_before_the_tokens(events: list[TokenEvent]) -> None:
    """Whatever comes first, twice or not at all, the reply at the end has the rest."""
    receipts = DeliveredTokens(request())
    taken = [event for event in map(receipts.take, [*events, WHOLE]) if event is not None]
    joined = merge_events(taken)[0]
    assert joined.prompt_logprobs == ROWS
    assert joined.token_ids == WHOLE.token_ids
    assert receipts.all_finished()
    rows_then_tokens = [bool(event.token_ids) for event in taken]
    assert rows_then_tokens == sorted(rows_then_tokens)
    begins = [event.prompt_start for event in taken if event.prompt_logprobs]
    assert begins == sorted(set(begins))


@pytest.mark.parametrize("count", range(len(PIECES)))
def test_the_rest_is_asked_for_and_taken(count: int) -> None:
    receipts = DeliveredTokens(request())
    first = [receipts.take(event) for event in PIECES[:count]]
    [received] = receipts.received()
    assert received.num_prompt_logprobs == sum(len(p.prompt_logprobs) for p in PIECES[:count])
    assert received.token_ids == tuple(itertools.chain(*(p.token_ids for p in PIECES[:count])))
    assert received.is_begun == bool(count)
    again = DeliveredTokens(request(received))
    rest = [again.take(event) for event in PIECES[count:]]
    assert [*first, *rest] == PIECES
    assert receipts.has_any() == bool(count)
    assert again.progress() == len(ROWS) + 3
