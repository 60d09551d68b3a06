"""Rows of experts on their way: packed, early, late, twice, after a gap, in parts."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.messages.receipts import DeliveredTokens, merge_events
from router.messages.request import GenerationRequest, Received, TokenEvent
from router.messages.routed import RoutedExperts, dtype_of, rows_after
from tests.local_cluster import greedy_request

ROUTED = RoutedExperts((2, 2), 300, True)
PROMPT, COUNT = range(7), 3
SIZE = ROUTED.row_bytes
ROWS = bytes(range(SIZE * (len(PROMPT) + COUNT - 1)))
WHOLE = TokenEvent(0, (70, 71, 72), (), "length", identity="one", routed=ROWS)


def request(*received: Received) -> GenerationRequest:
    return replace(greedy_request("r", PROMPT, COUNT), received=received, routed=ROUTED)


def part(begin: int, end: int) -> TokenEvent:
    rows = ROWS[begin * SIZE : end * SIZE]
    return TokenEvent(0, (), identity="one", routed=rows, routed_start=begin)


def token(number: int) -> TokenEvent:
    reason = "length" if number == COUNT - 1 else None
    event = part(6 + number, 7 + number)
    return replace(event, token_ids=(70 + number,), finish_reason=reason, start=number)


PIECES = [part(0, 2), part(2, 6), token(0), token(1), token(2)]


def test_an_event_and_a_request_are_the_same_after_their_way() -> None:
    for event in (WHOLE, *PIECES, replace(WHOLE, cached_tokens=3)):
        wire = msgpack.unpackb(msgpack.packb(event.to_wire()))
        assert TokenEvent.from_wire(wire) == event
    for asked in (request(Received(num_routed=3)), replace(request(), routed=None)):
        wire = msgpack.unpackb(msgpack.packb(asked.to_wire()))
        deadline_s = asked.deadline_s
        assert replace(GenerationRequest.from_wire(wire), deadline_s=deadline_s) == asked


@pytest.mark.parametrize(("num_experts", "dtype"), [(8, "uint8"), (255, "uint8"), (256, "uint16")])
def test_the_largest_number_of_the_dtype_is_no_expert(num_experts: int, dtype: str) -> None:
    assert dtype_of(num_experts) == dtype
    assert RoutedExperts((3, 2), num_experts).row_bytes == 6 * (1 + (dtype == "uint16"))


@given(st.lists(st.sampled_from([*PIECES, part(1, 4), part(0, 6), WHOLE]), max_size=12))
def test_each_row_comes_once_in_order_and_before_its_tokens(events: list[TokenEvent]) -> None:
    """Whatever comes first, twice or not at all, the reply at the end has the rest."""
    receipts = DeliveredTokens(request())
    taken = [event for event in map(receipts.take, [*events, WHOLE]) if event is not None]
    num_rows = num_tokens = 0
    for event in taken:
        num_rows += len(event.routed) // SIZE
        num_tokens += len(event.token_ids)
        assert not num_tokens or num_rows == len(PROMPT) + num_tokens - 1
    assert merge_events(taken) == [WHOLE]
    assert receipts.all_finished()


@pytest.mark.parametrize("count", range(len(PIECES)))
def test_what_has_come_is_what_a_resumed_request_says(count: int) -> None:
    receipts = DeliveredTokens(request())
    before = [event for event in map(receipts.take, PIECES[:count]) if event is not None]
    [received] = receipts.received()
    assert received.is_begun == (count > 0)
    assert receipts.has_any() == (count > 0)
    resumed = request(received)
    num_rows = resumed.num_routed_of(0)
    assert num_rows == sum(len(event.routed) for event in before) // SIZE
    rest = DeliveredTokens(resumed).take(WHOLE)
    assert rest is not None
    assert rest.routed == ROWS[num_rows * SIZE :]


def test_rows_after_a_gap_are_not_taken() -> None:
    assert DeliveredTokens(request()).take(part(2, 6)) is None
    assert rows_after(b"ab", 2, 1, 1) is None
    assert rows_after(b"ab", 2, 3, 1) == b"b"


def test_events_of_rows_are_no_first_tokens() -> None:
    assert [event.is_first_token for event in PIECES] == [False, False, True, False, False]
