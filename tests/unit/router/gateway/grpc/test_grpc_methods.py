"""The gRPC methods: alone with a small context, and behind a real server with our client."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.fuzzing.hostile import http2_call, said
from cluster.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    ExpertUnavailableError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    UnknownModelError,
)
from router.client import Client, Message, Sampling, UnreachableError, Usage
from router.config.deployment import GatewayConfig
from router.control.readiness import Readiness
from router.gateway.grpc import methods as grpc_methods
from router.gateway.input.request.model import GrpcRequest, TokenizeRequest
from router.messages.request import GenerationRequest, TokenEvent
from router.protos import inference_pb2
from router.security.keys import ANYBODY
from tests.cluster_fixture import wait_until
from tests.unit import virtual_time
from tests.unit.gateway_fakes import (
    CONTEXT,
    IDENTITY,
    STATUS,
    FakeUpstream,
    Servicer,
    grpc_server,
    says,
    tokenizer,
)

CORRUPT, MAX_BYTES = b"\xff\xff\xff", 4 << 20
WAS = " was the word 🙂"
HELLO = Message("user", "in")


class AbortError(Exception):
    """What ends a call that is aborted."""


class FakeContext:
    """Gives a method its message, after ``late_s``; keeps what it sets on its call, and writes."""

    def __init__(self, message: Any = grpc.aio.EOF, late_s: float = 0.0) -> None:
        self._message, self._late_s = message, late_s
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing: dict[str, bytes] = {}
        self.written: list[Any] = []

    async def read(self) -> Any:
        await asyncio.sleep(self._late_s)
        return self._message

    async def write(self, message: Any) -> None:
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, details: str, trailing: Any) -> None:
        self.code, self.details, self.trailing = code, details, dict(trailing)
        raise AbortError

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self.trailing = dict(trailing_metadata)


def handlers(servicer: Servicer) -> dict[str, Any]:
    """What answers a call of each method, by its name."""
    methods = servicer.methods.for_clients() | servicer.methods.for_operators()
    return {
        path.rpartition("/")[2]: method.handler(ANYBODY, MAX_BYTES)
        for path, method in methods.items()
        if not path.startswith("/inference.")
    }


METHODS = list(handlers(Servicer(FakeUpstream(says("")))))


def answer(servicer: Servicer, name: str, context: FakeContext) -> Coroutine[Any, Any, Any]:
    """Answer a call, whose messages the context then has."""
    answers = handlers(servicer)[name]

    async def run() -> None:
        with suppress(AbortError):
            if answers.stream_stream is not None:
                await answers.stream_stream(None, context)
            else:
                await context.write(await answers.stream_unary(None, context))

    return run()


def call(
    upstream: FakeUpstream, name: str, request: Any, limits: GatewayConfig | None = None
) -> tuple[list[Any], FakeContext]:
    """Call a method; returns its messages and the context."""
    context = FakeContext(request if isinstance(request, bytes) else request.SerializeToString())
    asyncio.run(asyncio.wait_for(answer(Servicer(upstream, limits), name, context), 20))
    return context.written, context


def request(prompt: str = "in", **sampling: Any) -> Any:
    return inference_pb2.GenerateRequest(
        model="tiny", prompt=prompt, sampling=inference_pb2.Sampling(**sampling)
    )


@pytest.fixture
def upstream() -> FakeUpstream:
    return FakeUpstream(says(WAS))


@pytest.fixture
def client(upstream: FakeUpstream) -> Iterator[Client]:
    with grpc_server(upstream) as address, Client(address) as connected:
        yield connected


def test_generate_fills_every_field_of_the_reply(upstream: FakeUpstream) -> None:
    ids = tokenizer().encode(WAS)
    [reply], context = call(upstream, "Generate", request(logprobs=2, max_tokens=9, n=3))
    assert (context.code, context.trailing) == (None, {"expertmesh-exact": "true"})
    assert (reply.index, reply.text, list(reply.token_ids)) == (0, WAS, ids)
    assert (reply.finish_reason, reply.exact) == ("length", True)
    assert [row.token_id for row in reply.logprobs] == ids
    assert [len(row.top) for row in reply.logprobs] == [2] * len(ids)
    assert reply.logprobs[0].token == tokenizer().token_text(ids[0])
    assert reply.usage.completion_tokens == 3 * len(ids)
    assert reply.usage.total_tokens == len(tokenizer().encode("in")) + 3 * len(ids)
    assert [(one.index, one.text) for one in reply.other_choices] == [(1, WAS), (2, WAS)]
    assert not reply.other_choices[0].HasField("usage")


@pytest.mark.parametrize(
    ("prompt", "messages", "field"),
    [
        (None, [], "prompt"),
        ("in", [HELLO], "messages"),
        (None, [HELLO, Message("system", "in")], "messages"),
        (None, [Message("user", "in " * CONTEXT)], "messages"),
        (None, [HELLO] * 5000, "messages"),
    ],
)
def test_a_request_has_exactly_one_input_that_makes_sense(
    client: Client, prompt: Any, messages: list[Message], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(prompt, messages=messages, model="tiny")
    assert caught.value.field == field
    assert len(str(caught.value)) < 200
    with pytest.raises(InvalidRequestError, match="no chat template; send a prompt"):
        client.generate(messages=[HELLO], model="bare")


def test_a_stream_has_usage_and_reason_at_the_end(upstream: FakeUpstream) -> None:
    replies, context = call(upstream, "GenerateStream", request())
    assert (context.code, context.trailing) == (None, {"expertmesh-exact": "true"})
    assert "".join(reply.text for reply in replies) == WAS
    assert [reply.finish_reason for reply in replies] == [""] * (len(replies) - 1) + ["length"]
    assert [reply.HasField("usage") for reply in replies] == [False] * (len(replies) - 1) + [True]


def test_what_is_not_exact_is_told_in_the_metadata() -> None:
    [reply], context = call(FakeUpstream(says(" was", exact=False)), "Generate", request(n=2))
    assert [reply.exact, reply.other_choices[0].exact] == [False, False]
    assert context.trailing == {"expertmesh-exact": "false"}

    def script(request: GenerationRequest) -> Iterator[TokenEvent]:
        for place, exact in enumerate((True, False, True)):  # sent again, and whole the second time
            reason = "length" if place == 2 else None
            yield TokenEvent(0, (5 + place,), (), reason, exact, place)

    replies, context = call(FakeUpstream(script), "GenerateStream", request())
    assert [reply.exact for reply in replies] == [True, False, True]
    assert context.trailing == {"expertmesh-exact": "false"}


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_an_error_says_nothing_of_exactness_and_one_that_is_not_ours_nothing_at_all(
    method: str,
) -> None:
    gone, odd = ExpertUnavailableError("gone", "tiny", 1.0), ValueError("/secret 7")
    _, context = call(FakeUpstream(lambda request: [gone]), method, request())
    assert context.code is grpc.StatusCode.UNAVAILABLE
    assert "expertmesh-exact" not in context.trailing
    _, context = call(FakeUpstream(lambda request: [odd]), method, request())
    assert context.code is grpc.StatusCode.INTERNAL
    assert "secret" not in context.details + str(context.trailing)


@pytest.mark.parametrize("contract", ["strict", "next_expert", "drop"])
def test_the_contract_travels_and_the_client_tells_of_exactness(contract: str) -> None:
    upstream = FakeUpstream(says(" was", exact=contract == "strict"))
    with grpc_server(upstream) as address, Client(address) as client:
        replies = client.generate("in", on_expert_loss=contract)
        replies += client.stream("in", on_expert_loss=contract)
    assert [one.on_expert_loss for one in upstream.requests] == [contract] * 2
    assert {reply.exact for reply in replies} == {contract == "strict"}


def test_only_fields_that_are_set_replace_defaults(upstream: FakeUpstream) -> None:
    call(upstream, "Generate", request())
    call(upstream, "Generate", request(temperature=0, seed=0, top_k=0))
    plain, given = (one.sampling for one in upstream.requests)
    assert (plain.temperature, plain.max_tokens, plain.n) == (1.0, 16, 1)
    assert (given.temperature, given.seed) == (0.0, 0)
    _, context = call(upstream, "Generate", request(max_tokens=0))
    assert context.details.startswith("sampling.max_tokens:")


def test_the_models_have_the_fields_of_the_messages_and_no_others() -> None:
    of_request = set(inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name)
    of_sampling = set(inference_pb2.Sampling.DESCRIPTOR.fields_by_name)
    assert not of_request & of_sampling  # the model has both, side by side
    assert GrpcRequest.names == (of_request | of_sampling) - {"sampling", "resume"}
    assert set(inference_pb2.TokenizeRequest.DESCRIPTOR.fields_by_name) <= TokenizeRequest.names


@pytest.mark.parametrize("method", METHODS)
def test_corrupt_bytes_are_an_invalid_argument(upstream: FakeUpstream, method: str) -> None:
    messages, context = call(upstream, method, CORRUPT)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "grpc-status-details-bin" in context.trailing
    assert messages == []
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({}, "prompt"),
        ({"prompt_token_ids": {"ids": []}}, "prompt_token_ids.ids"),
        ({"prompt_token_ids": {"ids": [3, -1]}}, "prompt_token_ids.ids[1]"),
        ({"prompt": "x", "sampling": {"n": 17}}, "sampling.n"),
        ({"prompt": "x", "timeout_s": -1}, "timeout_s"),
        (
            {
                "prompt": "x",
                "sampling": {"seed": 1, "stop": ["the"]},
                "resume": [{"token_ids": tokenizer().encode(WAS), "identity": IDENTITY}],
            },
            "resume[0].finished",
        ),
        ({"prompt": "x", "on_expert_loss": "guess"}, "on_expert_loss"),
    ],
)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_bad_fields_are_violations(
    upstream: FakeUpstream, method: str, bad: dict[str, Any], field: str
) -> None:
    _, context = call(upstream, method, inference_pb2.GenerateRequest(model="tiny", **bad))
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    status = status_pb2.Status.FromString(context.trailing["grpc-status-details-bin"])
    bad_request = error_details_pb2.BadRequest()
    assert any(one.Unpack(bad_request) for one in status.details)
    assert [one.field for one in bad_request.field_violations] == [field]
    assert upstream.requests == []


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_a_message_has_a_limit(method: str) -> None:
    limits = GatewayConfig(max_body_bytes=1024)
    asked = request(stop=["x"])
    for size, code in ((1024, None), (1025, grpc.StatusCode.RESOURCE_EXHAUSTED)):
        upstream = FakeUpstream(says(" was"))
        # What this version does not know is skipped: field 99, so many bytes.
        fill = size - asked.ByteSize() - 4
        data = asked.SerializeToString() + b"\x9a\x06" + bytes([fill & 127 | 128, fill >> 7])
        _, context = call(upstream, method, data.ljust(size), limits)
        assert context.code is code
        assert len(upstream.requests) == (code is None)


@pytest.mark.parametrize("late_s", [73.9, 74.1])
@pytest.mark.parametrize("name", ["Generate", "GenerateStream", "Scale"])
def test_a_message_has_the_time_of_the_longest_to_come(name: str, late_s: float) -> None:
    """10 s and 64 s for 4 MiB."""
    context = FakeContext(request().SerializeToString() if name != "Scale" else b"", late_s)
    virtual_time.run(answer(Servicer(FakeUpstream(says(" was"))), name, context))
    is_late = late_s > 74
    assert ("did not arrive within 74 s" in context.details) == is_late
    assert (context.code is None) != is_late


async def test_a_call_without_a_message_is_refused(upstream: FakeUpstream) -> None:
    context = FakeContext()
    await answer(Servicer(upstream), "Generate", context)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "no message" in context.details


async def test_cancelling_a_call_ends_it_upstream() -> None:
    upstream = FakeUpstream(says(" was", finish_reason=None), endless=True)
    context = FakeContext(request().SerializeToString())
    task = asyncio.create_task(answer(Servicer(upstream), "Generate", context))
    while not upstream.requests:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert upstream.closed.is_set()


async def test_cancelling_a_stream_ends_it_upstream_while_a_message_is_written() -> None:
    upstream = FakeUpstream(says(" was", finish_reason=None), endless=True)
    context, writes = FakeContext(request().SerializeToString()), asyncio.Event()

    async def never_written(message: Any) -> None:
        writes.set()
        await asyncio.Event().wait()

    context.write = never_written  # type: ignore[method-assign]
    task = asyncio.create_task(answer(Servicer(upstream), "GenerateStream", context))
    await writes.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert upstream.closed.is_set()


def test_the_client_generates_and_streams(client: Client, upstream: FakeUpstream) -> None:
    ids = tokenizer().encode(WAS)
    replies = client.generate("in", Sampling(n=2, logprobs=1, seed=-5), timeout_s=20)
    assert [one.text for one in replies] == [WAS] * 2
    assert replies[0].token_ids == tuple(ids)
    assert replies[0].logprobs[0].top_ids == (ids[0],)
    assert replies[0].usage == Usage(len(tokenizer().encode("in")), 2 * len(ids))
    assert replies[1].finish_reason == "length"
    assert client.generate([5, 6], Sampling(stop=["x"]), model="tiny")[0].text == WAS
    pieces = list(client.stream("in", Sampling(stop=["word"]), priority=7))
    assert "".join(piece.text for piece in pieces) == " was the "
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].usage is not None
    client.generate("in", priority=-(2**63))
    first, by_ids, *_ = upstream.requests
    assert first.sampling.seed == -5
    assert by_ids.prompt_token_ids == (5, 6)
    assert [one.priority for one in upstream.requests] == [0, 0, 7, -(2**63)]
    # Only streams and stop strings ask for tokens as they come.
    assert [one.streamed for one in upstream.requests] == [False, True, True, False]
    with pytest.raises(InvalidRequestError, match="cannot be sent"):
        client.generate("in", priority=2**63)


def test_the_client_names_a_salt_and_learns_what_was_found() -> None:
    upstream = FakeUpstream(
        lambda request: [TokenEvent(0, (5,), finish_reason="length", cached_tokens=48)]
    )
    with grpc_server(upstream) as address, Client(address) as client:
        [reply] = client.generate("in", cache_salt="tenant 7")
        assert reply.usage == Usage(len(tokenizer().encode("in")), 1, 48)
        [*_, last] = client.stream("in")
        assert last.usage == reply.usage
        with pytest.raises(InvalidRequestError, match="cache_salt"):
            client.generate("in", cache_salt="x" * 257)
    assert [request.cache_salt for request in upstream.requests] == ["tenant 7", ""]


def test_the_client_asks_for_models_and_status(client: Client) -> None:
    assert [model.id for model in client.model_info()] == ["tiny", "bare"]
    [tiny] = client.model_info("tiny")
    assert (tiny.num_experts, tiny.num_experts_per_tok, tiny.dtype) == (8, 2, "float32")
    assert client.status() == STATUS
    with Client("127.0.0.1:1") as nobody, pytest.raises(UnreachableError):
        nobody.status()
    with pytest.raises(UnknownModelError):
        client.model_info("nope")


@pytest.mark.parametrize(
    "error",
    [
        OverloadedError("full", retry_after_s=2.5),
        UnavailableError("away", retry_after_s=1.0),
        DeadlineExceededError("late"),
        InternalError("odd"),
    ],
)
@pytest.mark.parametrize("after", [0, 1])
def test_the_client_raises_typed_errors(error: ExpertMeshError, after: int) -> None:
    def script(request: GenerationRequest) -> list[TokenEvent | Exception]:
        return [*([TokenEvent(0, (5,))] * after), error]

    with grpc_server(FakeUpstream(script)) as address, Client(address, retry=None) as client:
        for attempt in (client.generate, client.stream):
            pieces: list[Any] = []
            with pytest.raises(type(error)) as caught:
                pieces.extend(attempt("in"))
            assert caught.value.message == error.message
            assert caught.value.retry_after_s == error.retry_after_s
            assert not isinstance(caught.value, UnreachableError)
            # A stream's error is a status alone; no empty message comes before it.
            assert len(pieces) == (after if attempt == client.stream else 0)


def test_leaving_a_stream_ends_it_upstream() -> None:
    upstream = FakeUpstream(says(" was", finish_reason=None), endless=True)
    with grpc_server(upstream) as address, Client(address) as client:
        stream = client.stream("in")
        assert next(stream).token_ids
        assert not upstream.closed.is_set()
        stream.close()
        assert upstream.closed.wait(10)


SERVING, NOT_SERVING, _, SERVICE_UNKNOWN = (
    health_pb2.HealthCheckResponse.ServingStatus.Value(name)
    for name in ("SERVING", "NOT_SERVING", "UNKNOWN", "SERVICE_UNKNOWN")
)


class Health:
    """The calls of a server's health, of one service or of all."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = health_pb2_grpc.HealthStub(channel)

    def check(self, service: str = "") -> tuple[int, dict[str, str]]:
        asked = health_pb2.HealthCheckRequest(service=service)
        told, ended = self._stub.Check.with_call(asked, timeout=10)
        return told.status, dict(ended.trailing_metadata())

    def watch(self, service: str = "") -> Any:
        return self._stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=30)


