"""Grok-1 in both public naming styles, against an oracle that computes a token at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import CheckpointError
from experts.checkpoint.checkpoint import open_checkpoint
from router.engine.batch import pack
from router.engine.scheduling.scheduler import Limits
from tests.grok_oracle import Weights, greedy_tokens, logits_of, save_grok
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
STYLES = ["grok-1", "grok"]


@pytest.fixture(scope="module", params=STYLES)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Weights]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_grok(folder, request.param)


def test_greedy_tokens_alone_and_in_a_crowd_are_the_oracles(saved: tuple[Path, Weights]) -> None:
    folder, weights = saved
    cluster = LocalCluster(folder, num_actors=3, limits=Limits(8, 12, 16))
    sizes = [(1, 6), (3, 4), (17, 3), (9, 5)]
    prompts = [prompt_of(length, i) for i, (length, _) in enumerate(sizes)]
    expected = [greedy_tokens(weights, p, n) for p, (_, n) in zip(prompts, sizes, strict=True)]
    [[event]] = cluster.generate(greedy_request("alone", prompts[0], sizes[0][1]))
    assert list(event.token_ids) == expected[0]
    crowd = [greedy_request(f"r{i}", prompt, sizes[i][1]) for i, prompt in enumerate(prompts)]
    got = cluster.generate(*crowd)
    cluster.close()
    assert [list(event.token_ids) for [event] in got] == expected


@torch.inference_mode()
def test_logits_are_the_oracles(saved: tuple[Path, Weights]) -> None:
    folder, weights = saved
    cluster = LocalCluster(folder, threaded=False)
    cluster.scheduler.add(greedy_request("r", prompt_of(30, 3), 3))
    for _ in range(3):
        work = cluster.scheduler.schedule()
        theirs = logits_of(weights, list(work[0].sequence.token_ids))
        step = pack(work, cluster.model.attention)
        ours = cluster.forward(step)
        assert (ours[0] - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        cluster.engine.step(work)


@pytest.mark.parametrize("style", STYLES)
def test_multipliers_may_be_left_out_and_are_then_xais(tmp_path: Path, style: str) -> None:
    left_out = ("attn_output_multiplier", "max_attn_value", "embedding_multiplier_scale")
    save_grok(tmp_path, style, **dict.fromkeys(left_out))
    config = open_checkpoint(tmp_path).config
    assert [config[key] for key in left_out] == [128**-0.5, 30.0, pytest.approx(6144**0.5)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_attn_value": 0}, "max_attn_value must be a positive number"),
        ({"rope_theta": "10000"}, "rope_theta must be a positive number"),
        ({"num_experts": None}, "lacks the key num_experts"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    save_grok(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path)
