"""The parts of a split layer: which neurons go together, which expert is chosen, and the fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointError
from tests.unit.workshop.folders.dense_models import save_dense
from tests.unit.workshop.folders.edits import WEIGHTS, write_letters
from workshop.folders.dense_model import opened_dense
from workshop.folders.making import make_folder
from workshop.folders.options import UpcycleOptions
from workshop.folders.upcycle.command import Upcycle
from workshop.folders.upcycle.split_fit import divide, fit_gate

NUM_TOKENS, NUM_EXPERTS, SIZE = 240, 4, 6


def kinds_of_tokens() -> torch.Tensor:
    return torch.arange(NUM_TOKENS) % NUM_EXPERTS


def outputs_of_kinds(order: torch.Tensor) -> torch.Tensor:
    """Neurons in groups that are active for a kind of token each, before three for all tokens."""
    draw = torch.Generator().manual_seed(0)
    active = torch.nn.functional.one_hot(kinds_of_tokens()).repeat_interleave(SIZE, dim=1)
    noise = torch.rand(NUM_TOKENS, NUM_EXPERTS * SIZE, generator=draw)
    routed = active * (1.0 + 0.2 * noise) + 0.1 * noise
    shared = 3.0 + torch.rand(NUM_TOKENS, 3, generator=draw)
    return torch.cat((routed, shared), dim=1)[:, order]


def test_neurons_that_are_active_together_are_an_expert_and_the_largest_are_shared() -> None:
    order = torch.randperm(NUM_EXPERTS * SIZE + 3, generator=torch.Generator().manual_seed(1))
    parts = divide(outputs_of_kinds(order), 3, NUM_EXPERTS)
    groups = [order[parts == part].tolist() for part in range(-1, NUM_EXPERTS)]
    assert sorted(groups[0]) == [24, 25, 26]
    expected = [set(range(first, first + SIZE)) for first in range(0, 24, SIZE)]
    assert sorted(map(sorted, groups[1:])) == sorted(map(sorted, expected))


def test_experts_have_equal_sizes_where_no_neuron_differs() -> None:
    parts = divide(torch.ones(10, 14), 2, 3)
    assert torch.bincount(parts + 1).tolist() == [2, 4, 4, 4]


def test_a_gate_chooses_the_expert_with_the_largest_output() -> None:
    draw = torch.Generator().manual_seed(2)
    directions = torch.randn(NUM_EXPERTS, 32, generator=draw)
    kinds = kinds_of_tokens()
    rows = directions[kinds] + 0.3 * torch.randn(NUM_TOKENS, 32, generator=draw)
    outputs = torch.nn.functional.one_hot(kinds).float() + 0.1
    seen, others = slice(NUM_TOKENS // 2), slice(NUM_TOKENS // 2, None)
    gate = fit_gate(rows[seen], outputs[seen])
    chosen = (rows[others] @ gate.T).argmax(dim=1)
    assert (chosen == kinds[others]).float().mean() > 0.95


def test_a_model_that_yields_nan_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    save_dense("llama-tied", tmp_path / "dense")
    state = load_file(tmp_path / "dense" / WEIGHTS)
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "dense" / WEIGHTS, {"format": "pt"})
    text = write_letters(tmp_path / "letters.txt")
    options = UpcycleOptions(4, shared=2, sequences=4, sequence_length=32)
    with (
        opened_dense(str(tmp_path / "dense")) as model,
        pytest.raises(CheckpointError, match=r"layer 1 yields NaN or infinity"),
    ):
        make_folder(Upcycle(model, options), tmp_path / "out", [text])
    assert not (tmp_path / "out").exists()
