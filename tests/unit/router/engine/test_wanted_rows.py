"""Of the last layer only the rows are computed that are sampled or scored; they are the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from router.config.capacity import CapacityConfig
from router.engine import batch
from router.engine.batch import StepInput, pack
from router.engine.scheduling.scheduler import Limits
from router.messages.routed import RoutedExperts
from router.model.decoder import MAX_PIECES
from router.moe.layer import StepContext
from router.moe.permute import Part
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.conftest import ALL, OpenCluster, Saves
from tests.unit.router.engine.test_engine import prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
LAST = 2
"""The last layer of the checkpoints of these tests."""
LENGTH = 4


@pytest.fixture
def open_cluster(open_cluster: OpenCluster, monkeypatch: pytest.MonkeyPatch) -> OpenCluster:
    """Open clusters that cut steps of few tokens too."""
    monkeypatch.setattr(batch, "MIN_PIECE_TOKENS", 4)
    return open_cluster


def packed(cluster: LocalCluster, wants_all: bool) -> StepInput:
    return pack(cluster.scheduler.schedule(), cluster.model.attention, MAX_PIECES, wants_all)


def add(cluster: LocalCluster, *prompts: list[int], **sampling: Any) -> None:
    for i, prompt in enumerate(prompts):
        cluster.scheduler.add(greedy_request(f"r{len(prompt)}.{i}", prompt, LENGTH, **sampling))


@pytest.mark.parametrize(
    ("lengths", "scored", "wanted"),
    [
        ([40], None, [[], []]),  # a chunk in the middle of a prompt
        ([10, 6, 4], None, [[9], [5, 9]]),  # the last token of each prompt, in its piece
        # The prompt of one token; then the last of six, and all that is scored or sampled.
        ([6, 1], 5, [[0], None]),
        ([1, 1], None, [None]),  # decodes want all their rows
    ],
    ids=str,
)
def test_what_is_sampled_or_scored_is_wanted(
    open_cluster: OpenCluster,
    lengths: list[int],
    scored: int | None,
    wanted: list[list[int] | None],
) -> None:
    cluster = open_cluster(limits=Limits(32, 20, 64), threaded=False)
    add(cluster, *(prompt_of(length, i) for i, length in enumerate(lengths)))
    if scored:
        add(cluster, prompt_of(scored, 3), prompt_logprobs=2)
    step = packed(cluster, wants_all=False)
    assert [None if p.wanted is None else p.wanted.tolist() for p in step.pieces] == wanted


@pytest.mark.parametrize("family", list(ALL))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wanted_logits_are_those_of_a_step_of_all_rows(
    saved: Saves, open_cluster: OpenCluster, family: str, dtype: str
) -> None:
    prompts = [prompt_of(9, 1), prompt_of(40, 2), prompt_of(3, 3), prompt_of(1, 4)]
    logits = []
    cluster = open_cluster(saved(family).folder, dtype=dtype, threaded=False, prefix_cache=False)
    for wants_all in (True, False):
        add(cluster, *prompts)
        step = packed(cluster, wants_all)
        assert any(piece.wanted is not None for piece in step.pieces) != wants_all
        with torch.inference_mode():
            logits.append(cluster.forward(step))
        for sequence in [*cluster.scheduler.running]:
            cluster.scheduler.finish(sequence)
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_and_scores_are_those_of_an_engine_that_computes_all_rows(
    open_cluster: OpenCluster, dtype: str
) -> None:
    scored = greedy_request("scored", prompt_of(30, 3), LENGTH, prompt_logprobs=2)
    others = [greedy_request(f"r{i}", prompt_of(n, n), LENGTH) for i, n in enumerate((70, 2, 33))]
    outcomes = []
    for wants_all in (True, False):
        cluster = open_cluster(limits=Limits(32, 16, 64), dtype=dtype)
        cluster.engine._wants_all = wants_all
        outcomes.append(cluster.generate(scored, *others))
        rows = sum(f.num_rows for f in cluster.transport.frames if f.layer_id == LAST)
        tokens = 30 + 70 + 2 + 33 + 4 * (LENGTH - 1)
        assert rows == 2 * (tokens if wants_all else 30 + 4 * LENGTH - 1)
    assert outcomes[0] == outcomes[1]


def test_what_happens_to_some_rows_is_their_works_own() -> None:
    """Three works of 2, 3 and 1 tokens, of whose rows the last layer has those of 1, 4 and 5."""
    known = [None] * 3
    context = StepContext(0.0, [2, 3, 1], ["drop", "strict", "drop"], known_deaths=known)
    wanted = np.array([1, 4, 5])
    context.note_not_finite(np.array([True, False, True]), wanted)
    assert context.not_finite == {1}
    record = context.missing_record(wanted)
    record.touch(np.array([0, 2]))
    assert record.inexact == context.missing.inexact == {0, 2}
    assert context.missing.rows_by_contract() == {"drop": 2}
    record.leave_out(LAST, np.array([[6, 7]] * 3), np.array([3]))
    assert context.missing.awaited == {1: {(LAST, 7)}}
    deaths = context.layer_deaths(LAST, wanted, 2)
    deaths.note([Part("a0", 1, (6,), (2,), np.array([0, 4]))])
    seen = [None if d is None else d.times for d in context.deaths.of_chunks]
    assert seen == [1, None, 1]


@pytest.mark.parametrize("contract", ["drop", "next_expert", "strict"])
def test_a_missing_expert_of_the_last_layer_concerns_the_rows_that_are_read(
    open_cluster: OpenCluster, contract: str
) -> None:
    prompt = prompt_of(30, 3)
    asks = replace(greedy_request("asks", prompt, 1), routed=RoutedExperts((3, 2), 8, True))
    [[event]] = open_cluster().generate(asks)
    used = np.frombuffer(event.routed, np.uint8).reshape(-1, 3, 2)[:, LAST]
    own = set(used[len(prompt) - 1].tolist())
    others = set(used[: len(prompt) - 1].ravel().tolist()) - own
    assert own
    assert others
    for lost, is_hit in ((min(own), True), (min(others), False)):
        cluster = open_cluster(threaded=False)
        cluster.lose([(LAST, lost)])
        cluster.scheduler.add(greedy_request("r", prompt, 2, on_expert_loss=contract))
        cluster.engine.step(cluster.scheduler.schedule())
        [sequence] = cluster.scheduler.running
        waits = contract == "strict" and is_hit
        assert bool(sequence.awaited) == waits
        assert sequence.num_generated == (0 if waits else 1)
        assert sequence.exact == (not is_hit or waits)


def test_requests_that_ask_for_experts_get_those_of_all_rows(cluster: LocalCluster) -> None:
    request = greedy_request("r", prompt_of(20, 1), LENGTH)
    cluster.generate(replace(request, routed=RoutedExperts((3, 2), 8, True)))
    rows = sum(f.num_rows for f in cluster.transport.frames if f.layer_id == LAST)
    assert rows == 2 * (20 + LENGTH - 1)


def test_with_a_capacity_all_rows_count(open_cluster: OpenCluster) -> None:
    assert open_cluster(capacity=CapacityConfig(factor=8.0)).engine._wants_all
