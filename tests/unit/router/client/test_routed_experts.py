"""Experts of tokens and a prompt's log probabilities, over HTTP and gRPC: whole, streamed, resumed.

Forced experts that are wrong are refused by name.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from cluster.errors import InvalidRequestError
from router.client import Client, Message, PromptLogprobs, Reply, Sampling, wire
from router.config.deployment import GatewayConfig
from router.gateway.input.request.parts import ExpertRows
from tests.local_cluster import LocalCluster
from tests.local_gateway import LocalGateway
from tests.unit.gateway_fakes import serve_grpc
from tests.unit.router.client.broken import Connect, broken_stream, whole_reply
from tests.unit.router.engine.test_engine import prompt_of

PROMPT, COUNT = prompt_of(30, 3), 4
ASKED = Sampling(max_tokens=COUNT, temperature=0.0, ignore_eos=True, return_routed_experts=True)
OF_PROMPT = Sampling(max_tokens=3, temperature=0.0, ignore_eos=True, prompt_logprobs=2, logprobs=1)
BODY = {
    "prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True,
    "return_routed_experts": True,
}  # fmt: skip
SHAPE = (len(PROMPT) + COUNT - 1, 3, 2)


def unpacked(given: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(given["data"])
    return np.frombuffer(data, given["dtype"]).reshape(given["shape"])


def packed(rows: np.ndarray, dtype: str = "uint8") -> dict[str, Any]:
    data = base64.b64encode(rows.astype(dtype).tobytes()).decode()
    return {"data": data, "dtype": dtype, "shape": list(rows.shape)}


def rows_of(pieces: list[Reply]) -> np.ndarray:
    return np.concatenate([p.routed_experts for p in pieces if p.routed_experts is not None])


def test_those_of_http_and_of_both_clients_are_equal(
    gateway: LocalGateway, connect: Connect
) -> None:
    reply = whole_reply(gateway, connect, PROMPT, ASKED)
    [choice] = gateway.post(**BODY).json()["choices"]
    assert reply.routed_experts is not None
    assert (reply.routed_experts.shape, reply.routed_experts.dtype) == (SHAPE, np.uint8)
    assert np.array_equal(unpacked(choice["routed_experts"]), reply.routed_experts)
    for rows in (choice["routed_experts"], packed(GOOD)):
        jsonschema.validate(rows, ExpertRows.model_json_schema())
    [plain] = gateway.post(**BODY | {"return_routed_experts": False}).json()["choices"]
    assert "routed_experts" not in plain
    assert plain["text"] == choice["text"] == reply.text


def test_a_stream_has_each_row_with_the_tokens_after_it(
    gateway: LocalGateway, connect: Connect
) -> None:
    whole = whole_reply(gateway, connect, PROMPT, ASKED)
    with serve_grpc(gateway) as address, connect(address) as client:
        pieces = list(client.stream(PROMPT, ASKED))
    assert np.array_equal(rows_of(pieces), whole.routed_experts)
    num_rows = num_tokens = 0
    for piece in pieces:
        num_rows += 0 if piece.routed_experts is None else len(piece.routed_experts)
        num_tokens += len(piece.token_ids)
        assert not num_tokens or num_rows == len(PROMPT) + num_tokens - 1
    lines = gateway.post(**BODY, stream=True).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    parts = [unpacked(c["routed_experts"]) for c in choices if "routed_experts" in c]
    assert np.array_equal(np.concatenate(parts), whole.routed_experts)


@pytest.mark.parametrize(
    ("asked", "count"),
    [*((ASKED, count) for count in (1, 3, 4, 6)), *((OF_PROMPT, count) for count in (1, 2, 4, 5))],
)
def test_a_broken_stream_goes_on_without_repeating_a_row(
    gateway: LocalGateway, connect: Connect, asked: Sampling, count: int
) -> None:
    whole = whole_reply(gateway, connect, PROMPT, asked)
    pieces = broken_stream(connect, gateway, gateway, PROMPT, asked, count)
    if asked.return_routed_experts:
        assert np.array_equal(rows_of(pieces), whole.routed_experts)
    assert tuple(logprobs_of(pieces)) == whole.prompt_logprobs
    assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids
    assert "".join(piece.text for piece in pieces) == whole.text


@pytest.mark.parametrize("lost_after", [1, 3, 5])
def test_a_router_that_dies_changes_no_row(
    folder: Path, cluster: LocalCluster, gateway: LocalGateway, lost_after: int
) -> None:
    whole = whole_reply(gateway, Client, PROMPT, ASKED)
    losing = LocalGateway(folder, cluster, lost_after=lost_after)
    [choice] = losing.post(**BODY).json()["choices"]
    assert np.array_equal(unpacked(choice["routed_experts"]), whole.routed_experts)
    assert choice["text"] == whole.text


def test_forced_rows_are_replayed_over_both(gateway: LocalGateway, connect: Connect) -> None:
    free = whole_reply(gateway, connect, PROMPT, ASKED)
    assert free.routed_experts is not None
    rows = (free.routed_experts.astype(np.int64) + 3) % 8
    asked = Sampling(
        max_tokens=COUNT, temperature=0.0, ignore_eos=True, return_routed_experts=True,
        routed_experts=rows,
    )  # fmt: skip
    reply = whole_reply(gateway, connect, PROMPT, asked)
    assert np.array_equal(reply.routed_experts, rows)
    for dtype in ("uint8", "uint16"):
        [choice] = gateway.post(**BODY, routed_experts=packed(rows, dtype)).json()["choices"]
        assert np.array_equal(unpacked(choice["routed_experts"]), rows)
        assert choice["text"] == reply.text != free.text


def test_rows_of_a_stop_end_with_its_tokens(gateway: LocalGateway) -> None:
    whole = whole_reply(gateway, Client, PROMPT, ASKED)
    stop = whole.text[1:]
    body = BODY | {"stop": stop, "return_token_ids": True}
    [choice] = gateway.post(**body).json()["choices"]
    assert choice["finish_reason"] == "stop"
    rows = unpacked(choice["routed_experts"])
    assert len(rows) == len(PROMPT) + len(choice["token_ids"]) - 1


def test_a_conversation_and_a_prompt_alone_have_rows(
    gateway: LocalGateway, connect: Connect
) -> None:
    asked = Sampling(max_tokens=2, temperature=0.0, return_routed_experts=True, n=2)
    alone = Sampling(max_tokens=0, return_routed_experts=True)
    with serve_grpc(gateway) as address, connect(address) as client:
        replies = client.generate(messages=[Message("user", "fox")], sampling=asked)
        [reply] = client.generate(PROMPT, alone)
        [info] = client.model_info()
    assert len(replies) == 2
    for chat in replies:
        assert chat.usage is None or chat.routed_experts is not None
        assert chat.routed_experts is not None
    assert reply.routed_experts is not None
    assert reply.routed_experts.shape == (len(PROMPT), *SHAPE[1:])
    assert info.moe_layers == (0, 1, 2)


GOOD = np.tile(np.array([[0, 1], [2, 3], [4, 5]]), (len(PROMPT), 1, 1))
TWICE, BEYOND, LEFT_OUT = GOOD.copy(), GOOD.copy(), GOOD.copy()
TWICE[7, 1], BEYOND[29, 2, 1], LEFT_OUT[0, 0, 0] = 2, 8, 255
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("shape", packed(GOOD[:-1]), "must be [30 to 33, 3, 2]"),
    ("shape", packed(GOOD[:, :2]), "must be [30 to 33, 3, 2]"),
    ("shape", packed(GOOD[:, :, :1]), "must be [30 to 33, 3, 2]"),
    ("shape", packed(GOOD) | {"shape": [30, 6]}, "must have at least 3 items"),
    ("shape", packed(GOOD) | {"shape": [2**62, 3, 2]}, "must be [30 to 33, 3, 2]"),
    ("dtype", packed(GOOD) | {"dtype": "int64"}, "must be 'uint8' or 'uint16'"),
    ("data", packed(GOOD) | {"shape": [31, 3, 2]}, "has 180 bytes; its shape needs 186"),
    ("data", packed(GOOD, "uint16") | {"dtype": "uint8"}, "has 360 bytes; its shape needs 180"),
    ("data", packed(BEYOND), "expert 8 of token 29 in MoE layer 2 does not exist; the model has 8"),
    ("data", packed(LEFT_OUT), "expert 255 of token 0 in MoE layer 0 does not exist; the model"),
    ("data", packed(TWICE), "token 7 has expert 2 twice in MoE layer 1"),
]


@pytest.mark.parametrize(("part", "rows", "told"), BAD)
def test_wrong_rows_are_refused_alike_by_name(
    gateway: LocalGateway,
    part: str,
    rows: dict[str, Any],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = gateway.post(**BODY, routed_experts=rows)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, f"routed_experts.{part}")
    assert told in error["message"]
    message = wire.sampling_message(ASKED)
    message.routed_experts.data = base64.b64decode(rows["data"])
    message.routed_experts.dtype = rows["dtype"]
    message.routed_experts.shape.extend(rows["shape"])
    monkeypatch.setattr("router.client.wire.sampling_message", lambda _: message)
    with (
        serve_grpc(gateway) as address,
        Client(address, retry=None) as client,
        pytest.raises(InvalidRequestError) as caught,
    ):
        client.generate(PROMPT, ASKED)
    assert caught.value.field == f"sampling.routed_experts.{part}"
    assert f"routed_experts.{part}: {caught.value.message}" == error["message"]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"routed_experts": "x"}, "routed_experts"),
        ({"routed_experts": {"data": "", "dtype": "uint8"}}, "routed_experts.shape"),
        *(
            ({"routed_experts": packed(GOOD) | wrong}, f"routed_experts.{part}")
            for wrong, part in (
                ({"more": 1}, "more"),
                ({"dtype": ["uint8"]}, "dtype"),
                ({"shape": "abc"}, "shape"),
                ({"shape": [30, 3, True]}, "shape[2]"),
                ({"shape": [30.0, 3, 2]}, "shape[0]"),
                ({"data": "@@@@"}, "data"),
                ({"data": "äöü"}, "data"),
                ({"data": 5}, "data"),
            )
        ),
        ({"routed_experts": packed(GOOD), "prompt": [PROMPT, PROMPT]}, "routed_experts"),
        ({"routed_experts": packed(GOOD), "on_expert_loss": "drop"}, "on_expert_loss"),
        ({"return_routed_experts": 1}, "return_routed_experts"),
        ({"return_routed_experts": False, "max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_is_no_row_is_refused_by_name(
    gateway: LocalGateway, given: dict[str, Any], field: str
) -> None:
    answer = gateway.post(**BODY | given)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("rows", [[1, 2], [[[0.5]]], [[[-1]]], [[[2**16]]], "x"])
def test_the_clients_send_no_other_arrays(gateway: LocalGateway, rows: Any) -> None:
    with (
        serve_grpc(gateway) as address,
        Client(address, retry=None) as client,
        pytest.raises(InvalidRequestError, match="routed_experts"),
    ):
        client.generate(PROMPT, Sampling(max_tokens=1, routed_experts=rows))


def test_rows_count_towards_the_memory_of_a_request(folder: Path, cluster: LocalCluster) -> None:
    limits = GatewayConfig(max_request_tokens=256)
    small = LocalGateway(folder, cluster, limits)
    length = 170  # with 34 new tokens of 6 bytes each, 38 tokens more
    body = BODY | {"prompt": prompt_of(length, 1), "max_tokens": 34}
    assert small.post(**body).status_code == 200
    refused = small.post(**body | {"max_tokens": 50})
    assert "add up to 262 tokens; at most 256" in refused.json()["error"]["message"]
    assert small.post(**body | {"max_tokens": 50, "return_routed_experts": False}).is_success


def logprobs_of(pieces: list[Reply]) -> list[PromptLogprobs | None]:
    return [row for piece in pieces for row in piece.prompt_logprobs]


def test_the_numbers_are_those_of_http(gateway: LocalGateway, connect: Connect) -> None:
    reply = whole_reply(gateway, connect, PROMPT, OF_PROMPT)
    first, *rows = reply.prompt_logprobs
    body = {"prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 2}
    over_http = gateway.post(**body).json()["choices"][0]["prompt_logprobs"]
    assert (first, over_http[0], len(reply.token_ids)) == (None, None, 3)
    for token_id, row, expected in zip(PROMPT[1:], rows, over_http[1:], strict=True):
        assert expected[str(token_id)]["logprob"] == row.logprob
        assert expected[str(token_id)]["rank"] == row.rank
        assert [expected[str(i)]["logprob"] for i in row.top_ids] == list(row.top_logprobs)


def test_a_stream_has_them_before_the_first_token(gateway: LocalGateway, connect: Connect) -> None:
    whole = whole_reply(gateway, connect, PROMPT, OF_PROMPT)
    with serve_grpc(gateway) as address, connect(address) as client:
        pieces = list(client.stream(PROMPT, OF_PROMPT))
    assert tuple(logprobs_of(pieces)) == whole.prompt_logprobs
    assert sum(bool(piece.prompt_logprobs) for piece in pieces) > 1
    begun = [bool(piece.token_ids) for piece in pieces]
    assert begun == sorted(begun)
    assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids


def test_an_echo_begins_the_text_once(gateway: LocalGateway, connect: Connect) -> None:
    asked = Sampling(max_tokens=2, temperature=0.0, echo=True, logprobs=1)
    with serve_grpc(gateway) as address, connect(address) as client:
        [whole] = client.generate("the quick", asked)
        pieces = list(client.stream("the quick", asked))
        [chat] = client.generate(messages=[Message("user", "fox")], sampling=asked)
    assert whole.text.startswith("the quick")
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(logprobs_of(pieces)) == whole.prompt_logprobs
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
