"""A training run small enough for a test, and a text of a little grammar for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from workshop.train.settings import TrainingConfig
from workshop.train.trainer import StepReport

STEPS = 40


class BrokenOffError(Exception):
    """Stands for whatever ends a run in its middle."""


def tiny_settings(**optimization: Any) -> dict[str, Any]:
    return {
        "seed": 3,
        "holdout_every_blocks": 4,
        "model": {
            "vocab_size": 280, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4,
            "num_experts_per_tok": 2, "max_position_embeddings": 64, "rope_theta": 10000.0,
        },
        "gating": {"noisy": True, "importance_weight": 0.1, "load_weight": 0.1},
        "optimization": {
            "sequence_length": 32, "batch_size": 4, "steps": STEPS, "learning_rate": 0.02,
            "final_learning_rate": 0.001, "warmup_steps": 2, "weight_decay": 0.1,
            "max_grad_norm": 1.0, "checkpoint_every_steps": 5, **optimization,
        },
        "card": {"name": "tiny", "text": "Generated.", "text_commands": "true"},
    }  # fmt: skip


def tiny_config(**optimization: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(tiny_settings(**optimization))


def write_grammar(path: Path, seed: int = 0) -> Path:
    """Write sentences of a little grammar, in documents of ten."""
    draw = random.Random(seed)
    names, verbs = ["the owl", "a fox", "our bear", "the élan"], ["sees", "hears", "follows"]
    sentences = [
        f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(names)}.\n" for _ in range(1500)
    ]
    documents = ["".join(sentences[i : i + 10]) for i in range(0, len(sentences), 10)]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


def break_off_after(steps: int) -> Any:
    def on_step(report: StepReport) -> None:
        if report.steps_done == steps:
            raise BrokenOffError

    return on_step
