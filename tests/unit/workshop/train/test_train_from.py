"""Training that starts from a model: weights, tokenizer, sizes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.unit.workshop.folders.families import save
from tests.unit.workshop.train.training_runs import (
    BrokenOffError,
    break_off_after,
    tiny_config,
    tiny_settings,
)
from workshop.folders.making import make_folder, source_checkpoint
from workshop.folders.options import PruneOptions
from workshop.folders.prune.command import Prune
from workshop.train.origin import open_origin
from workshop.train.report import RECORD_FILE, Record
from workshop.train.run import Watcher, train
from workshop.train.settings import TrainingConfig, TrainingError, load_config

pytestmark = pytest.mark.usefixtures("one_thread")
MORE_STEPS = 6
ONE = {"noisy": False, "importance_weight": 0.0, "load_weight": 0.0}


@pytest.fixture(scope="module")
def first(grammar: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    out = tmp_path_factory.mktemp("first") / "tiny"
    train(tiny_config(), [grammar], out)
    return out


@pytest.fixture(scope="module")
def pruned(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune(first, tmp_path_factory.mktemp("pruned") / "one")


def settings_of(path: Path, origin: Path, **changes: Any) -> TrainingConfig:
    """Write settings without sizes, and read them for a model."""
    settings = tiny_settings(steps=MORE_STEPS)
    del settings["model"]
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return load_config(path, open_origin(origin).sizes)


def test_a_run_goes_on_from_a_models_weights_and_tokenizer(
    first: Path, grammar: Path, tmp_path: Path
) -> None:
    config = settings_of(tmp_path / "train.yaml", first, seed=9)
    out = tmp_path / "more"
    record = train(config, [grammar], out, origin=open_origin(first))
    before = Record.model_validate_json((first / RECORD_FILE).read_text()).figures
    assert record.origin is not None
    assert record.origin.name == "tiny"
    assert record.origin.heldout_perplexity == pytest.approx(before.heldout_perplexity, rel=1e-5)
    assert record.figures.heldout_perplexity < before.heldout_perplexity
    texts = ["the owl sees a fox.", "our bear hears the élan."]
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (first, out))
    assert [old(text)["input_ids"] for text in texts] == [new(text)["input_ids"] for text in texts]
    assert Record.model_validate_json((out / RECORD_FILE).read_text()) == record
    card = (out / "README.md").read_text()
    assert f"| Begun with | `tiny`, identity `{record.origin.identity}` |" in card
    assert "--from tiny" in card


def test_without_a_step_to_learn_from_the_weights_are_the_models(
    first: Path, grammar: Path, tmp_path: Path
) -> None:
    still = {"learning_rate": 1e-30, "final_learning_rate": 0.0, "weight_decay": 0.0}
    config = tiny_config(steps=3, warmup_steps=0, **still)
    train(config, [grammar], tmp_path / "same", origin=open_origin(first))
    old, new = (load_file(f / "model.safetensors") for f in (first, tmp_path / "same"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_pruned_model_goes_on_with_its_fewer_experts_and_resumes_with_the_same_bits(
    pruned: Path, grammar: Path, tmp_path: Path
) -> None:
    often = tiny_settings(steps=MORE_STEPS, checkpoint_every_steps=2)["optimization"]
    config = settings_of(tmp_path / "train.yaml", pruned, gating=ONE, optimization=often)
    assert (config.model.num_local_experts, config.model.num_experts_per_tok) == (1, 1)
    origin, watcher = open_origin(pruned), Watcher(on_step=break_off_after(3))
    train(config, [grammar], tmp_path / "whole", origin=origin)
    with pytest.raises(BrokenOffError):
        train(config, [grammar], tmp_path / "broken", origin=origin, watcher=watcher)
    train(config, [grammar], tmp_path / "broken", origin=origin, resume=True)
    whole, resumed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_of_another_model_is_not_resumed(
    first: Path, pruned: Path, grammar: Path, tmp_path: Path
) -> None:
    config = settings_of(tmp_path / "train.yaml", pruned, gating=ONE)
    origin, watcher = open_origin(pruned), Watcher(on_step=break_off_after(5))
    with pytest.raises(BrokenOffError):
        train(config, [grammar], tmp_path / "out", origin=origin, watcher=watcher)
    other = prune(first, tmp_path / "other", seed=1)
    with pytest.raises(TrainingError, match="another configuration or text"):
        train(config, [grammar], tmp_path / "out", origin=open_origin(other), resume=True)


def prune(model: Path, dest: Path, **options: Any) -> Path:
    """Make the model with one expert of four, chosen by chance."""
    few = PruneOptions(experts=1, by="random", **options)
    make_folder(Prune(source_checkpoint(str(model)), few), dest, [])
    return dest


def test_sizes_that_are_not_the_models_are_named(first: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    settings = tiny_settings()
    settings["model"]["hidden_size"] = 32
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(TrainingError, match=r"model\.hidden_size is 32, and that of --from is 16"):
        load_config(path, open_origin(first).sizes)


def _quantised(folder: Path) -> None:
    path = folder / "config.json"
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": method}))


def _without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def _larger_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(folder)


def _without_a_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_quantised, "the weights are quantised"),
        (_without_tokenizer, "tokenizer.json: is missing"),
        (_broken_tokenizer, "tokenizer.json: cannot be read"),
        (_larger_tokenizer, "the tokenizer has 281 tokens, and the model 280"),
        (_without_a_tensor, "model.norm.weight"),
    ],
)
def test_what_training_cannot_go_on_from_is_refused_in_a_line(
    first: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(first, tmp_path / "spoiled")
    spoil(folder)
    with pytest.raises(TrainingError) as refused:
        open_origin(folder).model()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_family_is_refused_by_name(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "qwen3")
    with pytest.raises(
        TrainingError, match="mixtral models can be trained further; got 'qwen3_moe'"
    ):
        open_origin(tmp_path / "qwen3")


def test_no_folder_and_a_dense_run_are_refused(first: Path, grammar: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nowhere"):
        open_origin(tmp_path / "nowhere")
    origin = open_origin(first)
    with pytest.raises(TrainingError, match="leave out --dense and --beside"):
        train(tiny_config(), [grammar], tmp_path / "out", dense="active", origin=origin)
