"""The logits of every family in bf16: as near to those of fp32 as transformers' own in bf16.

Every run has the same weights, rounded to bf16, so logits differ by roundings of results alone.
All experts are chosen: where two scores are nearly equal, another expert is a far larger difference
than all roundings.

Dimension letters: B prompts, V vocab, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from experts.checkpoint.checkpoint import open_checkpoint
from experts.families.registry import FAMILIES
from router.engine.batch import pack
from router.engine.scheduling.scheduler import Limits
from router.engine.sequence import ScheduledChunk
from tests import grok_oracle
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
BF16, FP32 = torch.bfloat16, torch.float32
LIMITS = Limits(96, 2048, 2048)
SAVED: dict[str, Callable[..., Any]] = {"mixtral": save_mixtral, **SAVERS}
GROK = ("grok-1", "grok")
E = 8
DBRX = {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": E, "moe_top_k": E}}
ALL_GROUPS = {"num_experts_per_tok": E, "topk_group": 4}
ALL_CHOSEN = {"dbrx": DBRX, "deepseek_v2": ALL_GROUPS, "deepseek_v3": ALL_GROUPS}
CHANCE = 1.2
"""The bound of one prompt's error, in terms of transformers'."""


def ours(folder: Path, prompts: list[list[int]]) -> torch.Tensor:
    """Return the logits after each prompt, float32 [B, V]."""
    cluster = LocalCluster(folder, threaded=False, dtype="bfloat16", limits=LIMITS)
    assert cluster.checkpoint.shape.num_experts_per_tok == E
    requests = [greedy_request(f"r{i}", prompt, 1) for i, prompt in enumerate(prompts)]
    sequences = [s for request in requests for s in cluster.scheduler.add(request)]
    cluster.scheduler.schedule()  # takes pages
    chunks = [ScheduledChunk(sequence, 0, len(sequence.token_ids)) for sequence in sequences]
    with torch.inference_mode():
        logits = cluster.forward(pack(chunks, cluster.model.attention, most_pieces=1))
    cluster.close()
    return logits.float()


def of_transformers(folder: Path, prompts: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    values = dict(checkpoint.family.transformers_config(checkpoint.config))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        config=transformers.AutoConfig.for_model(**values),
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    with torch.inference_mode():
        return model(torch.tensor(prompts)).logits[:, -1].float()


def errors_of(logits: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (logits - exact).norm(dim=1) / exact.norm(dim=1)


def assert_no_farther(got: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """Compare the relative errors of logits [B, V]: the median, and the worst prompt."""
    off, allowed = errors_of(got, exact), errors_of(theirs, exact)
    assert 0 < off.median() <= allowed.median()
    assert off.max() <= CHANCE * allowed.max()


def test_every_family_is_tried() -> None:
    assert {*SAVED, *GROK} == FAMILIES.keys()


@pytest.mark.parametrize("family", SAVED)
def test_logits_are_no_farther_off_than_transformers(tmp_path: Path, family: str) -> None:
    SAVED[family](tmp_path, dtype=BF16, **ALL_CHOSEN.get(family, {"num_experts_per_tok": E}))
    prompts = [prompt_of(20, seed) for seed in range(96)]
    exact, theirs = (of_transformers(tmp_path, prompts, dtype) for dtype in (FP32, BF16))
    assert_no_farther(ours(tmp_path, prompts), theirs, exact)


@pytest.mark.parametrize("style", GROK)
def test_groks_logits_are_no_farther_off_than_plain_torch(
    tmp_path: Path, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grok_oracle.SIZES, "num_experts_per_tok", E)
    weights = grok_oracle.save_grok(tmp_path, style, dtype=BF16)
    prompts = [prompt_of(6, seed) for seed in range(8)]
    rounded = {name: tensor.to(BF16) for name, tensor in weights.items()}
    wide = {name: tensor.float() for name, tensor in rounded.items()}
    exact, theirs = (
        torch.stack([grok_oracle.logits_of(by, prompt).float() for prompt in prompts])
        for by in (wide, rounded)
    )
    assert_no_farther(ours(tmp_path, prompts), theirs, exact)
