"""``expertmesh convert`` of Grok-1: both public styles become the same checkpoint, and serve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from experts.checkpoint.checkpoint import open_checkpoint
from router.cli.app import app
from tests.grok_oracle import greedy_tokens, llama_name, random_weights, save_grok
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, words)])


def test_tensors_of_both_namings_are_refused(tmp_path: Path) -> None:
    save_grok(tmp_path / "in", "grok")
    state, gate = random_weights(), "transformer.decoder_layer.1.router.weight"
    state[llama_name(gate)] = state[gate].clone()
    save_file(state, tmp_path / "in" / "model.safetensors")
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 2
    assert "has unexpected tensors: model.layers.1.moe_block.gate.weight" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("style", ["grok-1", "grok"])
def test_both_styles_become_one_and_give_the_oracles_tokens(tmp_path: Path, style: str) -> None:
    weights = save_grok(tmp_path / "in", style)
    result = run(tmp_path / "in", tmp_path / "out", "--max-shard-size", "200KB")
    assert result.exit_code == 0, result.stderr
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    state = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    assert state.keys() == {llama_name(name) for name in weights}
    assert all(torch.equal(state[llama_name(name)], tensor) for name, tensor in weights.items())
    assert open_checkpoint(tmp_path / "out").family.model_type == "grok-1"
    cluster = LocalCluster(tmp_path / "out", num_actors=3)
    prompt = prompt_of(7, 1)
    [[event]] = cluster.generate(greedy_request("r", prompt, 5))
    cluster.close()
    assert list(event.token_ids) == greedy_tokens(weights, prompt, 5)
