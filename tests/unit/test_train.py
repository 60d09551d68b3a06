"""The training program: gating arithmetic, whole tiny runs, resuming, and what it refuses.

T: tokens, E: experts, k: experts per token.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from typer import Typer
from typer.testing import CliRunner

from router.workshop.balance import (
    TrainingGate,
    dense_gates,
    load_probability,
    squared_variation,
    top_k_gates,
)
from router.workshop.corpus import read_corpus, train_tokenizer
from router.workshop.report import unigram_perplexity
from router.workshop.settings import GatingSettings, TrainingConfig, load_config
from router.workshop.state import STATE_FILE
from router.workshop.train import TrainingError, main, train
from router.workshop.trainer import StepReport, learning_rate_at

STEPS = 40


class BrokenOffError(Exception):
    """Stands for whatever ends a run in its middle."""


def tiny_settings(**optimization: Any) -> dict[str, Any]:
    return {
        "seed": 3,
        "holdout_every_blocks": 4,
        "model": {
            "vocab_size": 280,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 64,
            "rope_theta": 10000.0,
        },
        "gating": {"noisy": True, "importance_weight": 0.1, "load_weight": 0.1},
        "optimization": {
            "sequence_length": 32,
            "batch_size": 4,
            "steps": STEPS,
            "learning_rate": 0.02,
            "final_learning_rate": 0.001,
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "max_grad_norm": 1.0,
            "checkpoint_every_steps": 5,
            **optimization,
        },
        "card": {"name": "tiny", "text": "Generated.", "text_commands": "true"},
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of a little grammar, in documents of ten."""
    draw = random.Random(0)
    names, verbs = ["the owl", "a fox", "our bear", "the élan"], ["sees", "hears", "follows"]
    sentences = [
        f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(names)}.\n" for _ in range(1500)
    ]
    path = tmp_path_factory.mktemp("text") / "grammar.txt"
    documents = ["".join(sentences[i : i + 10]) for i in range(0, len(sentences), 10)]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[StepReport]]:
    out = tmp_path_factory.mktemp("trained") / "tiny"
    reports: list[StepReport] = []
    config = TrainingConfig.model_validate(tiny_settings())
    train(config, [text], out, resume=False, on_step=reports.append)
    return out, reports


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def break_off_after(steps: int) -> Any:
    def on_step(report: StepReport) -> None:
        if report.steps_done == steps:
            raise BrokenOffError

    return on_step


# Gating, against Shazeer et al. 2017.


@given(seed=st.integers(0, 2**31), num_experts=st.integers(2, 9), data=st.data())
@settings(max_examples=30, deadline=None)
def test_exactly_k_gates_are_nonzero_and_sum_to_one(
    seed: int, num_experts: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, num_experts - 1))
    logits = torch.randn(20, num_experts, generator=torch.Generator().manual_seed(seed))
    gates = dense_gates(*top_k_gates(logits, k), num_experts)
    assert (gates != 0).sum(dim=1).tolist() == [k] * 20
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(20))


def test_gates_are_the_renormalised_softmax_that_mixtral_serves() -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    topk_weights, topk_ids = top_k_gates(logits, 2)
    probabilities, expected_ids = logits.softmax(dim=-1).topk(2)
    assert torch.equal(topk_ids, expected_ids)
    torch.testing.assert_close(topk_weights, probabilities / probabilities.sum(-1, keepdim=True))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_load_estimate_matches_monte_carlo(k: int) -> None:
    """Draw one expert's noise anew many times, the others' held, and count its selections."""
    num_experts, draws = 5, 20_000
    generator = torch.Generator().manual_seed(k)
    clean = torch.randn(1, num_experts, generator=generator)
    noise_std = torch.rand(1, num_experts, generator=generator) + 0.3
    noisy = clean + noise_std * torch.randn(1, num_experts, generator=generator)
    estimate = load_probability(clean, noisy, noise_std, k)[0].tolist()
    for expert_id in range(num_experts):
        redrawn = noisy.repeat(draws, 1)
        fresh = torch.randn(draws, generator=generator)
        redrawn[:, expert_id] = clean[0, expert_id] + noise_std[0, expert_id] * fresh
        is_chosen = (redrawn.topk(k, dim=-1).indices == expert_id).any(dim=-1)
        # 20,000 draws: a standard error of at most 0.0036.
        assert is_chosen.double().mean().item() == pytest.approx(estimate[expert_id], abs=0.015)


