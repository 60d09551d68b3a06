"""The gRPC methods: alone with a small context, and behind a real server with our client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

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
from router.protos import admin_pb2, inference_pb2
from router.security.keys import ANYBODY
from tests.cluster_fixture import wait_until
from tests.unit import virtual_time
from tests.unit.gateway_fakes import (
    CONTEXT,
    STATUS,
    FakeUpstream,
    Servicer,
    grpc_server,
    says,
    tokenizer,
    vocab_size,
)

CORRUPT, MAX_BYTES = b"\xff\xff\xff", 4 << 20
INFERENCE = "/expertmesh.v1.Inference"
UNARY = [
    "Generate",
    "GetModelInfo",
    "Tokenize",
    "Detokenize",
    "GetStatus",
    "GetLoad",
    "GetUsage",
    "Rebalance",
    "Scale",
    "Drain",
    "SetCopies",
    "Check",
]
STREAMS = ["GenerateStream", "Watch"]


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


def handler(servicer: Servicer, name: str) -> Any:
    """Return what answers a call of a method by its name."""
    methods = servicer.methods.for_clients() | servicer.methods.for_operators()
    [method] = [one for path, one in methods.items() if path.endswith(f"/{name}")]
    return method.handler(ANYBODY, MAX_BYTES)


def call(
    upstream: FakeUpstream, name: str, request: Any, limits: GatewayConfig | None = None
) -> tuple[list[Any], FakeContext]:
    """Call a method; returns its messages and the context."""
    data = request if isinstance(request, bytes) else request.SerializeToString()
    context = FakeContext(data)

    async def run() -> list[Any]:
        answers = handler(Servicer(upstream, limits), name)
        with suppress(AbortError):
            if name in STREAMS:
                await answers.stream_stream(None, context)
            else:
                await context.write(await answers.stream_unary(None, context))
        return context.written

    async def bounded() -> list[Any]:
        return await asyncio.wait_for(run(), 20)

    return asyncio.run(bounded()), context


def request(prompt: str = "in", **sampling: Any) -> Any:
    return inference_pb2.GenerateRequest(
        model="tiny", prompt=prompt, sampling=inference_pb2.Sampling(**sampling)
    )


@pytest.fixture
def upstream() -> FakeUpstream:
    return FakeUpstream(says(" was the word 🙂"))


@pytest.fixture
def client(upstream: FakeUpstream) -> Iterator[Client]:
    with grpc_server(upstream) as address, Client(address) as connected:
        yield connected


@pytest.fixture
def channel(upstream: FakeUpstream) -> Iterator[grpc.Channel]:
    with grpc_server(upstream) as address, grpc.insecure_channel(address) as opened:
        yield opened


def test_generate_fills_every_field_of_the_reply(upstream: FakeUpstream) -> None:
    ids = tokenizer().encode(" was the word 🙂")
    [reply], context = call(upstream, "Generate", request(logprobs=2, max_tokens=9))
    assert context.code is None
    assert (reply.index, reply.text, list(reply.token_ids)) == (0, " was the word 🙂", ids)
    assert (reply.finish_reason, reply.exact) == ("length", True)
    assert [row.token_id for row in reply.logprobs] == ids
    assert [len(row.top) for row in reply.logprobs] == [2] * len(ids)
    assert reply.logprobs[0].token == tokenizer().token_text(ids[0])
    assert reply.usage.total_tokens == len(tokenizer().encode("in")) + len(ids)
    assert not reply.other_choices


def test_a_conversation_is_rendered_by_the_chat_template(
    client: Client, upstream: FakeUpstream
) -> None:
    messages = [Message("developer", "be brief"), Message("user", "in"), Message("assistant", "")]
    [reply] = client.generate(messages=messages, model="tiny")
    pieces = list(client.stream(messages=messages, model="tiny"))
    assert reply.text == "".join(piece.text for piece in pieces) == " was the word 🙂"
    ids = tuple(tokenizer().encode("system: be brief\nuser: in\nassistant: \nassistant:"))
    assert [asked.prompt_token_ids for asked in upstream.requests] == [ids, ids]
    assert upstream.requests[0].sampling.max_tokens == CONTEXT - len(ids)


@pytest.mark.parametrize(
    ("prompt", "messages", "field"),
    [
        (None, [], "prompt"),
        ("in", [Message("user", "in")], "messages"),
        ([5], [Message("user", "in")], "messages"),
        (None, [Message("user", "in"), Message("robot", "in")], "messages[1].role"),
        (None, [Message("", "in")], "messages[0].role"),
        (None, [Message("user", "in"), Message("system", "in")], "messages"),
        (None, [Message("user", "in " * CONTEXT)], "messages"),
        (None, [Message("user", "in")] * 5000, "messages"),
    ],
)
def test_a_request_has_exactly_one_input_that_makes_sense(
    client: Client, prompt: Any, messages: list[Message], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(prompt, messages=messages, model="tiny")
    assert caught.value.field == field
    assert len(str(caught.value)) < 200


def test_a_conversation_with_a_model_without_a_template_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template; send a prompt") as caught:
        client.generate(messages=[Message("user", "in")], model="bare")
    assert caught.value.field == "messages"


def test_choices_beyond_the_first_are_other_choices(upstream: FakeUpstream) -> None:
    [reply], _ = call(upstream, "Generate", request(n=3))
    assert [one.index for one in reply.other_choices] == [1, 2]
    assert {one.text for one in reply.other_choices} == {reply.text}
    assert reply.usage.completion_tokens == 3 * len(reply.token_ids)
    assert not reply.other_choices[0].HasField("usage")


def test_a_stream_has_usage_and_reason_at_the_end(upstream: FakeUpstream) -> None:
    replies, context = call(upstream, "GenerateStream", request())
    assert context.code is None
    assert "".join(reply.text for reply in replies) == " was the word 🙂"
    assert [reply.finish_reason for reply in replies] == [""] * (len(replies) - 1) + ["length"]
    assert [reply.HasField("usage") for reply in replies] == [False] * (len(replies) - 1) + [True]


def test_a_whole_answer_says_in_its_metadata_whether_it_is_exact() -> None:
    for exact, told in ((True, "true"), (False, "false")):
        upstream = FakeUpstream(says(" was", exact=exact))
        [reply], context = call(upstream, "Generate", request(n=2))
        assert [reply.exact, reply.other_choices[0].exact] == [exact, exact]
        assert context.trailing == {"expertmesh-exact": told}


def test_a_stream_says_in_its_metadata_whether_all_of_it_is_exact() -> None:
    def script(request: GenerationRequest) -> Iterator[TokenEvent]:
        for place, exact in enumerate((True, False, True)):  # sent again, and whole the second time
            reason = "length" if place == 2 else None
            yield TokenEvent(0, (5 + place,), (), reason, exact, place)

    replies, context = call(FakeUpstream(script), "GenerateStream", request())
    assert [reply.exact for reply in replies] == [True, False, True]
    assert context.trailing == {"expertmesh-exact": "false"}
    _, context = call(FakeUpstream(says(" was")), "GenerateStream", request())
    assert context.trailing == {"expertmesh-exact": "true"}


def test_an_error_says_nothing_of_exactness() -> None:
    upstream = FakeUpstream(lambda request: [ExpertUnavailableError("gone", "tiny", 1.0)])
    for method in ("Generate", "GenerateStream"):
        _, context = call(upstream, method, request())
        assert context.code is grpc.StatusCode.UNAVAILABLE
        assert "expertmesh-exact" not in context.trailing


@pytest.mark.parametrize("contract", ["strict", "next_expert", "drop"])
def test_the_contract_travels_and_the_client_tells_of_exactness(contract: str) -> None:
    upstream = FakeUpstream(says(" was", exact=contract == "strict"))
    with grpc_server(upstream) as address, Client(address) as client:
        [reply] = client.generate("in", on_expert_loss=contract)
        pieces = list(client.stream("in", on_expert_loss=contract))
    assert [one.on_expert_loss for one in upstream.requests] == [contract] * 2
    assert {reply.exact, *(piece.exact for piece in pieces)} == {contract == "strict"}


def test_only_fields_that_are_set_replace_defaults(upstream: FakeUpstream) -> None:
    call(upstream, "Generate", request())
    call(upstream, "Generate", request(temperature=0, seed=0, top_k=0))
    plain, given = (one.sampling for one in upstream.requests)
    assert (plain.temperature, plain.max_tokens, plain.n) == (1.0, 16, 1)
    assert (given.temperature, given.seed) == (0.0, 0)
    with_zero = inference_pb2.Sampling(max_tokens=0)
    assert with_zero.HasField("max_tokens")
    _, context = call(upstream, "Generate", request(max_tokens=0))
    assert context.details.startswith("sampling.max_tokens:")


def test_the_models_have_the_fields_of_the_messages_and_no_others() -> None:
    of_request = set(inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name)
    of_sampling = set(inference_pb2.Sampling.DESCRIPTOR.fields_by_name)
    assert not of_request & of_sampling  # the model has both, side by side
    assert GrpcRequest.names == (of_request | of_sampling) - {"sampling", "resume"}
    assert set(inference_pb2.TokenizeRequest.DESCRIPTOR.fields_by_name) <= TokenizeRequest.names


@pytest.mark.parametrize("method", UNARY + STREAMS)
def test_corrupt_bytes_are_an_invalid_argument(upstream: FakeUpstream, method: str) -> None:
    messages, context = call(upstream, method, CORRUPT)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "grpc-status-details-bin" in context.trailing
    assert messages == []
    assert upstream.requests == []


def ids_request(*ids: int) -> Any:
    return inference_pb2.GenerateRequest(
        model="tiny", prompt_token_ids=inference_pb2.TokenIds(ids=ids)
    )


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (inference_pb2.GenerateRequest(model="tiny"), "prompt"),
        (request(""), "prompt"),
        (request("x" * 10_000), "prompt"),
        (ids_request(), "prompt_token_ids.ids"),
        (ids_request(3, -1), "prompt_token_ids.ids[1]"),
        (ids_request(vocab_size()), "prompt_token_ids.ids[0]"),
        (request(max_tokens=2**31), "sampling.max_tokens"),
        (request(temperature=float("nan")), "sampling.temperature"),
        (request(top_p=0), "sampling.top_p"),
        (request(stop=["ok", ""]), "sampling.stop[1]"),
        (request(n=17), "sampling.n"),
        (request(logprobs=21), "sampling.logprobs"),
        (inference_pb2.GenerateRequest(model="tiny", prompt="x", timeout_s=-1), "timeout_s"),
        (
            inference_pb2.GenerateRequest(model="tiny", prompt="x", on_expert_loss="guess"),
            "on_expert_loss",
        ),
    ],
)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_bad_fields_are_violations(
    upstream: FakeUpstream, method: str, bad: Any, field: str
) -> None:
    _, context = call(upstream, method, bad)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    status = status_pb2.Status.FromString(context.trailing["grpc-status-details-bin"])
    bad_request = error_details_pb2.BadRequest()
    assert any(one.Unpack(bad_request) for one in status.details)
    assert [one.field for one in bad_request.field_violations] == [field]
    assert upstream.requests == []


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_what_is_not_ours_tells_nothing(method: str) -> None:
    _, context = call(FakeUpstream(lambda _: [ValueError("/secret 7")]), method, request())
    assert context.code is grpc.StatusCode.INTERNAL
    assert "secret" not in context.details + str(context.trailing)


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
    message = request().SerializeToString() if name != "Scale" else b""
    context = FakeContext(message, late_s)
    answers = handler(Servicer(FakeUpstream(says(" was"))), name)
    with suppress(AbortError):
        virtual_time.run((answers.stream_unary or answers.stream_stream)(None, context))
    is_late = late_s > 74
    assert ("did not arrive within 74 s" in context.details) == is_late
    assert (context.code is None) != is_late


def test_a_call_without_a_message_is_refused() -> None:
    context = FakeContext()
    with pytest.raises(AbortError):
        asyncio.run(
            handler(Servicer(FakeUpstream(says(""))), "Generate").stream_unary(None, context)
        )
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "no message" in context.details


def test_cancelling_a_call_ends_it_upstream() -> None:
    upstream = FakeUpstream(says(" was", finish_reason=None), endless=True)

    async def run() -> None:
        generate = handler(Servicer(upstream), "Generate").stream_unary
        context = FakeContext(request().SerializeToString())
        task = asyncio.create_task(generate(None, context))
        while not upstream.requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert upstream.closed.is_set()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_cancelling_a_stream_ends_it_upstream_while_a_message_is_written() -> None:
    upstream = FakeUpstream(says(" was", finish_reason=None), endless=True)

    async def run() -> None:
        context, writes = FakeContext(request().SerializeToString()), asyncio.Event()

        async def never_written(message: Any) -> None:
            writes.set()
            await asyncio.Event().wait()

        context.write = never_written  # type: ignore[method-assign]
        stream = handler(Servicer(upstream), "GenerateStream").stream_stream
        task = asyncio.create_task(stream(None, context))
        await writes.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert upstream.closed.is_set()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_the_client_generates(client: Client, upstream: FakeUpstream) -> None:
    ids = tokenizer().encode(" was the word 🙂")
    replies = client.generate("in", Sampling(n=2, logprobs=1, seed=-5), timeout_s=20)
    assert [one.text for one in replies] == [" was the word 🙂"] * 2
    assert replies[0].token_ids == tuple(ids)
    assert replies[0].logprobs[0].top_ids == (ids[0],)
    assert replies[0].usage == Usage(len(tokenizer().encode("in")), 2 * len(ids))
    assert replies[1].finish_reason == "length"
    assert upstream.requests[0].sampling.seed == -5
    by_ids = client.generate([5, 6], model="tiny")
    assert by_ids[0].text == " was the word 🙂"
    assert upstream.requests[1].prompt_token_ids == (5, 6)


def test_the_client_names_a_priority(client: Client, upstream: FakeUpstream) -> None:
    for priority in (-(2**63), 7):
        client.generate("in", priority=priority)
        list(client.stream("in", priority=priority))
    client.generate("in")
    assert [r.priority for r in upstream.requests] == [-(2**63)] * 2 + [7] * 2 + [0]
    with pytest.raises(InvalidRequestError, match="cannot be sent"):
        client.generate("in", priority=2**63)


def test_the_client_names_a_salt_and_learns_what_was_found() -> None:
    def script(request: GenerationRequest) -> Iterator[TokenEvent]:
        yield TokenEvent(0, (5,), finish_reason="length", cached_tokens=48)

    upstream = FakeUpstream(script)
    with grpc_server(upstream) as address, Client(address) as client:
        [reply] = client.generate("in", cache_salt="tenant 7")
        assert reply.usage == Usage(len(tokenizer().encode("in")), 1, 48)
        [*_, last] = client.stream("in")
        assert last.usage == reply.usage
        with pytest.raises(InvalidRequestError, match="cache_salt"):
            client.generate("in", cache_salt="x" * 257)
    assert [request.cache_salt for request in upstream.requests] == ["tenant 7", ""]


def test_the_client_streams(client: Client) -> None:
    pieces = list(client.stream("in", Sampling(stop=["word"])))
    assert "".join(piece.text for piece in pieces) == " was the "
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].usage is not None


def test_the_client_asks_for_models_and_status(client: Client) -> None:
    assert [model.id for model in client.model_info()] == ["tiny", "bare"]
    [tiny] = client.model_info("tiny")
    assert (tiny.num_experts, tiny.num_experts_per_tok, tiny.dtype) == (8, 2, "float32")
    assert client.status() == STATUS
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


def test_the_client_names_the_bad_field(client: Client) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate([3, -4])
    assert caught.value.field == "prompt_token_ids.ids[1]"
    with pytest.raises(InvalidRequestError, match="cannot be sent"):
        client.generate("in", Sampling(seed=2**70))


def test_nobody_at_the_address_is_unreachable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(UnreachableError):
        client.status()


def test_leaving_a_stream_ends_it_upstream() -> None:
    upstream = FakeUpstream(says(" was", finish_reason=None), endless=True)
    with grpc_server(upstream) as address, Client(address) as client:
        stream = client.stream("in")
        assert next(stream).token_ids
        assert not upstream.closed.is_set()
        stream.close()
        assert upstream.closed.wait(10)


@pytest.mark.parametrize("method", ["Generate", "GetModelInfo", "Tokenize", "Detokenize"])
def test_corrupt_bytes_on_the_wire(channel: grpc.Channel, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"{INFERENCE}/{method}")(CORRUPT, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_health(channel: grpc.Channel, upstream: FakeUpstream) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    serving, not_serving = 1, 2
    everything = health_pb2.HealthCheckRequest()
    assert health.Check(everything, timeout=10).status == serving
    named = health_pb2.HealthCheckRequest(service="expertmesh.v1.Inference")
    assert health.Check(named, timeout=10).status == serving
    watch = health.Watch(everything, timeout=30)
    assert next(watch).status == serving
    upstream.readiness = Readiness("an expert is missing", (3, 8), 1.5)
    assert next(watch).status == not_serving
    watch.cancel()
    told, ended = health.Check.with_call(named, timeout=10)
    assert told.status == not_serving
    assert dict(ended.trailing_metadata()) == {
        "expertmesh-epoch": "3",
        "expertmesh-placement-version": "8",
        "expertmesh-controller-loop-age-s": "1.500",
    }
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="nope"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_watch_ends_with_its_deployment(channel: grpc.Channel, upstream: FakeUpstream) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    upstream.readiness = Readiness("it is deleted", (3, 8), 1.5, is_deleted=True)
    assert not list(watch)


def test_a_watch_does_not_last_for_ever(
    channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_methods, "_MAX_WATCH_S", 0.1)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
    assert [reply.status for reply in watch] == [health_pb2.HealthCheckResponse.SERVING]


def test_watches_are_bounded_and_an_ended_one_makes_room(
    channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_methods, "_MAX_WATCHES", 2)
    health = health_pb2_grpc.HealthStub(channel)
    asked = health_pb2.HealthCheckRequest()
    first, second = (health.Watch(asked, timeout=30) for _ in range(2))
    assert next(first).status == next(second).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as refused:
        next(health.Watch(asked, timeout=30))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.value.details() == "this gateway already has 2 open watches; use Health/Check"
    assert health.Check(asked, timeout=30).status == health_pb2.HealthCheckResponse.SERVING
    first.cancel()

    def has_room() -> bool:
        try:
            return bool(next(health.Watch(asked, timeout=30)))
        except grpc.RpcError:
            return False

    wait_until(has_room, "the ended watch has made room", 20)
    second.cancel()


def test_watching_an_unknown_service_says_so(channel: grpc.Channel) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service="nope"), timeout=10
    )
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_status_as_a_message(upstream: FakeUpstream) -> None:
    [reply], _ = call(upstream, "GetStatus", admin_pb2.GetStatusRequest())
    assert [(one.model, one.layer, one.expert) for one in reply.actors[0].experts] == [
        ("tiny", 0, 1),
        ("tiny", 1, 5),
    ]
    upstream.controller.is_away = True
    _, context = call(upstream, "GetStatus", admin_pb2.GetStatusRequest())
    assert context.code is grpc.StatusCode.UNAVAILABLE


def test_streams_and_stop_strings_need_tokens_as_they_come() -> None:
    upstream = FakeUpstream(says(" was"))
    with grpc_server(upstream) as address, Client(address) as client:
        client.generate("in", model="tiny")
        client.generate("in", Sampling(stop=["x"]), model="tiny")
        list(client.stream("in", model="tiny"))
    assert [request.streamed for request in upstream.requests] == [False, True, True]


def test_the_first_model_is_asked_for_once_and_again_when_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with grpc_server(FakeUpstream(says(" was"))) as address, Client(address) as client:
        served, asked = client.model_info(), []

        def model_info() -> Any:
            asked.append(1)
            return served

        monkeypatch.setattr(client, "model_info", model_info)
        client.generate("in")
        list(client.stream("in"))
        assert len(asked) == 1
        client._session.first_model = "gone"
        with pytest.raises(UnknownModelError):
            client.generate("in")
        client.generate("in")
        client._session.first_model = "gone"
        with pytest.raises(UnknownModelError):
            list(client.stream("in"))
        client.generate("in")
        assert len(asked) == 3
