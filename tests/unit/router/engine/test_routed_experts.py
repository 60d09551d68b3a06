"""The experts of tokens: as transformers chooses them, forced, in a crowd, after failures."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.native import native
from router.config.capacity import CapacityConfig
from router.engine.scheduling.scheduler import Limits
from router.messages.request import GenerationRequest, Received, TokenEvent
from router.messages.routed import RoutedExperts, dtype_of
from tests.emulated_device import emulated_device
from tests.emulated_steps import Steps
from tests.local_cluster import LocalCluster, greedy_request
from tests.routed_oracle import WEIGHTS, logits_under, used_by
from tests.unit.router.engine.conftest import FAMILIES, OpenCluster, Saves
from tests.unit.router.engine.test_engine import prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH, COUNT = 37, 5
PROMPT = prompt_of(LENGTH, 7)
CHUNKED = Limits(4, 16, 16)
"""The prompt takes three steps."""


@pytest.fixture
def cluster(open_cluster: OpenCluster) -> LocalCluster:
    return open_cluster(limits=CHUNKED)


def shape_of(cluster: LocalCluster) -> tuple[int, int]:
    shape = cluster.checkpoint.shape
    return len(shape.layers), shape.num_experts_per_tok


def asked(
    cluster: LocalCluster,
    name: str,
    count: int = COUNT,
    prompt: list[int] | None = None,
    forced: np.ndarray | None = None,
    returned: bool = True,
    **sampling: Any,
) -> GenerationRequest:
    request = greedy_request(name, prompt or PROMPT, count, logprobs=3, **sampling)
    num_experts = cluster.checkpoint.shape.num_experts
    rows = b"" if forced is None else forced.astype(dtype_of(num_experts)).tobytes()
    return replace(request, routed=RoutedExperts(shape_of(cluster), num_experts, returned, rows))


def rows_of(cluster: LocalCluster, event: TokenEvent) -> np.ndarray:
    dtype = dtype_of(cluster.checkpoint.shape.num_experts)
    return np.frombuffer(event.routed, dtype).reshape(-1, *shape_of(cluster))


def other_rows(cluster: LocalCluster, num_tokens: int) -> np.ndarray:
    """Return experts that no gate would choose: drawn ones."""
    generator = np.random.default_rng(3)
    num_layers, top_k = shape_of(cluster)
    drawn = generator.random((num_tokens, num_layers, cluster.checkpoint.shape.num_experts))
    return drawn.argsort(axis=2)[:, :, :top_k]


def without_rows(event: TokenEvent) -> TokenEvent:
    return replace(event, routed=b"", routed_start=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_transformers(
    saved: Saves, open_cluster: OpenCluster, family: str
) -> None:
    folder, model = saved(family)
    cluster = open_cluster(folder, limits=CHUNKED)
    [[event]] = cluster.generate(asked(cluster, "r"))
    rows = rows_of(cluster, event)
    expected = used_by(model, [*PROMPT, *event.token_ids[:-1]])
    assert rows.shape == expected.shape == (LENGTH + COUNT - 1, *shape_of(cluster))
    assert np.array_equal(np.sort(rows, axis=2), expected.sort(dim=2).values.numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_own_experts_forced_change_no_bit(
    saved: Saves, open_cluster: OpenCluster, family: str, dtype: str
) -> None:
    cluster = open_cluster(saved(family).folder, limits=CHUNKED, dtype=dtype)
    plain = replace(asked(cluster, "plain", prompt_logprobs=2), routed=None)
    [[expected]] = cluster.generate(plain)
    [[free]] = cluster.generate(asked(cluster, "free", prompt_logprobs=2))
    rows = rows_of(cluster, free)
    [[forced]] = cluster.generate(asked(cluster, "forced", forced=rows, prompt_logprobs=2))
    begun = asked(cluster, "begun", forced=rows[: LENGTH + 2], prompt_logprobs=2)
    [[later]] = cluster.generate(begun)
    assert without_rows(free) == expected
    assert forced == later == free


@pytest.mark.parametrize("family", WEIGHTS)
def test_other_experts_forced_give_what_follows_from_them(
    saved: Saves, open_cluster: OpenCluster, family: str
) -> None:
    """Reinforcement learning's use: the log probabilities of given tokens under given experts."""
    folder, model = saved(family)
    cluster = open_cluster(folder, limits=CHUNKED)
    rows = other_rows(cluster, LENGTH)
    [[event]] = cluster.generate(asked(cluster, "r", 0, forced=rows, prompt_logprobs=0))
    logprobs = logits_under(model, family, PROMPT, torch.from_numpy(rows)).log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(PROMPT[1:]).unsqueeze(1)).squeeze(1)
    assert [row.logprob for row in event.prompt_logprobs] == pytest.approx(
        expected.tolist(), abs=1e-4
    )
    assert np.array_equal(rows_of(cluster, event), rows)