def test_balancing_loss_is_zero_only_when_uniform() -> None:
    assert squared_variation(torch.full((8,), 2.5)).item() == 0
    # Mean 1, variance 1 (half the experts take everything): CV squared is 1.
    assert squared_variation(torch.tensor([2.0, 0.0, 2.0, 0.0])).item() == pytest.approx(1)


def test_training_gate_adds_noise_while_training_only() -> None:
    """A skewed gate has a loss with gradients; in eval mode it is Mixtral's, bit by bit."""
    config = MixtralConfig(hidden_size=6, num_local_experts=4, num_experts_per_tok=2)
    gating = GatingSettings(noisy=True, importance_weight=0.1, load_weight=0.1)
    generator = torch.Generator().manual_seed(0)
    gate = TrainingGate(config, gating, generator)
    plain = MixtralTopKRouter(config)
    weight = torch.randn(4, 6, generator=generator)
    gate.weight.data.copy_(weight)
    plain.weight.data.copy_(weight)
    hidden_states = torch.randn(3, 10, 6, generator=generator) + 1
    first, second = gate(hidden_states), gate(hidden_states)
    assert not torch.equal(first[1], second[1])
    gradients = torch.autograd.grad(gate.balancing_loss, [gate.weight, gate.noise_weight])
    assert all(gradient.norm() > 0 for gradient in gradients)
    served = gate.eval()(hidden_states)
    for got, expected in zip(served, plain(hidden_states), strict=True):
        assert torch.equal(got, expected)


# Whole runs.


def test_training_lowers_the_loss(trained: tuple[Path, list[StepReport]]) -> None:
    losses = [report.loss for report in trained[1]]
    assert len(losses) == STEPS
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(
    text: Path, trained: tuple[Path, list[StepReport]], tmp_path: Path
) -> None:
    for seed, is_same in ((3, True), (4, False)):
        config = TrainingConfig.model_validate({**tiny_settings(), "seed": seed})
        out = tmp_path / str(seed)
        train(config, [text], out, resume=False, on_step=lambda report: None)
        expected, got = weights(trained[0]), weights(out)
        assert all(torch.equal(expected[name], got[name]) for name in expected) is is_same


def test_resumed_run_ends_with_the_same_bits(
    text: Path, trained: tuple[Path, list[StepReport]], tmp_path: Path
) -> None:
    config = TrainingConfig.model_validate(tiny_settings())
    with pytest.raises(BrokenOffError):
        train(config, [text], tmp_path, resume=False, on_step=break_off_after(8))
    resumed: list[StepReport] = []
    train(config, [text], tmp_path, resume=True, on_step=resumed.append)
    assert [report.steps_done for report in resumed] == list(range(6, STEPS + 1))
    expected, got = weights(trained[0]), weights(tmp_path)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert not (tmp_path / STATE_FILE).exists()


def test_state_torn_while_written_leaves_the_one_before(
    text: Path, trained: tuple[Path, list[StepReport]], tmp_path: Path
) -> None:
    def tear(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise BrokenOffError

    config = TrainingConfig.model_validate(tiny_settings())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BrokenOffError):
        train(
            config,
            [text],
            tmp_path,
            resume=False,
            on_step=lambda report: (
                patch.setattr("router.workshop.state.save_file", tear)
                if report.steps_done == 5
                else None
            ),
        )
    train(config, [text], tmp_path, resume=True, on_step=lambda report: None)
    expected, got = weights(trained[0]), weights(tmp_path)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_checkpoint_has_mixtral_names_and_reloads(trained: tuple[Path, list[StepReport]]) -> None:
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


def test_tokenizer_round_trips_any_text_and_has_a_chat_template(
    trained: tuple[Path, list[StepReport]],
) -> None:
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


