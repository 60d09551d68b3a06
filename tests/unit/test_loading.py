"""Loading: every byte that is needed is read once, and little is in memory beside the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.placement import ModelExperts, assign_experts
from cluster.pool import actor_options
from cluster.spec import ActorSpec
from experts import weights as weights_module
from experts.checkpoint import Checkpoint, open_checkpoint
from experts.weights import load_expert
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import save_dbrx, save_gpt_oss, save_qwen2_moe

MOST = 1.2
"""How much memory an actor may take at its peak, in shares of its own."""


@pytest.mark.parametrize("num_actors", [1, 3])
@pytest.mark.parametrize("save", [save_mixtral, save_dbrx, save_gpt_oss, save_qwen2_moe])
def test_actors_together_read_each_byte_of_the_experts_once_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[[Path], Any], num_actors: int
) -> None:
    save(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    ranges: list[tuple[str, int, int]] = []
    read_into = weights_module.read_into

    def recorded(checkpoint: Checkpoint, name: str, begin: int, buffer: memoryview) -> None:
        ranges.append((name, begin, begin + len(buffer)))
        read_into(checkpoint, name, begin, buffer)

    monkeypatch.setattr(weights_module, "read_into", recorded)
    shape = checkpoint.shape
    experts = ModelExperts("m", shape.layers, shape.num_experts, 1)
    actor_ids = [f"a{i}" for i in range(num_actors)]
    for keys in assign_experts([experts], actor_ids, None, 1).values():
        for key in keys:
            load_expert(checkpoint, key.layer_id, key.expert_id, torch.float32, torch.device("cpu"))
    names = {part.name for part in checkpoint.family.expert_parts(checkpoint.config, shape)}
    assert {name for name, _, _ in ranges} == names
    for name in names:
        info = checkpoint.tensors[name]
        end = 0
        for begin, stop in sorted((b, e) for n, b, e in ranges if n == name):
            assert begin == end, f"{name}: read twice, or left out"
            end = stop
        assert end == info.end - info.begin


def test_the_peak_of_loading_is_little_more_than_the_share(tmp_path: Path) -> None:
    """In a process like an actor's: single matrices, matrices of all experts, and other dtypes."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    save_mixtral(tmp_path / "single", **sizes)
    save_gpt_oss(tmp_path / "stacked", dtype=torch.bfloat16, **sizes)
    options = actor_options(ActorSpec("app", (), 0.1, 0.0, 1, 1000), "a")
    loaded = subprocess.run(
        [
            *(sys.executable, "-m", "tests.load_peak"),
            f"{tmp_path / 'single'}:float32",
            f"{tmp_path / 'single'}:bfloat16",
            f"{tmp_path / 'stacked'}:bfloat16",
        ],
        env={**os.environ, **options["runtime_env"]["env_vars"]},
        capture_output=True,
        timeout=60,
        check=True,
        text=True,
    )
    told = json.loads(loaded.stdout)
    expert_bytes = 3 * 512 * 1024 * 4
    assert told["share"] >= 8 * expert_bytes * 2
    assert told["share"] * 0.9 < told["peak"] <= told["share"] * MOST
