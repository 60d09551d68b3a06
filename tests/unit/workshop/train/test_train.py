"""Whole training runs, tiny: what comes out, the same bits again, and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.workshop.train.training_runs import (
    STEPS,
    BrokenOffError,
    break_off_after,
    tiny_config,
    tiny_settings,
    write_grammar,
)
from workshop.train.report import Record
from workshop.train.run import Watcher, train
from workshop.train.settings import TrainingConfig, TrainingError
from workshop.train.trainer import STATE_FILE, StepReport, learning_rate_at

pytestmark = pytest.mark.usefixtures("one_thread")
Trained = tuple[Path, list[StepReport], Record]


@pytest.fixture(scope="module")
def trained(grammar: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Trained:
    out = tmp_path_factory.mktemp("trained") / "tiny"
    reports: list[StepReport] = []
    record = train(tiny_config(), [grammar], out, watcher=Watcher(on_step=reports.append))
    return out, reports, record


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(
    grammar: Path, trained: Trained, tmp_path: Path
) -> None:
    losses = [report.loss for report in trained[1]]
    assert len(losses) == STEPS
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]
    for seed, is_same in ((3, True), (4, False)):
        config = TrainingConfig.model_validate({**tiny_settings(), "seed": seed})
        train(config, [grammar], tmp_path / str(seed))
        assert same_bits(trained[0], tmp_path / str(seed)) is is_same


def test_resumed_run_ends_with_the_same_bits(
    grammar: Path, trained: Trained, tmp_path: Path
) -> None:
    with pytest.raises(BrokenOffError):
        train(tiny_config(), [grammar], tmp_path, watcher=Watcher(on_step=break_off_after(8)))
    resumed: list[StepReport] = []
    watcher = Watcher(on_step=resumed.append)
    train(tiny_config(), [grammar], tmp_path, resume=True, watcher=watcher)
    assert [report.steps_done for report in resumed] == list(range(6, STEPS + 1))
    assert same_bits(trained[0], tmp_path)
    assert not (tmp_path / STATE_FILE).exists()


def test_checkpoint_has_mixtral_names_and_reloads(trained: Trained) -> None:
    out = trained[0]
    names = weights(out)
    prefix = "model.layers.1.block_sparse_moe"
    assert names[f"{prefix}.gate.weight"].shape == (4, 16)
    for matrix in ("w1", "w2", "w3"):
        assert names[f"{prefix}.experts.3.{matrix}.weight"].dtype == torch.float32
    assert not [name for name in names if "noise" in name]
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.layers[1].mlp.gate.weight, names[f"{prefix}.gate.weight"])
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(out).eos_token_id


def test_tokenizer_round_trips_any_text_and_has_a_chat_template(trained: Trained) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    for written in ("the owl sees", "  two  spaces , kept ?\n", "naïve — 日本語 🦉\t"):
        ids = tokenizer(written)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == written
    messages = [
        {"role": "user", "content": "Hail"},
        {"role": "assistant", "content": "Well met"},
        {"role": "user", "content": "Who?"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>User: Hail\nAssistant: Well met</s>\nUser: Who?\nAssistant:"


def test_record_and_card_are_beside_the_checkpoint(trained: Trained) -> None:
    out, _, record = trained
    written = Record.model_validate_json((out / "training.json").read_text(encoding="utf-8"))
    assert written == record
    assert record.config == tiny_config()
    figures = record.figures
    assert 1 < figures.heldout_perplexity < figures.unigram_perplexity
    assert figures.sources["grammar.txt"].perplexity == figures.heldout_perplexity
    assert [sum(row) for row in figures.expert_shares] == pytest.approx([1, 1])
    # Two layers, each with two experts of 3 * 16 * 16 that a token does not take.
    assert figures.num_parameters - figures.num_active_parameters == 2 * 2 * 768
    assert figures.num_parameters == sum(tensor.numel() for tensor in weights(out).values())
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"| {figures.num_active_parameters:,} | {figures.heldout_perplexity:.2f} |" in card
    assert "expertmesh train train.yaml --text grammar.txt --out tiny\n" in card
    shares = " | ".join(f"{100 * share:.1f}" for share in figures.expert_shares[1])
    assert f"| 1 | {shares} |" in card


def test_dense_runs_of_the_same_recipe_stand_beside(grammar: Path, tmp_path: Path) -> None:
    config = tiny_config(steps=3)
    other = write_grammar(tmp_path / "other.txt", seed=1)
    dense = {
        size: train(config, [grammar], tmp_path / size, dense=size).figures
        for size in ("active", "total")
    }
    width = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert weights(tmp_path / "active")[width].shape == (32, 16)
    assert weights(tmp_path / "total")[width].shape == (64, 16)
    folders = [tmp_path / "active", tmp_path / "total"]
    record = train(config, [grammar], tmp_path / "moe", beside=folders)
    assert record.beside == dense
    # As many parameters but for the gates: 16 numbers per expert and layer.
    assert record.figures.num_parameters - dense["total"].num_parameters == 2 * 3 * 16
    assert record.figures.num_active_parameters - dense["active"].num_parameters == 2 * 3 * 16
    card = (tmp_path / "moe" / "README.md").read_text(encoding="utf-8")
    assert f"| {dense['total'].heldout_perplexity:.2f} |" in card
    assert "--dense active --out dense-active\n" in card
    assert "--out tiny --beside dense-active --beside dense-total\n" in card
    for texts, settings in (([other], config), ([grammar], tiny_config(steps=4))):
        with pytest.raises(TrainingError, match="is no dense run of this configuration and text"):
            train(settings, texts, tmp_path / "refused", beside=folders)
    with pytest.raises(TrainingError, match="is not the record of a finished run"):
        train(config, [grammar], tmp_path / "refused", beside=[tmp_path])
    assert not (tmp_path / "refused").exists()


def test_learning_rate_warms_up_then_falls_to_the_end() -> None:
    schedule = tiny_config().optimization
    rates = [learning_rate_at(step, schedule) for step in range(STEPS + 1)]
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.02])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.001)