def test_figures_and_card_are_beside_the_checkpoint(
    trained: tuple[Path, list[StepReport]],
) -> None:
    record = json.loads((trained[0] / "training.json").read_text(encoding="utf-8"))
    assert record["config"] == TrainingConfig.model_validate(tiny_settings()).model_dump()
    figures = record["figures"]
    assert 1 < figures["heldout_perplexity"] < figures["unigram_perplexity"]
    assert [len(row) for row in figures["expert_shares"]] == [4, 4]
    assert [sum(row) for row in figures["expert_shares"]] == pytest.approx([1, 1])
    card = (trained[0] / "README.md").read_text(encoding="utf-8")
    assert f"| this model | {figures['heldout_perplexity']:.2f} |" in card
    assert "router.workshop.train train.yaml --text grammar.txt --out tiny" in card


def test_unigram_perplexity_of_even_counts_is_the_vocabulary_size() -> None:
    train_ids = torch.arange(10).repeat(5)
    assert unigram_perplexity(train_ids, torch.tensor([1, 7]), 10) == pytest.approx(10)


def test_learning_rate_warms_up_then_falls_to_the_end() -> None:
    schedule = TrainingConfig.model_validate(tiny_settings()).optimization
    rates = [learning_rate_at(step, schedule) for step in range(STEPS + 1)]
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.02])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.001)


# What it refuses.


def test_unknown_key_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(stepz=3)))
    with pytest.raises(TrainingError, match=r"train\.yaml: optimization\.stepz: Extra inputs"):
        load_config(path)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"num_experts_per_tok": 4}, "num_experts_per_tok 4 must be less than"),
        ("model", {"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads 3"),
        ("gating", {"noisy": False}, "load_weight 0.1 needs noisy: true"),
        ("optimization", {"warmup_steps": 40}, "must be less than steps 40"),
        ("optimization", {"sequence_length": 65}, "at most max_position_embeddings 64"),
    ],
)
def test_settings_that_do_not_fit_together(
    section: str, changes: dict[str, Any], message: str
) -> None:
    raw = tiny_settings()
    raw[section] = {**raw[section], **changes}
    with pytest.raises(ValueError, match=message):
        TrainingConfig.model_validate(raw)


def test_empty_short_and_binary_texts_are_clear_errors(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    for content, message in (
        (b" \n\n", r"text\.txt: the text is empty"),
        (b"one line\n", "too short to hold any of it out"),
        (b"\xff\xfe\x00", r"text\.txt: cannot be read as UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(TrainingError, match=message):
            read_corpus([path], holdout_every_blocks=2)


def test_vocabulary_must_fit_the_text() -> None:
    with pytest.raises(TrainingError, match="vocab_size 257 must be at least 258"):
        train_tokenizer(["a a a"], 257)
    with pytest.raises(TrainingError, match="vocab_size 9000 is more than the text yields"):
        train_tokenizer(["a a a"], 9000)


def test_resume_refuses_no_state_and_another_configuration(text: Path, tmp_path: Path) -> None:
    config = TrainingConfig.model_validate(tiny_settings())
    with pytest.raises(TrainingError, match="nothing to resume"):
        train(config, [text], tmp_path, resume=True, on_step=break_off_after(1))
    with pytest.raises(BrokenOffError):
        train(config, [text], tmp_path, resume=False, on_step=break_off_after(5))
    with pytest.raises(TrainingError, match="holds an unfinished run"):
        train(config, [text], tmp_path, resume=False, on_step=break_off_after(1))
    other = TrainingConfig.model_validate(tiny_settings(learning_rate=0.5))
    with pytest.raises(TrainingError, match="another configuration or text"):
        train(other, [text], tmp_path, resume=True, on_step=break_off_after(1))
    (tmp_path / STATE_FILE).write_bytes(b"torn")
    with pytest.raises(TrainingError, match="is not a training state"):
        train(config, [text], tmp_path, resume=True, on_step=break_off_after(1))


def test_command_line_trains_and_reports_errors(text: Path, tmp_path: Path) -> None:
    app = Typer()
    app.command()(main)
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(tiny_settings(steps=3)))
    arguments = [str(config), "--text", str(text), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "held-out perplexity" in result.output
    assert (tmp_path / "out" / "model.safetensors").exists()
    failed = CliRunner().invoke(app, [*arguments, "--resume"])
    assert failed.exit_code == 2
    assert "nothing to resume" in failed.output