@pytest.mark.skipif(native is None, reason="bits are promised in native code alone")
def test_forced_experts_change_no_bit_of_others_in_a_step(open_cluster: OpenCluster) -> None:
    crowded = open_cluster(limits=Limits(32, 32, 64), dtype="bfloat16")
    free = [
        replace(asked(crowded, f"f{i}", prompt=prompt_of(9 + i, i)), routed=None) for i in (1, 2)
    ]
    watched = asked(crowded, "w", prompt=prompt_of(20, 4))
    forced = [
        asked(crowded, f"x{i}", prompt=prompt_of(11 * i, i), forced=other_rows(crowded, 11 * i + 2))
        for i in (1, 2)
    ]
    alone = [crowded.generate(request)[0] for request in (*free, watched, *forced)]
    together = [replace(r, request_id=f"{r.request_id}/2") for r in (*free, watched, *forced)]
    assert crowded.generate(*together) == alone


def test_pieces_of_a_step_and_chunks_have_the_same_rows(
    open_cluster: OpenCluster, cluster: LocalCluster
) -> None:
    whole = open_cluster(limits=Limits(4, 512, 16))  # 250 tokens are two pieces of a step
    prompt = prompt_of(256 - COUNT, 5)
    [[event]] = whole.generate(asked(whole, "r", prompt=prompt))
    [[in_chunks]] = cluster.generate(asked(cluster, "r", prompt=prompt))
    assert (event.routed, event.token_ids) == (in_chunks.routed, in_chunks.token_ids)


def test_each_choice_has_its_rows(cluster: LocalCluster) -> None:
    request = asked(cluster, "r", n=3)
    sampling = replace(request.sampling, temperature=1.0, seed=5)
    events = cluster.generate(replace(request, sampling=sampling))[0]
    assert len({event.token_ids for event in events}) == 3
    rows = [rows_of(cluster, event) for event in events]
    assert len({part[LENGTH:].tobytes() for part in rows}) == 3
    assert len({part[:LENGTH].tobytes() for part in rows}) == 1
    forced = asked(cluster, "f", n=3, forced=rows[1])
    again = cluster.generate(replace(forced, sampling=sampling))[0]
    assert again[1] == events[1]


def test_a_prompt_alone_has_a_row_for_each_token(cluster: LocalCluster) -> None:
    [[event]] = cluster.generate(asked(cluster, "r", 0))
    [[longer]] = cluster.generate(asked(cluster, "l"))
    assert (event.token_ids, event.finish_reason) == ((), "length")
    assert len(rows_of(cluster, event)) == LENGTH
    assert longer.routed.startswith(event.routed)


def test_a_resumed_request_gets_what_it_lacks(cluster: LocalCluster) -> None:
    [[whole]] = cluster.generate(asked(cluster, "whole"))
    for num_tokens, num_rows in itertools.product(range(COUNT), (0, 7, LENGTH)):
        received = Received(whole.token_ids[:num_tokens], num_routed=num_rows)
        name = f"without {num_tokens} tokens and {num_rows} rows"
        request = replace(asked(cluster, name), received=(received,))
        [[rest]] = cluster.generate(request)
        start = LENGTH + num_tokens - 1 if num_tokens else num_rows
        assert rest.token_ids == whole.token_ids[num_tokens:]
        row_bytes = request.routed.row_bytes if request.routed else 0
        assert rest.routed == whole.routed[start * row_bytes :]
        assert rest.routed_start == (start if rest.routed else 0)


