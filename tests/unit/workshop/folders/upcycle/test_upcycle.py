"""Upcycled models: with all parts, or any copies, they are the dense model; all are served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.expert_weights import read_tensor
from tests.unit.router.engine.test_engine import check_greedy
from tests.unit.workshop.folders.dense_models import DENSE, save_dense
from tests.unit.workshop.folders.edits import gate_tensors
from tests.unit.workshop.folders.families import PROMPT, check_served, served_tokens, whole_model
from workshop.folders.card import Record
from workshop.folders.dense_model import opened_dense
from workshop.folders.making import make_folder
from workshop.folders.options import UpcycleOptions
from workshop.folders.upcycle.command import Upcycle

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(0))


def upcycled(source: Path, dest: Path, texts: list[Path], **options: Any) -> Record:
    few = {"experts": 4, "shared": 2, "sequences": 8, "sequence_length": 32}
    with opened_dense(str(source)) as model:
        return make_folder(Upcycle(model, UpcycleOptions(**few | options)), dest, texts)


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=ROWS, use_cache=False).logits


def assert_is_dense(folder: Path, dense: Any) -> None:
    expected = logits_of(dense)
    error = (logits_of(whole_model(folder)) - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max()
    check_greedy(served_tokens(folder), dense, PROMPT, 8)


@pytest.mark.parametrize("name", list(DENSE))
def test_with_all_parts_the_model_is_the_dense_one(
    name: str, letters: Path, tmp_path: Path
) -> None:
    dense = save_dense(name, tmp_path / "dense")
    record = upcycled(tmp_path / "dense", tmp_path / "out", [letters])
    assert record.figures is not None
    assert record.figures.perplexity_after == pytest.approx(
        record.figures.perplexity_before, rel=1e-5
    )
    assert_is_dense(tmp_path / "out", dense)


@pytest.mark.parametrize("name", ["llama-tied", "mistral", "qwen2-windows"])
def test_any_copies_are_the_dense_model(name: str, tmp_path: Path) -> None:
    dense = save_dense(name, tmp_path / "dense")
    upcycled(tmp_path / "dense", tmp_path / "out", [], by="copies", active=3)
    made = open_checkpoint(tmp_path / "out")
    assert made.shape.num_experts_per_tok == 3
    assert_is_dense(tmp_path / "out", dense)
    gates = [torch.from_numpy(read_tensor(made, name, "float32")) for name in gate_tensors(made)]
    assert not torch.equal(*gates)
    assert all(gate.std() == pytest.approx(0.02, rel=0.3) for gate in gates)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_fewer_parts_the_tokens_are_transformers(
    dtype: str, letters: Path, tmp_path: Path
) -> None:
    save_dense("qwen2", tmp_path / "dense")
    upcycled(tmp_path / "dense", tmp_path / "out", [letters], active=2, dtype=dtype)
    check_served("qwen2_moe", tmp_path / "out")


def test_the_card_has_the_speed_with_each_number_of_experts_when_asked(
    letters: Path, tmp_path: Path
) -> None:
    save_dense("llama-tied", tmp_path / "dense")
    record = upcycled(tmp_path / "dense", tmp_path / "out", [letters], speed=True)
    assert record.figures is not None
    speeds = record.figures.speeds
    assert speeds is not None
    assert list(speeds.tokens_per_s_by_active) == list(record.figures.perplexity_by_active)
    assert min(speeds.tokens_per_s, *speeds.tokens_per_s_by_active.values()) > 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"Tokens/s of one stream, 1 thread of {speeds.processor} |" in card
    for active, perplexity in record.figures.perplexity_by_active.items():
        speed = speeds.tokens_per_s_by_active[active]
        assert (
            f"| this model with {active} experts of a token | {perplexity:.3f} | {speed:.1f} |"
            in card
        )


def test_a_speed_without_a_text_is_refused(tmp_path: Path) -> None:
    save_dense("llama-tied", tmp_path / "dense")
    with pytest.raises(ConfigError, match="--speed is beside perplexities"):
        upcycled(tmp_path / "dense", tmp_path / "out", [], by="copies", speed=True)
