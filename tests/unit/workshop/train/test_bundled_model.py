"""The bundled model's folder: small enough to ship, and what its card says is of one run."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from workshop.train.report import RECORD_FILE, Record, model_card
from workshop.train.run import CARD_FILE
from workshop.train.settings import load_config

FOLDER = Path(__file__).parents[4] / "deploy" / "models" / "mesh-tiny"
MAX_BYTES = 16_000_000


@pytest.fixture(scope="module")
def record() -> Record:
    return Record.model_validate_json((FOLDER / RECORD_FILE).read_text(encoding="utf-8"))


def test_it_is_at_most_16_mb_whole() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_BYTES


def test_its_configuration_makes_its_card_and_sizes(record: Record) -> None:
    assert record.config == load_config(FOLDER / "train.yaml")
    assert (FOLDER / CARD_FILE).read_text(encoding="utf-8") == model_card(record)
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        assert record.figures.num_parameters == sum(file.get_tensor(n).numel() for n in names)
    model = record.config.model
    assert (model.num_local_experts, model.num_experts_per_tok) == (8, 2)


def test_it_beats_counting_and_a_dense_model_of_its_active_size(record: Record) -> None:
    figures = record.figures
    assert figures.heldout_perplexity < record.beside["active"].heldout_perplexity
    assert figures.heldout_perplexity < figures.unigram_perplexity / 10
    assert list(figures.sources) == list(record.text_sha256)
    assert len(figures.sources) >= 5