@pytest.mark.skipif(native is None, reason="pages are shared in native code alone")
def test_shared_pages_hide_no_row_and_forced_ones_are_not_shared(open_cluster: OpenCluster) -> None:
    cluster = open_cluster(limits=CHUNKED, identity="one")
    bare = open_cluster(limits=CHUNKED, prefix_cache=False, identity="one")
    rows = other_rows(cluster, LENGTH + 3)
    kinds: list[dict[str, Any]] = [
        {"returned": True},
        {"forced": rows},
        {"forced": rows, "returned": False, "prompt_logprobs": 1},
        {"forced": rows[::-1].copy()},
    ]
    requests = [asked(cluster, f"r{i}", **kind) for i, kind in enumerate(kinds)]
    plain = replace(asked(cluster, "plain"), routed=None)
    order = [requests[1], plain, *requests, plain, requests[0]]
    numbered = [replace(r, request_id=f"{i}") for i, r in enumerate(order)]
    expected = [bare.generate(request)[0] for request in numbered]
    found = [cluster.generate(request)[0] for request in numbered]
    cached = [event.cached_tokens for [event] in found]
    assert [[replace(event, cached_tokens=0)] for [event] in found] == expected
    assert cached == [0, 0, 0, 0, 0, 0, 32, 0]


def test_rows_say_what_took_the_place_of_a_missing_expert(cluster: LocalCluster) -> None:
    [[whole]] = cluster.generate(asked(cluster, "whole"))
    before = rows_of(cluster, whole)
    layer = cluster.checkpoint.shape.layers[0]
    expert = int(before[3, 0, 0])
    cluster.lose([(layer, expert)])
    found = {}
    for contract in ("next_expert", "drop"):
        request = replace(asked(cluster, contract), on_expert_loss=contract)
        [[event]] = cluster.generate(request)
        assert not event.exact
        found[contract] = rows_of(cluster, event)[:LENGTH, 0]
        assert expert not in found[contract]
    lost = (before[:LENGTH, 0] == expert).any(axis=1)
    num_experts = cluster.checkpoint.shape.num_experts
    assert (found["next_expert"] < num_experts).all()
    for contract, rows in found.items():
        assert np.array_equal(rows[~lost], before[:LENGTH, 0][~lost]), contract
    assert ((found["drop"] == 255).sum(axis=1) == lost).all()
    kept = np.sort(np.where(found["drop"] == 255, expert, found["drop"]), axis=1)
    assert np.array_equal(kept, np.sort(before[:LENGTH, 0], axis=1))


def test_a_forced_expert_that_is_missing_is_waited_for(cluster: LocalCluster) -> None:
    rows = other_rows(cluster, LENGTH)
    rows[:16, 1] = [0, 1]
    rows[20, 1] = [7, 5]
    [[expected]] = cluster.generate(asked(cluster, "before", forced=rows))
    cluster.lose([(cluster.checkpoint.shape.layers[1], 7)])
    cluster.engine.submit(asked(cluster, "waits", forced=rows))
    cluster.wait("waits", bool)  # the rows of the first chunk
    while not cluster.scheduler.parked():
        time.sleep(0.001)
    cluster.lose([])
    assert cluster.result(asked(cluster, "waits")) == [expected]


def test_rows_say_where_an_expert_without_room_sent_its_tokens(open_cluster: OpenCluster) -> None:
    cluster = open_cluster(limits=CHUNKED, capacity=CapacityConfig(tokens=6))
    [[event]] = cluster.generate(asked(cluster, "r"))
    rows = rows_of(cluster, event)[:16]  # the first step
    assert not event.exact
    for layer, expert in itertools.product(range(rows.shape[1]), range(8)):
        assert (rows[:, layer] == expert).sum() <= 6


def test_a_router_on_a_device_has_the_rows_of_the_host(
    open_cluster: OpenCluster, cluster: LocalCluster
) -> None:
    [[expected]] = cluster.generate(asked(cluster, "r"))
    rows = other_rows(cluster, LENGTH)
    [[other]] = cluster.generate(asked(cluster, "f", forced=rows))
    with emulated_device() as device:
        there = open_cluster(limits=CHUNKED, device=device.device)
        steps = Steps(there, device)
        [[event]] = there.generate(asked(there, "r"))
        [[forced]] = there.generate(asked(there, "f", forced=rows))
        there.close()
        steps.have_one_copy_each_way_a_layer(len(there.checkpoint.shape.layers))
    assert (event.token_ids, event.routed) == (expected.token_ids, expected.routed)
    assert (forced.token_ids, forced.routed) == (other.token_ids, other.routed)
