"""A pass a layer at a time against transformers' whole model, and a pass that breaks off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from experts.checkpoint.checkpoint import open_checkpoint
from tests.unit.workshop.folders.families import (
    ALL,
    TRANSFORMERS,
    gates_of,
    logits_of,
    save,
    whole_model,
)
from workshop.folders import passes
from workshop.folders.layerwise import LayeredModel, LayerExperts
from workshop.folders.passes import Pass
from workshop.folders.prune.command import UseObserver

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = torch.randint(1, 300, (5, 25), generator=torch.Generator().manual_seed(1))
INPUTS, TARGETS = ROWS[:, :-1].contiguous(), ROWS[:, 1:].contiguous()


def quiet(done: int, total: int) -> None:
    """Take the progress and show nothing."""


class InputObserver:
    """Keeps a layer's inputs and choices."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []
        self.ids: list[np.ndarray] = []

    def chosen(self, normed: torch.Tensor, ids: np.ndarray, weights: torch.Tensor) -> None:
        self.inputs.append(normed.clone())
        self.ids.append(ids.copy())

    def computed(self, expert_id: int, weights: torch.Tensor, outputs: torch.Tensor) -> None: ...

    def result(self, experts: LayerExperts) -> dict[str, np.ndarray]:
        return {"inputs": torch.cat(self.inputs).numpy(), "ids": np.concatenate(self.ids)}


@pytest.mark.parametrize("name", [name for name in ALL if name != "grok"])
def test_the_loss_is_the_whole_models(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path / "model")
    heldout = Pass(LayeredModel(open_checkpoint(tmp_path / "model")), INPUTS, tmp_path / "pass")
    heldout.run(None, quiet)
    logits = logits_of(name, model, INPUTS)
    expected = functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="sum")
    assert heldout.nats(TARGETS) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_the_gates_see_what_transformers_gates_see(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    model, seen_there = whole_model(tmp_path / "model"), []
    for gate in gates_of(checkpoint, model):
        gate.register_forward_hook(lambda _, inputs, __: seen_there.append(inputs[0]))
    logits_of(name, model, INPUTS)
    calibration = Pass(LayeredModel(checkpoint), INPUTS, tmp_path / "pass")
    seen = calibration.run(lambda _: InputObserver(), quiet)
    assert len(seen_there) == len(seen) == len(checkpoint.shape.layers)
    for theirs, layer_id in zip(seen_there, checkpoint.shape.layers, strict=True):
        ours = torch.from_numpy(seen[layer_id]["inputs"])
        assert torch.allclose(ours, theirs.view_as(ours), atol=1e-5, rtol=1e-5)


def test_choices_and_use_are_those_of_transformers_router_logits(tmp_path: Path) -> None:
    model = save("mixtral", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    calibration = Pass(LayeredModel(checkpoint), INPUTS, tmp_path / "pass")
    seen = calibration.run(lambda _: UseObserver(8), quiet)
    with torch.inference_mode():
        output = model(input_ids=INPUTS, output_router_logits=True, use_cache=False)
    for layer_id, logits in enumerate(output.router_logits):
        weights, ids = logits.softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        hits = torch.bincount(ids.flatten(), minlength=8)
        sums = torch.zeros(8).index_add_(0, ids.flatten(), weights.flatten())
        assert seen[layer_id]["hits"].tolist() == hits.tolist()
        assert seen[layer_id]["weights"] == pytest.approx(sums.numpy(), rel=1e-5)
        assert int(seen[layer_id]["tokens"]) == INPUTS.numel()


class BrokenOffError(Exception):
    """Stands for whatever ends a pass in its middle."""


def test_a_pass_that_broke_off_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("mixtral", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    monkeypatch.setattr(passes, "BLOCKS_OF_LAYER", 10**9)
    monkeypatch.setattr(passes, "BLOCK_BYTES", 2 * 24 * 64 * 4)  # two rows at once

    def run(folder: Path, progress: Any) -> tuple[passes.Seen, float]:
        one = Pass(LayeredModel(checkpoint), INPUTS, folder)
        return one.run(lambda _: UseObserver(8), progress), one.nats(TARGETS)

    def break_off(done: int, total: int) -> None:
        if done == 2:
            raise BrokenOffError

    expected, expected_nats = run(tmp_path / "whole", quiet)
    with pytest.raises(BrokenOffError):
        run(tmp_path / "broken", break_off)
    (tmp_path / "broken" / "before-3.f32.unfinished").write_bytes(b"half")
    passed: list[int] = []
    seen, nats = run(tmp_path / "broken", lambda done, total: passed.append(done))
    assert passed == [2, 3]
    assert nats == expected_nats
    for layer_id, arrays in expected.items():
        for name, array in arrays.items():
            assert np.array_equal(seen[layer_id][name], array)


def test_the_size_of_a_block_changes_nothing_but_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("qwen2_moe", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")

    def nats(folder: str) -> float:
        one = Pass(LayeredModel(checkpoint), INPUTS, tmp_path / folder)
        one.run(None, quiet)
        return one.nats(TARGETS)

    whole = nats("whole")
    monkeypatch.setattr(passes, "BLOCK_BYTES", 1)
    monkeypatch.setattr(passes, "LOGITS_BYTES", 1)
    monkeypatch.setattr(passes, "BLOCKS_OF_LAYER", 10**9)
    assert nats("parts") == pytest.approx(whole, rel=1e-6)


def test_no_layer_stays_in_memory(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "model")
    model = LayeredModel(open_checkpoint(tmp_path / "model"))
    Pass(model, INPUTS, tmp_path / "pass").run(None, quiet)
    assert all(parameter.is_meta for parameter in model._model.parameters())
