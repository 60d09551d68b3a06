"""Our clients when their server dies: streams go on, calls are made again, within their deadline.

The asynchronous client is asked the same as the other.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.shipped import free_ports
from cluster.errors import (
    ExpertMeshError,
    InternalError,
    InvalidRequestError,
    ModelReplacedError,
    OverloadedError,
    UnavailableError,
)
from router.client import Client, Reply, Sampling, UnreachableError, wire
from router.messages.request import GenerationRequest
from router.retry import RetryPolicy
from tests.unit.blocking_client import BlockingAsyncClient
from tests.unit.gateway_fakes import (
    IDENTITY,
    FakeUpstream,
    Servicer,
    goes_on,
    grpc_server,
    says,
    tokenizer,
)
from tests.unit.router.client.broken import QUICK, Connect, broken_stream

TEXT = " was 🚀 the q🚀"
STOP = "🚀 the q"
IDS = tokenizer().encode(TEXT)
TOKENS_TO_STOP = len(tokenizer().encode(" was " + STOP))


def each_break(counts: int) -> list[tuple[Connect, int]]:
    """Every place to break a stream at; those of the asynchronous client are two."""
    return [(Client, count) for count in range(counts)] + [
        (BlockingAsyncClient, count) for count in (0, counts // 2)
    ]


def broken(
    connect: Connect, sampling: Sampling, first: FakeUpstream, second: FakeUpstream, count: int
) -> list[Reply]:
    servers = (Servicer(first), Servicer(second))
    return broken_stream(connect, *servers, "in", sampling, count, model="tiny")


def joined(pieces: Sequence[Reply], index: int = 0) -> tuple[str, tuple[int, ...]]:
    own = [piece for piece in pieces if piece.index == index]
    assert [piece.finish_reason is None for piece in own] == [True] * (len(own) - 1) + [False]
    return "".join(p.text for p in own), tuple(t for p in own for t in p.token_ids)


@pytest.mark.parametrize(("connect", "count"), each_break(len(IDS)))
def test_a_stream_goes_on_where_it_broke(connect: Connect, count: int) -> None:
    first = FakeUpstream(goes_on(TEXT, upto=count), endless=True)
    second = FakeUpstream(goes_on(TEXT))
    pieces = broken(connect, Sampling(max_tokens=20, logprobs=1), first, second, count)
    assert joined(pieces) == (TEXT, tuple(IDS))
    assert [row.top_ids for piece in pieces for row in piece.logprobs] == [(i,) for i in IDS]
    assert [piece.usage is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    usage = pieces[-1].usage
    assert usage is not None
    assert usage.completion_tokens == len(IDS)
    again = second.requests[0]
    assert again.received_of(0).token_ids == tuple(IDS[:count])
    if count:
        assert again.sampling == first.requests[0].sampling
        assert again.deadline_s == pytest.approx(first.requests[0].deadline_s, abs=2.0)


@pytest.mark.parametrize(("connect", "count"), each_break(TOKENS_TO_STOP))
def test_a_stop_string_across_the_break_is_found(connect: Connect, count: int) -> None:
    sampling = Sampling(max_tokens=30, stop=[STOP])
    whole = FakeUpstream(goes_on(TEXT))
    with grpc_server(whole) as address, connect(address) as client:
        expected = joined(list(client.stream("in", sampling, model="tiny")))
    first = FakeUpstream(goes_on(TEXT, upto=count), endless=True)
    pieces = broken(connect, sampling, first, FakeUpstream(goes_on(TEXT)), count)
    assert joined(pieces) == expected
    assert pieces[-1].finish_reason == "stop"
    assert expected[0] == " was "


def test_each_choice_goes_on_and_a_finished_one_is_not_asked_for_again(connect: Connect) -> None:
    long, short = " was the word", " was"
    first = FakeUpstream(goes_on(short, long, upto=2), endless=True)
    count = len(tokenizer().encode(short)) + 2
    second = FakeUpstream(goes_on(short, long))
    pieces = broken(connect, Sampling(n=2, max_tokens=20), first, second, count)
    assert joined(pieces, 0) == (short, tuple(tokenizer().encode(short)))
    assert joined(pieces, 1) == (long, tuple(tokenizer().encode(long)))
    assert [one.finished for one in second.requests[0].received] == [True, False]
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == sum(len(p.token_ids) for p in pieces)


def test_a_call_without_a_stream_is_made_again_with_the_same_seed(connect: Connect) -> None:
    first, second = FakeUpstream(lambda _: [], endless=True), FakeUpstream(says(TEXT))
    replies: list[list[Reply]] = []
    with grpc_server(first) as address:
        client = connect(address, retry=QUICK)
        client.model_info()
        asking = threading.Thread(
            target=lambda: replies.append(client.generate("in", model="tiny", timeout_s=30))
        )
        asking.start()
        deadline_s = time.monotonic() + 10
        while not first.requests and time.monotonic() < deadline_s:
            asking.join(0.01)
    with grpc_server(second, int(address.rpartition(":")[2])), client:
        asking.join(30)
    assert [[one.text for one in reply] for reply in replies] == [[TEXT]]
    assert first.requests[0].sampling == second.requests[0].sampling


def failing(times: int, error: ExpertMeshError, before: int = 0) -> FakeUpstream:
    """An upstream that fails so often after ``before`` tokens, and then answers."""

    def script(request: GenerationRequest) -> Any:
        if len(upstream.requests) > times:
            yield from goes_on(TEXT)(request)
        else:
            yield from goes_on(TEXT, upto=before)(request)
            yield error

    upstream = FakeUpstream(script)
    return upstream


def test_what_is_tried_again_and_what_is_not(connect: Connect) -> None:
    def ask(upstream: FakeUpstream) -> list[Reply]:
        with grpc_server(upstream) as address, connect(address, retry=QUICK) as client:
            return client.generate("in", timeout_s=30)

    away = failing(2, UnavailableError("away", retry_after_s=0.2))
    started_s = time.monotonic()
    assert ask(away)[0].text == TEXT
    assert time.monotonic() - started_s >= 0.4  # the server asks for so much
    assert len(away.requests) == 3
    # A full queue refuses a new request, but not one that goes on.
    full = OverloadedError("full", retry_after_s=0.01)
    for error in (InternalError("odd"), InvalidRequestError("bad", "prompt"), full):
        upstream = failing(1, error)
        with pytest.raises(type(error)):
            ask(upstream)
        assert len(upstream.requests) == 1
    with grpc_server(failing(1, full, 2)) as address, connect(address, retry=QUICK) as client:
        pieces = list(client.stream("in", Sampling(max_tokens=20), timeout_s=30))
    assert joined(pieces) == (TEXT, tuple(IDS))


def test_a_number_of_choices_that_nobody_can_have_is_the_servers_to_refuse(
    connect: Connect,
) -> None:
    with grpc_server(FakeUpstream(says(TEXT))) as address, connect(address) as client:
        for n in (0, -1, 2**62):
            with pytest.raises(InvalidRequestError) as caught:
                list(client.stream("in", Sampling(n=n)))
            assert caught.value.field == "sampling.n"


def test_without_a_policy_everything_is_tried_once(connect: Connect) -> None:
    upstream = failing(9, UnavailableError("away", retry_after_s=0.0), before=1)
    with grpc_server(upstream) as address, connect(address, retry=None) as client:
        for attempt in (client.generate, client.stream):
            with pytest.raises(UnavailableError):
                list(attempt("in", timeout_s=30))
        assert len(upstream.requests) == 2
        assert upstream.requests[0].sampling.seed != upstream.requests[1].sampling.seed


def test_a_server_that_stays_away_ends_a_stream_at_its_deadline(connect: Connect) -> None:
    upstream = FakeUpstream(goes_on(TEXT, upto=2), endless=True)
    with grpc_server(upstream) as address:
        client = connect(address, retry=QUICK)
        started_s = time.monotonic()
        stream = client.stream("in", model="tiny", timeout_s=3.0)
        assert next(stream).token_ids
    with client, pytest.raises(UnreachableError):
        list(stream)
    assert 2.5 < time.monotonic() - started_s < 60.0


def test_a_deterministic_failure_ends_with_the_budget(connect: Connect) -> None:
    upstream = failing(10_000, UnavailableError("away", retry_after_s=0.0))
    with grpc_server(upstream) as address, connect(address, retry=RetryPolicy(0, 1, 0)) as client:
        with pytest.raises(UnavailableError):
            client.generate("in", timeout_s=60)
        assert len(upstream.requests) == 100  # half of the budget's tokens


def test_an_address_where_nobody_ever_answered_is_told_at_once(connect: Connect) -> None:
    started_s = time.monotonic()
    with connect("127.0.0.1:1") as client, pytest.raises(UnreachableError) as caught:
        client.generate("in", model="tiny", timeout_s=60)
    assert time.monotonic() - started_s < 50
    assert caught.value.retry_after_s == wire.LOST_S


def drop_first_call(listener: socket.socket) -> None:
    """Take one HTTP/2 connection and close it at its first call, as a proxy that reloads does."""
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(10)
        connection.sendall(b"\0\0\0\4\0\0\0\0\0")  # SETTINGS
        received = b""
        while b"GenerateStream" not in received:
            received += connection.recv(4096)


def test_a_first_call_that_a_proxy_took_and_dropped_is_made_again(connect: Connect) -> None:
    [port] = free_ports(1)
    with socket.create_server(("127.0.0.1", port)) as listener:
        client = connect(f"127.0.0.1:{port}", retry=QUICK)
        stream = client.stream("in", Sampling(max_tokens=20), model="tiny", timeout_s=30)
        pieces: list[Reply] = []
        reading = threading.Thread(target=lambda: pieces.extend(stream))
        reading.start()
        drop_first_call(listener)
    upstream = FakeUpstream(goes_on(TEXT))
    with grpc_server(upstream, port), client:
        reading.join(30)
    assert joined(pieces) == (TEXT, tuple(IDS))
    assert len(upstream.requests) == 1


def test_closing_the_client_ends_a_wait_for_its_server(connect: Connect) -> None:
    upstream = FakeUpstream(goes_on(TEXT, upto=1), endless=True)
    with grpc_server(upstream) as address:
        client = connect(address, retry=RetryPolicy(first_delay_s=60, max_delay_s=60))
        stream = client.stream("in", model="tiny", timeout_s=100)
        assert next(stream).token_ids
    ended = threading.Event()

    def read() -> None:
        with pytest.raises(ExpertMeshError):
            list(stream)
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    client.close()
    assert ended.wait(10)


def test_a_stream_whose_model_was_replaced_ends_with_a_hint(connect: Connect) -> None:
    first = FakeUpstream(goes_on(TEXT, upto=2), endless=True)
    refused = InvalidRequestError("'old' is not the model that is served", "resume[0].identity")
    second = FakeUpstream(lambda _: [refused])
    with pytest.raises(ModelReplacedError) as caught:
        broken(connect, Sampling(max_tokens=20), first, second, 2)
    assert caught.value.retry_after_s == 1.0
    assert [one.identity for one in second.requests[0].received] == [IDENTITY]


def test_a_call_whose_model_was_replaced_gets_the_new_models_whole_answer(
    connect: Connect,
) -> None:
    answers = iter([lambda _: [ModelReplacedError()], says(TEXT)])
    upstream = FakeUpstream(lambda request: next(answers)(request))
    with grpc_server(upstream) as address, connect(address, retry=QUICK) as client:
        [reply] = client.generate("in", model="tiny", timeout_s=30)
    assert reply.text == TEXT
    assert [request.received for request in upstream.requests] == [(), ()]
