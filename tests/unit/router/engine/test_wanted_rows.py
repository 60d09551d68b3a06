"""Of the last layer only the rows are computed that are sampled or scored; they are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS
from tests.grok_oracle import save_grok
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.conftest import Saved
from tests.unit.router.engine.test_engine import prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
ALL: dict[str, Callable[..., Any]] = {"mixtral": save_mixtral, "grok": save_grok, **SAVERS}
LAST = 2
"""The last layer of the checkpoints of these tests."""
LENGTH = 4


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut steps of few tokens too."""
    monkeypatch.setattr(batch, "MIN_PIECE_TOKENS", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(path)
    return path


def packed(cluster: LocalCluster, wants_all: bool) -> StepInput:
    return pack(cluster.scheduler.schedule(), cluster.model.attention, MAX_PIECES, wants_all)


def wanted_of(step: StepInput) -> list[list[int] | None]:
    return [None if p.wanted is None else p.wanted.tolist() for p in step.pieces]


def add(cluster: LocalCluster, *prompts: list[int], **options: Any) -> None:
    for i, prompt in enumerate(prompts):
        cluster.scheduler.add(greedy_request(f"r{i}", prompt, LENGTH, **options))


def test_a_chunk_in_the_middle_of_a_prompt_wants_no_row(folder: Path) -> None:
    cluster = LocalCluster(folder, 8, Limits(32, 16, 64), threaded=False)
    add(cluster, prompt_of(40, 1))
    assert wanted_of(packed(cluster, wants_all=False)) == [[]]
    cluster.close()


@pytest.mark.usefixtures("short")
def test_the_last_token_of_each_prompt_is_wanted_in_its_piece(folder: Path) -> None:
    cluster = LocalCluster(folder, 8, threaded=False)
    add(cluster, prompt_of(10, 1), prompt_of(6, 2), prompt_of(4, 3))
    step = packed(cluster, wants_all=False)
    assert [p.tokens for p in step.pieces] == [slice(0, 10), slice(10, 20)]
    assert wanted_of(step) == [[9], [5, 9]]
    cluster.close()


def test_scored_rows_and_all_rows_of_short_prompts_are_wanted(folder: Path) -> None:
    cluster = LocalCluster(folder, 8, threaded=False)
    add(cluster, prompt_of(6, 1), prompt_of(1, 2))
    request = greedy_request("scored", prompt_of(5, 3), LENGTH)
    sampling = replace(request.sampling, prompt_logprobs=2)
    cluster.scheduler.add(replace(request, sampling=sampling))
    step = packed(cluster, wants_all=False)
    # The prompt of one token comes first, then the last of six, and all that is scored or sampled.
    assert wanted_of(step) == [[0, 6, 7, 8, 9, 10, 11]]
    cluster.close()


def test_decodes_want_all_their_rows(folder: Path) -> None:
    cluster = LocalCluster(folder, 8, threaded=False)
    add(cluster, [3], [4])
    assert wanted_of(packed(cluster, wants_all=False)) == [None]
    cluster.close()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("family", list(ALL))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wanted_logits_are_those_of_a_step_of_all_rows(
    saved: Callable[..., Saved], family: str, dtype: str
) -> None:
    prompts = [prompt_of(9, 1), prompt_of(40, 2), prompt_of(3, 3), prompt_of(1, 4)]
    logits = []
    cluster = LocalCluster(saved(family).folder, dtype=dtype, threaded=False, prefix_cache=False)
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
    folder: Path, dtype: str
) -> None:
    request = greedy_request("scored", prompt_of(30, 3), LENGTH)
    scored = replace(request, sampling=replace(request.sampling, prompt_logprobs=2))
    others = [greedy_request(f"r{i}", prompt_of(n, n), LENGTH) for i, n in enumerate((70, 2, 33))]
    outcomes = []
    for wants_all in (True, False):
        cluster = LocalCluster(folder, 8, Limits(32, 16, 64), dtype=dtype)
        cluster.engine._wants_all = wants_all
        outcomes.append(cluster.generate(scored, *others))
        rows = sum(f.num_rows for f in cluster.transport.frames if f.layer_id == LAST)
        tokens = 30 + 70 + 2 + 33 + 4 * (LENGTH - 1)
        assert rows == 2 * (tokens if wants_all else 30 + 4 * LENGTH - 1)
        cluster.close()
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
    seen = [None if d is None else d.times for d in context.deaths.of_works]
    assert seen == [1, None, 1]


@pytest.mark.parametrize("contract", ["drop", "next_expert", "strict"])
def test_a_missing_expert_of_the_last_layer_concerns_the_rows_that_are_read(
    folder: Path, contract: str
) -> None:
    prompt = prompt_of(30, 3)
    cluster = LocalCluster(folder, 8)
    asks = replace(greedy_request("asks", prompt, 1), routed=RoutedExperts((3, 2), 8, True))
    [[event]] = cluster.generate(asks)
    cluster.close()
    used = np.frombuffer(event.routed, np.uint8).reshape(-1, 3, 2)[:, LAST]
    own = set(used[len(prompt) - 1].tolist())
    others = set(used[: len(prompt) - 1].ravel().tolist()) - own
    assert own
    assert others
    for lost, is_hit in ((min(own), True), (min(others), False)):
        cluster = LocalCluster(folder, 8, threaded=False)
        cluster.lose([(LAST, lost)])
        cluster.scheduler.add(greedy_request("r", prompt, 2, on_expert_loss=contract))
        cluster.engine.step(cluster.scheduler.schedule())
        [sequence] = cluster.scheduler.running
        waits = contract == "strict" and is_hit
        assert bool(sequence.awaited) == waits
        assert sequence.num_generated == (0 if waits else 1)
        assert sequence.exact == (not is_hit or waits)
        cluster.close()


def test_requests_that_ask_for_experts_get_those_of_all_rows(folder: Path) -> None:
    cluster = LocalCluster(folder, 8)
    request = replace(
        greedy_request("r", prompt_of(20, 1), LENGTH), routed=RoutedExperts((3, 2), 8, True)
    )
    cluster.generate(request)
    rows = sum(f.num_rows for f in cluster.transport.frames if f.layer_id == LAST)
    assert rows == 2 * (20 + LENGTH - 1)
    cluster.close()


def test_with_a_capacity_all_rows_count(folder: Path) -> None:
    cluster = LocalCluster(folder, 8, capacity=CapacityConfig(factor=8.0))
    assert cluster.engine._wants_all
    cluster.close()
