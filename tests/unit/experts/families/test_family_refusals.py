"""Bad input of every family: refused with file and field by what a deployment runs at its start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointError
from experts.checkpoint.checkpoint import open_checkpoint
from experts.families.registry import FAMILIES
from router.ops.plan.source import find_model
from router.served import check_file
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS
from tests.grok_oracle import save_grok
from tests.unit.experts.families.test_families import change_config
from workshop.convert.plan import make_plan
from workshop.convert.write import open_source

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ALL: dict[str, Callable[[Path], object]] = SAVERS | {
    "mixtral": save_mixtral,
    "grok-1": lambda folder: save_grok(folder, "grok-1"),
    "grok": lambda folder: save_grok(folder, "grok"),
}
EXPERT_SIZES = {
    "dbrx": "ffn_config.ffn_hidden_size",
    "deepseek_v2": "moe_intermediate_size",
    "deepseek_v3": "moe_intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
}
"""Where a configuration calls the size of an expert otherwise than ``intermediate_size``."""
PER_TOKEN = {"dbrx": "ffn_config.moe_top_k"}


@pytest.fixture(scope="module", params=sorted(ALL))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's good checkpoint; its name is the folder's."""
    folder = tmp_path_factory.mktemp("saved") / str(request.param)
    folder.mkdir()
    ALL[request.param](folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(saved, tmp_path / saved.name)


def refused(folder: Path, file: str, *words: str) -> None:
    """Check a deployment of the folder; the error names ``file`` of it and says the words."""
    deployment = folder.parent / "deployment.yaml"
    deployment.write_text(
        "applications:\n- name: a\n  import_path: router.app:build\n"
        f"  args: {{models: [{{id: m, path: {folder}}}]}}\n"
    )
    with pytest.raises(CheckpointError) as caught:
        check_file(deployment)
    place = folder / file if file else folder
    assert caught.value.field == f"{deployment}: applications.a.args.models[0].path: {place}"
    for word in words:
        assert word in caught.value.message
    assert "\n" not in str(caught.value)


def refused_by(ask: Callable[[], object], folder: Path, words: str) -> None:
    """Check that another command refuses the folder's configuration."""
    with pytest.raises(CheckpointError, match=words) as caught:
        ask()
    assert caught.value.field == str(folder / "config.json")


def test_every_family_is_tried() -> None:
    assert ALL.keys() == FAMILIES.keys()


def test_sizes_that_are_not_the_tensors_are_refused(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    embedding = next(name for name, tensor in state.items() if tensor.shape[0] == 320)
    config = (folder / "config.json").read_text()
    change_config(folder, "vocab_size", 321)
    refused(folder, WEIGHTS, "tensor ", "has shape [320, ", "config.json says [321, ")
    (folder / "config.json").write_text(config)
    change_config(folder, EXPERT_SIZES.get(folder.name, "intermediate_size"), 47)
    refused(folder, WEIGHTS, "tensor ", "expert" if folder.name != "grok" else "moe", "says [")
    (folder / "config.json").write_text(config)
    save_file(state | {embedding: state[embedding][1:]}, folder / WEIGHTS)
    refused(folder, WEIGHTS, f"tensor {embedding} has shape [319, ")


def test_tensors_that_are_missing_too_many_or_in_two_shards_are_named(folder: Path) -> None:
    state, checkpoint = load_file(folder / WEIGHTS), open_checkpoint(folder)
    dense = sorted(checkpoint.family.dense_tensors(checkpoint.config))
    experts = checkpoint.family.expert_tensors(checkpoint.config, checkpoint.shape.layers[-1], 1)
    names = dense[len(dense) // 2], experts.down.name
    save_file(state | {"model.extra.weight": torch.ones(2)}, folder / WEIGHTS)
    refused(folder, "", "has unexpected 1 tensors: model.extra.weight")
    for name in names:
        save_file({n: tensor for n, tensor in state.items() if n != name}, folder / WEIGHTS)
        refused(folder, "", f"lacks 1 tensors: {name}")
    (folder / WEIGHTS).unlink()
    save_file(state, folder / "a.safetensors")
    weight_map = dict.fromkeys(state, "a.safetensors") | {"other": "b.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in names:
        save_file({name: state[name], "other": torch.ones(1)}, folder / "b.safetensors")
        refused(folder, "b.safetensors", f"tensor {name} is also in a.safetensors")


def test_every_option_that_is_not_served_is_named(folder: Path) -> None:
    config = (folder / "config.json").read_text()

    def change_refused(key: str, value: object, *words: str) -> None:
        (folder / "config.json").write_text(config)
        change_config(folder, key, value)
        refused(folder, "config.json", *words)

    for key, served in FAMILIES[folder.name].options.items():
        other = not served[0] if isinstance(served[0], bool) else "relu"
        words = f"{key} {other!r} is not supported for {folder.name}; must"
        change_refused(key, other, words)
    change_refused(PER_TOKEN.get(folder.name, "num_experts_per_tok"), 9, "num_experts_per_tok")
    rope = {"rope_type": "dynamic", "factor": 2.0}
    words = "rope type 'dynamic' is not supported"
    change_refused("rope_scaling", rope, words, "supported: default")
    for method in ("gptq", "awq", "compressed-tensors", None):
        given = {"quant_method": method, "bits": 4}
        words = f"quantization_config.quant_method must be fp8 or mxfp4 (given: {method!r})"
        change_refused("quantization_config", given, words)
        refused_by(lambda: find_model(str(folder)), folder, "must be fp8 or mxfp4")


def _without(config: dict[str, Any], path: str) -> dict[str, Any]:
    key, _, rest = path.partition(".")
    left = {name: value for name, value in config.items() if name != key}
    return left | {key: _without(config[key], rest)} if rest else left


def test_sizes_that_are_left_out_are_named_by_plan_too(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    path = EXPERT_SIZES.get(folder.name, "intermediate_size")
    (folder / "config.json").write_text(json.dumps(_without(config, path)))
    key = path.rpartition(".")[2]
    refused(folder, "config.json", key)
    refused_by(lambda: find_model(str(folder)), folder, key)


@pytest.mark.parametrize(
    ("name", "key"),
    [("qwen2_moe", "shared_expert_intermediate_size"), ("deepseek_v3", "kv_lora_rank")],
)
def test_a_key_of_routers_alone_is_named_by_check_plan_and_convert(
    tmp_path: Path, name: str, key: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    ALL[name](folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(_without(config, key)))
    words = f"lacks the key {key}"
    refused(folder, "config.json", words)
    refused_by(lambda: find_model(str(folder)), folder, words)
    refused_by(lambda: make_plan(open_source(folder), "auto", 10**9), folder, words)
