"""``expertmesh convert`` of Grok-1: both public styles become the same checkpoint, and serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from experts.checkpoint.checkpoint import open_checkpoint
from router.cli.app import app
from tests.grok_oracle import Weights, greedy_tokens, llama_name, random_weights, save_grok
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import prompt_of
from workshop.convert import write

pytestmark = pytest.mark.usefixtures("one_thread")
STYLES = ["grok-1", "grok"]
SHARDS = ("--max-shard-size", "200KB")


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, words)])


def convert(*words: object) -> None:
    result = run(*words)
    assert result.exit_code == 0, result.stderr


def state_of(folder: Path) -> Weights:
    state: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def assert_converted(folder: Path, weights: Weights) -> None:
    state = state_of(folder)
    assert state.keys() == {llama_name(name) for name in weights}
    assert all(torch.equal(state[llama_name(name)], tensor) for name, tensor in weights.items())
    assert open_checkpoint(folder).family.model_type == "grok-1"


@pytest.mark.parametrize("style", STYLES)
def test_both_styles_become_one_and_give_the_oracles_tokens(tmp_path: Path, style: str) -> None:
    weights = save_grok(tmp_path / "in", style)
    convert(tmp_path / "in", tmp_path / "out", *SHARDS)
    assert_converted(tmp_path / "out", weights)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    cluster = LocalCluster(tmp_path / "out", num_actors=3)
    prompt = prompt_of(7, 1)
    [[event]] = cluster.generate(greedy_request("r", prompt, 5))
    cluster.close()
    assert list(event.token_ids) == greedy_tokens(weights, prompt, 5)


def test_a_broken_off_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = save_grok(tmp_path / "in", "grok")
    words, real, reads = (tmp_path / "in", tmp_path / "out", *SHARDS), write.read, []

    def read(*arguments: object) -> torch.Tensor:
        reads.append(1)
        if len(reads) == 40:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(write, "read", read)
    assert run(*words).exit_code == 130
    assert not (tmp_path / "out").exists()
    result = run(*words, "--json")
    assert json.loads(result.stdout)["kept_shards"] > 0
    assert len(reads) < 40 + len(weights)
    assert_converted(tmp_path / "out", weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("lack", "lacks tensors: transformer.decoder_layer.1.moe.3.linear_v.weight"),
        ("both", "has unexpected tensors: model.layers.1.moe_block.gate.weight"),
        ("shape", "transformer.decoder_layer.1.router.weight has shape [8, 47]; config.json says"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: str, words: str) -> None:
    save_grok(tmp_path / "in", "grok")
    state, gate = random_weights(), "transformer.decoder_layer.1.router.weight"
    if change == "lack":
        del state["transformer.decoder_layer.1.moe.3.linear_v.weight"]
    elif change == "both":
        state[llama_name(gate)] = state[gate].clone()
    else:
        state[gate] = state[gate][:, 1:].contiguous()
    save_file(state, tmp_path / "in" / "model.safetensors")
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()
