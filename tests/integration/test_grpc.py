"""gRPC as clients meet it: our client, reflection, health, and bytes that are no message."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from transformers import AutoTokenizer

from experts.checkpoint.stored import resolve_folder
from router.client import AsyncClient, Client, Message, Sampling
from router.client.access import admin_address_of
from router.protos import inference_pb2, inference_pb2_grpc
from tests.cluster_fixture import (
    LAYERS,
    NUM_EXPERTS,
    RANDOM,
    RANDOM_CONTEXT,
    TINY,
    TOP_K,
    ServedCluster,
    greedy,
    prompt_of,
)

PACKAGE = "expertmesh.v1"


def test_text_in_and_text_out(served: ServedCluster) -> None:
    [reply] = served.client.generate("In the beginning", greedy(12), model=TINY)
    assert reply.finish_reason == "length"
    assert len(reply.token_ids) == 12
    assert reply.text
    assert reply.exact
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 12
    assert reply.usage.prompt_tokens > 0


def test_the_asynchronous_client_asks_many_at_once_and_hears_the_same(
    served: ServedCluster,
) -> None:
    prompts = [f"In the year {year}" for year in range(6)]
    alone = [served.client.generate(one, greedy(8), model=TINY)[0] for one in prompts]

    async def ask(client: AsyncClient, prompt: str) -> tuple[str, tuple[int, ...]]:
        pieces = [one async for one in client.stream(prompt, greedy(8), model=TINY)]
        return "".join(p.text for p in pieces), tuple(t for p in pieces for t in p.token_ids)

    async def ask_all() -> list[tuple[str, tuple[int, ...]]]:
        async with asyncio.timeout(60), AsyncClient(served.grpc_address) as client:
            assert [model.id for model in await client.model_info()] == [TINY, RANDOM]
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    assert asyncio.run(ask_all()) == [(one.text, one.token_ids) for one in alone]


def test_a_conversation_is_answered_as_its_rendered_text_is(served: ServedCluster) -> None:
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]
    tokenizer = AutoTokenizer.from_pretrained(resolve_folder("models/mesh-tiny"))
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    messages = [Message(one["role"], one["content"]) for one in said]
    [chat] = served.client.generate(messages=messages, sampling=greedy(10), model=TINY)
    [plain] = served.client.generate(ids, greedy(10), model=TINY)
    assert chat.usage is not None
    assert plain.usage is not None
    assert plain.usage.prompt_tokens == chat.usage.prompt_tokens == len(ids)
    assert replace(chat, usage=None) == replace(plain, usage=None)  # one may find the other's pages


def test_without_a_model_the_first_served_one_answers(served: ServedCluster) -> None:
    [reply] = served.client.generate("In the beginning", greedy(5))
    [named] = served.client.generate("In the beginning", greedy(5), model=TINY)
    assert reply.token_ids == named.token_ids


def test_a_stream_comes_in_pieces_that_make_the_whole(served: ServedCluster) -> None:
    [whole] = served.client.generate("In the beginning", greedy(30), model=TINY)
    pieces = list(served.client.stream("In the beginning", greedy(30), model=TINY))
    assert len(pieces) > 10
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(t for piece in pieces for t in piece.token_ids) == whole.token_ids
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].usage == whole.usage


def test_what_a_reader_does_not_take_comes_in_few_pieces(served: ServedCluster) -> None:
    choices, length, begun = 4, 300, 40
    sampling = greedy(length, n=choices, logprobs=20)
    wholes = served.client.generate("In the beginning", sampling, model=TINY)
    first_tokens = list(wholes[0].token_ids)
    request = inference_pb2.GenerateRequest(
        model=TINY,
        prompt="In the beginning",
        timeout_s=60,
        sampling=inference_pb2.Sampling(
            max_tokens=length, temperature=0.0, ignore_eos=True, n=choices, logprobs=20
        ),
    )
    # Else gRPC would take more than is to come before anyone asks for it.
    small = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(served.grpc_address, options=small) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        stream = stub.GenerateStream(request, timeout=60)
        pieces = [next(stream) for _ in range(begun)]
        served.settled_tokens()  # all are there, and nobody has asked for them
        assert served.running() == 1
        request.sampling.max_tokens = 20
        assert list(stub.Generate(request, timeout=10).token_ids) == first_tokens[:20]
        [other] = served.client.generate("In the beginning", greedy(20), model=TINY, timeout_s=10)
        assert list(other.token_ids) == first_tokens[:20]
        pieces += stream
    for index, whole in enumerate(wholes):
        own = [piece for piece in pieces if piece.index == index]
        assert tuple(t for piece in own for t in piece.token_ids) == whole.token_ids
        assert "".join(piece.text for piece in own) == whole.text
        assert [row.token_id for piece in own for row in piece.logprobs] == list(whole.token_ids)
        assert len(own[-1].token_ids) > length / 4
    assert len(pieces) < choices * length / 2


def test_choices_logprobs_and_stops(served: ServedCluster) -> None:
    sampling = Sampling(max_tokens=8, seed=3, n=3, logprobs=2, ignore_eos=True)
    replies = served.client.generate("God said", sampling, model=TINY)
    assert [reply.index for reply in replies] == [0, 1, 2]
    for reply in replies:
        assert len(reply.logprobs) == len(reply.token_ids) == 8
        assert all(len(row.top_ids) == 2 and row.logprob <= 0 for row in reply.logprobs)
    assert len({reply.token_ids for reply in replies}) > 1
    [plain] = served.client.generate("God said", greedy(30), model=TINY)
    stop = plain.text[5:8]
    [stopped] = served.client.generate("God said", greedy(30, stop=[stop]), model=TINY)
    assert stopped.finish_reason == "stop"
    assert stopped.text == plain.text[: plain.text.index(stop)]


def test_model_info_tells_each_models_numbers(served: ServedCluster) -> None:
    infos = {info.id: info for info in served.client.model_info()}
    assert set(infos) == {TINY, RANDOM}
    for model, info in infos.items():
        assert info.family == "mixtral"
        assert (info.num_experts, info.num_experts_per_tok) == (NUM_EXPERTS, TOP_K)
        assert info.num_layers == LAYERS[model]
        assert info.dtype == "float32"
    assert infos[RANDOM].max_model_len == RANDOM_CONTEXT
    assert served.client.model_info(RANDOM) == [infos[RANDOM]]


def test_a_client_that_knows_nothing_calls_through_reflection(served: ServedCluster) -> None:
    with grpc.insecure_channel(served.grpc_address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {f"{PACKAGE}.Inference", "grpc.health.v1.Health"} <= services
        assert f"{PACKAGE}.Admin" not in services
        method = (
            DescriptorPool(database)
            .FindServiceByName(f"{PACKAGE}.Inference")
            .FindMethodByName("Generate")
        )
        request = GetMessageClass(method.input_type)(
            model=RANDOM,
            prompt_token_ids={"ids": prompt_of(9, 1)},
            sampling={"max_tokens": 6, "temperature": 0.0, "ignore_eos": True},
        )
        call = channel.unary_unary(
            f"/{PACKAGE}.Inference/Generate",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        reply: Any = call(request, timeout=30)
    assert tuple(reply.token_ids) == served.expected(prompt_of(9, 1), 6)
    with grpc.insecure_channel(admin_address_of(served.grpc_address)) as channel:
        services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert services == {f"{PACKAGE}.Admin", "grpc.reflection.v1alpha.ServerReflection"}


def test_operators_methods_are_on_their_own_port_alone(served: ServedCluster) -> None:
    method = f"/{PACKAGE}.Admin/Drain"
    with (
        grpc.insecure_channel(served.grpc_address) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        channel.unary_unary(method)(b"", timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with grpc.insecure_channel(admin_address_of(served.grpc_address)) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(method)(b"", timeout=10)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(f"/{PACKAGE}.Inference/GetModelInfo")(b"", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_serve_tells_nobody_which_applications_there_are(served: ServedCluster) -> None:
    with grpc.insecure_channel(served.grpc_address) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/ray.serve.RayServeAPIService/ListApplications")(b"", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_health_is_serving(served: ServedCluster) -> None:
    with grpc.insecure_channel(served.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", f"{PACKAGE}.Inference"):
            request = health_pb2.HealthCheckRequest(service=service)
            reply, ended = health.Check.with_call(request, timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            metadata = dict(ended.trailing_metadata())
            told = served.status()
            assert metadata["expertmesh-epoch"] == str(told.epoch)
            assert metadata["expertmesh-placement-version"] == str(told.placement_version)
            assert 0 <= float(metadata["expertmesh-controller-loop-age-s"]) < 10
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="nope"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("method", "streams"),
    [
        ("Inference/Generate", False),
        ("Inference/GenerateStream", True),
        ("Inference/GetModelInfo", False),
        ("Admin/GetStatus", False),
    ],
)
def test_bytes_that_are_no_protobuf_are_an_invalid_argument(
    served: ServedCluster, method: str, streams: bool
) -> None:
    before = served.pids()
    address = served.grpc_address
    if method.startswith("Admin"):
        address = admin_address_of(address)
    with grpc.insecure_channel(address) as channel:
        open_call = channel.unary_stream if streams else channel.unary_unary
        call = open_call(f"/{PACKAGE}.{method}")
        answer = call(b"\xff\xff\xff", timeout=30) if streams else None
        with pytest.raises(grpc.RpcError) as caught:
            next(answer) if answer else call(b"\xff\xff\xff", timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    trailing = dict(caught.value.trailing_metadata())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    details = [
        packed for packed in status.details if packed.Is(error_details_pb2.BadRequest.DESCRIPTOR)
    ]
    bad_request = error_details_pb2.BadRequest()
    assert details[0].Unpack(bad_request)
    assert "not a" in bad_request.field_violations[0].description
    [reply] = served.client.generate("In", greedy(2), model=TINY)
    assert len(reply.token_ids) == 2
    assert served.pids() == before


def test_several_clients_at_once_each_get_their_own(served: ServedCluster) -> None:
    prompts = [prompt_of(4 + i, i) for i in range(4)]
    streams = []
    clients = [Client(served.grpc_address) for _ in prompts]
    for client, prompt in zip(clients, prompts, strict=True):
        streams.append(client.stream(prompt, greedy(20), model=RANDOM, timeout_s=30))
    for stream, prompt in zip(streams, prompts, strict=True):
        tokens = tuple(token for piece in stream for token in piece.token_ids)
        assert tokens == served.expected(prompt, 20)
    for client in clients:
        client.close()
