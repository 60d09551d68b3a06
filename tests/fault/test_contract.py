"""The only copy of an expert dies: who must have it waits, the others go on, and say how."""

from __future__ import annotations

import grpc
import httpx
import pytest
import torch

from cluster.errors import Code, ExpertMeshError
from cluster.reports import ActorStatus
from router.client import Reply
from router.protos import inference_pb2, inference_pb2_grpc
from tests.checkpoints import VOCAB_SIZE
from tests.cluster_fixture import (
    RANDOM,
    TOP_K,
    ServedCluster,
    StreamReader,
    greedy,
    wait_until,
)
from tests.fault.faults import (
    BEFORE,
    PROMPTS,
    kill,
    let_go,
    stopped,
    wait_stalled,
)

VICTIM = "expert-1"
DURING = 10
"""Tokens that a stream must have had while the experts are missing."""
LENGTH, WAIT_S, LOST_S = 120, 60.0, 10.0
SHORT_S = 0.5


def is_missing(served: ServedCluster) -> bool:
    """Tell whether the gateway knows of experts without a copy."""
    return "no live copy" in httpx.get(f"{served.http_url}/ready").text


def without_need_of(served: ServedCluster, actor: ActorStatus) -> list[int]:
    """Return a prompt of one token that goes to none of an actor's experts, by transformers."""
    held = {(layer, expert) for model, layer, expert in actor.experts if model == RANDOM}
    prompts = torch.arange(2, VOCAB_SIZE)[:, None]
    with torch.inference_mode():
        layers = served.oracle(prompts, output_router_logits=True).router_logits
    for row, prompt in enumerate(prompts.tolist()):
        choices = [logits[row].topk(TOP_K).indices.tolist() for logits in layers]
        if not held & {(layer, e) for layer, chosen in enumerate(choices) for e in chosen}:
            return list(prompt)
    pytest.fail("every token needs the actor")


def exact_part(pieces: list[Reply]) -> tuple[int, ...]:
    """Return the tokens of a stream before the first piece that is not exact."""
    flags = [piece.exact for piece in pieces]
    first = flags.index(False)
    assert not any(flags[first:])
    return tuple(token_id for piece in pieces[:first] for token_id in piece.token_ids)


def check_late(served: ServedCluster) -> None:
    """Check that a strict request whose deadline passes is told to come again."""
    with pytest.raises(ExpertMeshError) as late:
        served.client.generate(PROMPTS[2], greedy(9), model=RANDOM, timeout_s=SHORT_S)
    assert late.value.code is Code.UNAVAILABLE
    assert late.value.retry_after_s


def check_flagged(served: ServedCluster) -> None:
    """Check that every surface says of an answer that it is not exact."""
    body = {"model": RANDOM, "prompt": PROMPTS[3], "max_tokens": 4, "on_expert_loss": "drop"}
    response = httpx.post(f"{served.http_url}/v1/completions", json=body, timeout=LOST_S)
    assert response.headers["x-expertmesh-exact"] == "false"
    assert response.json()["choices"][0]["exact"] is False
    request = inference_pb2.GenerateRequest(model=RANDOM, on_expert_loss="next_expert")
    request.prompt_token_ids.ids.extend(PROMPTS[3])
    with grpc.insecure_channel(served.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        whole, call = stub.Generate.with_call(request, timeout=LOST_S)
        assert not whole.exact
        assert dict(call.trailing_metadata())["expertmesh-exact"] == "false"
        pieces = stub.GenerateStream(request, timeout=LOST_S)
        assert not list(pieces)[-1].exact
        assert dict(pieces.trailing_metadata())["expertmesh-exact"] == "false"


def test_each_contract_is_kept_while_the_only_copy_is_away(served: ServedCluster) -> None:
    told, before = served.status(), served.actors()
    free = without_need_of(served, before[VICTIM])
    answer = served.expected(free, 1)
    prompts = PROMPTS[:2]
    expected = [served.expected(prompt, LENGTH) for prompt in prompts]
    sampling = greedy(LENGTH)
    streams = [StreamReader(served.client, p, sampling, RANDOM, WAIT_S) for p in prompts]
    going = {
        contract: StreamReader(served.client, prompts[0], sampling, RANDOM, WAIT_S, contract)
        for contract in ("next_expert", "drop")
    }
    for stream in (*streams, *going.values()):
        stream.wait_tokens(BEFORE)
    kill(told, before[VICTIM].pid)
    wait_until(lambda: is_missing(served), "the loss is known", LOST_S)
    fresh = StreamReader(served.client, prompts[1], sampling, RANDOM, WAIT_S, "next_expert")
    fresh.wait_tokens(DURING, LOST_S)
    # The successor is on its way, but nobody hears of it while the controller hangs.
    with stopped(told, told.controller_pid):
        assert is_missing(served)
        wait_stalled(streams)
        [reply] = served.client.generate(free, greedy(1), model=RANDOM, timeout_s=LOST_S)
        assert (reply.token_ids, reply.exact) == (answer, True)
        check_late(served)
        check_flagged(served)
        assert is_missing(served)
        assert not any(stream.ended for stream in streams)
        let_go(told, told.controller_pid)

    assert [stream.result() for stream in streams] == expected
    assert all(piece.exact for stream in streams for piece in stream.pieces)
    assert len(fresh.result()) == LENGTH
    assert not any(piece.exact for piece in fresh.pieces)
    for contract, stream in going.items():
        assert len(stream.result()) == LENGTH
        exact = exact_part(stream.pieces)
        assert len(exact) >= BEFORE
        assert exact == expected[0][: len(exact)]
        inexact = served.metric("expertmesh_inexact_tokens_total")
        labels = f'{{model_name="{RANDOM}",reason="{contract}",'
        told = sum(value for name, value in inexact.items() if labels in name)
        assert told >= LENGTH - len(exact)
    served.wait_whole()