@pytest.fixture
def health(upstream: FakeUpstream) -> Iterator[Health]:
    with grpc_server(upstream) as address, grpc.insecure_channel(address) as channel:
        yield Health(channel)


def test_health(health: Health, upstream: FakeUpstream) -> None:
    for service in ("", "expertmesh.v1.Inference", "inference.GRPCInferenceService"):
        assert health.check(service)[0] == SERVING
    watch = health.watch()
    assert next(watch).status == SERVING
    upstream.readiness = Readiness("an expert is missing", (3, 8), 1.5)
    assert next(watch).status == NOT_SERVING
    assert health.check("expertmesh.v1.Inference") == (
        NOT_SERVING,
        {
            "expertmesh-epoch": "3",
            "expertmesh-placement-version": "8",
            "expertmesh-controller-loop-age-s": "1.500",
        },
    )
    with pytest.raises(grpc.RpcError) as caught:
        health.check("nope")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    unknown = health.watch("nope")
    assert next(unknown).status == SERVICE_UNKNOWN
    unknown.cancel()
    upstream.readiness = Readiness("it is deleted", (3, 8), 1.5, is_deleted=True)
    assert not list(watch)  # ends with its deployment


def test_a_watch_does_not_last_for_ever(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_methods, "_MAX_WATCH_S", 0.1)
    assert [reply.status for reply in health.watch()] == [SERVING]


