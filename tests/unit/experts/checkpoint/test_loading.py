"""Loading: every byte that is needed is read once, and little is in memory beside the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.controller.records.pool import actor_options
from cluster.placement.placement import assign_experts
from cluster.spec import ActorSpec, ModelExperts
from experts.checkpoint import expert_weights as weights_module
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.expert_weights import load_expert
from tests import grok_oracle
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import save_dbrx, save_deepseek_v3, save_gpt_oss, save_qwen2_moe
from tests.quantise import CASES, FP8_CONFIG, MIXTRAL, MXFP4_CONFIG, make, quantise

MOST = 1.2
"""How much memory an actor may take at its peak, in shares of its own."""


SAVED: dict[str, Callable[[Path], Any]] = {
    "mixtral": save_mixtral,
    "dbrx": save_dbrx,
    "gpt_oss": save_gpt_oss,
    "qwen2_moe": save_qwen2_moe,
    "fp8": partial(make, MIXTRAL),
    "mxfp4": partial(make, CASES["gpt_oss"]),
}


def stored_names(checkpoint: Checkpoint) -> set[str]:
    """Return the tensors of the files that experts are made of."""
    parts = checkpoint.family.expert_parts(checkpoint.config, checkpoint.shape)
    names = {part.name for part in parts}
    codes = [checkpoint.packed[name] for name in names & checkpoint.packed.keys()]
    names -= checkpoint.packed.keys()
    return names.union(*((one.codes, one.scales) for one in codes))


@pytest.mark.parametrize("num_actors", [1, 3])
@pytest.mark.parametrize("kind", list(SAVED))
def test_actors_together_read_each_byte_of_the_experts_once_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, num_actors: int
) -> None:
    checkpoint = open_checkpoint(getattr(SAVED[kind](tmp_path), "folder", tmp_path))
    ranges: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    read_into = weights_module.read_into

    def recorded(checkpoint: Checkpoint, name: str, begin: int, buffer: memoryview) -> None:
        ranges[name].append((begin, begin + len(buffer)))
        read_into(checkpoint, name, begin, buffer)

    monkeypatch.setattr(weights_module, "read_into", recorded)
    shape = checkpoint.shape
    experts = ModelExperts("m", shape.layers, shape.num_experts, 1)
    actor_ids = [f"a{i}" for i in range(num_actors)]
    for keys in assign_experts([experts], actor_ids, None, 1).values():
        for key in keys:
            load_expert(checkpoint, key.layer_id, key.expert_id, "float32")
    assert ranges.keys() == stored_names(checkpoint)
    for name, own in ranges.items():
        info = checkpoint.tensors[name]
        end = 0
        for begin, stop in sorted(own):
            assert begin == end, f"{name}: read twice, or left out"
            end = stop
        assert end == info.end - info.begin


WIDTH, INNER, LAYERS = 512, 512, 2
"""A matrix is smaller than what an actor's ``malloc`` maps by itself."""
BF16 = {"dtype": torch.bfloat16}
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    **BF16,
}
OF_DBRX: dict[str, Any] = {
    "d_model": WIDTH,
    "n_layers": LAYERS,
    "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 8, "moe_top_k": 2},
    **BF16,
}
LAYOUTS: dict[str, Callable[[Path], Any]] = {
    "mixtral": partial(save_mixtral, **SIZES),
    "dbrx": partial(save_dbrx, **OF_DBRX),
    "gpt_oss": partial(save_gpt_oss, **SIZES),
    "deepseek_v3": partial(
        save_deepseek_v3, **SIZES, moe_intermediate_size=INNER, first_k_dense_replace=0
    ),
    "grok-1": partial(grok_oracle.save_grok, **BF16),
}
"""Save a checkpoint in bf16 of one family for each layout of tensors, all of one size."""


def quantised_folder(plain: Path, config: dict[str, Any]) -> Path:
    """Quantise the experts of a checkpoint."""
    folder = plain.with_name(f"{plain.name}-{config['quant_method']}")
    quantise(plain, folder, config, lambda name: ".experts." in name and "bias" not in name)
    return folder


@pytest.fixture(scope="module")
def of_all_families(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Make a checkpoint of each layout, and quantised ones; to be loaded as they are, and wider."""
    place = tmp_path_factory.mktemp("families")
    folders = [place / name for name in LAYOUTS]
    of_grok = {key: value for key, value in SIZES.items() if key != "dtype"}
    with pytest.MonkeyPatch.context() as patched:
        heads = WIDTH // grok_oracle.HEAD
        for key, value in {**of_grok, "num_attention_heads": heads}.items():
            patched.setitem(grok_oracle.SIZES, key, value)
        for folder in folders:
            folder.mkdir()
            LAYOUTS[folder.name](folder)
    fp8 = {**FP8_CONFIG, "weight_block_size": [128, 128]}
    stored = [("mixtral", fp8), ("dbrx", fp8), ("gpt_oss", MXFP4_CONFIG)]
    folders += [quantised_folder(place / name, config) for name, config in stored]
    return [f"{folder}:{dtype}" for folder in folders for dtype in ("bfloat16", "float32")]


def test_the_peak_of_loading_is_little_more_than_the_share(of_all_families: list[str]) -> None:
    """In a process like an actor's, with experts that are small enough for its heap."""
    options = actor_options(ActorSpec("app", (), 0.1, 0.0, 1, 1000), "a")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.load_peak", *of_all_families],
        env={**os.environ, **options["runtime_env"]["env_vars"]},
        capture_output=True,
        timeout=300,
        check=True,
        text=True,
    )
    told = dict(zip(of_all_families, json.loads(ran.stdout), strict=True))
    parameters = LAYERS * 8 * 3 * WIDTH * INNER
    for name, one in told.items():
        assert parameters * (2 if "bfloat16" in name else 4) <= one["share"], name
    ratios = {name: one["peak"] / one["share"] for name, one in told.items()}
    assert {name: ratio for name, ratio in ratios.items() if not 0.9 < ratio <= MOST} == {}