def test_watches_are_bounded_and_an_ended_one_makes_room(
    health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_methods, "_MAX_WATCHES", 2)
    first, second = health.watch(), health.watch()
    assert next(first).status == next(second).status == SERVING
    with pytest.raises(grpc.RpcError) as refused:
        next(health.watch())
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.value.details() == "this gateway already has 2 open watches; use Health/Check"
    assert health.check()[0] == SERVING
    first.cancel()

    def has_room() -> bool:
        try:
            return bool(next(health.watch()))
        except grpc.RpcError:
            return False

    wait_until(has_room, "the ended watch has made room", 20)
    second.cancel()


def test_the_first_model_is_asked_for_once_and_again_when_it_is_gone(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, asked = client.model_info(), []

    def model_info() -> Any:
        asked.append(1)
        return served

    monkeypatch.setattr(client, "model_info", model_info)
    ways = (client.generate, lambda *given: list(client.stream(*given)))
    for ask in ways:
        ask("in")
    assert len(asked) == 1
    for number, ask in enumerate(ways):
        client._session.first_model = "gone"
        with pytest.raises(UnknownModelError):
            ask("in")
        client.generate("in")
        assert len(asked) == 2 + number


async def test_a_call_whose_method_is_no_text_does_not_end_grpcios_server() -> None:
    """For it pyproject.toml bounds grpcio's versions."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    # Until nothing more comes, by when a server that it ends has ended.
    await asyncio.to_thread(said, ("127.0.0.1", port), http2_call("/a\xff/b", b""))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/a/b")(b"", timeout=60.0)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await server.stop(None)
