"""The models of the command: their sizes, what of the largest fits, and synthetic checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM
from transformers.utils import logging

from benchmarks.gpu.models import LARGE, SMALL, NoRoomError, Room, fitted, room
from benchmarks.synthetic import bytes_of, write_checkpoint
from experts.checkpoint.checkpoint import open_checkpoint
from router.ops.doctor.machine import SHARED_MEMORY

TINY = {
    **SMALL, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
GB = 10**9
MEMORY = str(SHARED_MEMORY)


@pytest.mark.parametrize(
    ("device_gb", "host_gb", "memory_gb", "disk_gb", "folder", "tightest"),
    [
        (80, 128, 60, 60, MEMORY, None),
        (12, 128, 60, 60, MEMORY, "the card has 6.6 GB"),
        (80, 128, 0, 60, "/tmp", None),
        (80, 24, 60, 5, MEMORY, "the host's memory has 8.8 GB"),
        (80, 128, 4, 6, "/tmp", "/tmp has 6.0 GB"),
    ],
)
def test_layers_are_left_out_until_the_model_fits_and_the_reason_is_given(
    device_gb: int, host_gb: int, memory_gb: int, disk_gb: int, folder: str, tightest: str | None
) -> None:
    folders = {MEMORY: memory_gb * GB, "/tmp": disk_gb * GB}
    fit = fitted(LARGE, Room(device_gb * GB, host_gb * GB, folders))
    assert fit.folder == folder
    assert fit.parameters == bytes_of(fit.config) // 2
    if tightest is None:
        assert fit.config == LARGE
        assert "all 16 layers, 13.5 GB" in fit.reason
        return
    assert tightest in fit.reason
    layers = fit.config["num_hidden_layers"]
    assert f"{layers} of 16 layers" in fit.reason
    given_gb = float(fit.reason.partition(" has ")[2].split()[0])
    assert bytes_of(fit.config) <= given_gb * GB
    assert bytes_of({**fit.config, "num_hidden_layers": layers + 1}) > given_gb * GB - GB


def test_without_room_for_a_layer_the_reason_is_an_error() -> None:
    with pytest.raises(NoRoomError, match="the card has no room"):
        fitted(LARGE, Room(4 * GB, 128 * GB, {"/tmp": 60 * GB}))
    with pytest.raises(NoRoomError, match="any folder has no room"):
        fitted(LARGE, Room(80 * GB, 128 * GB, {}))


def test_this_machine_has_room() -> None:
    found = room(7)
    assert found.device_bytes == 7
    assert found.host_bytes > 0
    assert all(found.folder_bytes.values())


def test_a_synthetic_checkpoint_is_one_that_transformers_and_this_project_load(
    tmp_path: Path,
) -> None:
    logging.disable_progress_bar()
    write_checkpoint(tmp_path, TINY)
    assert open_checkpoint(tmp_path).num_bytes == bytes_of(TINY)
    model = MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    state = model.state_dict()
    matrices = {name: one for name, one in state.items() if one.dim() > 1}
    for name, matrix in matrices.items():
        assert 0.015 < matrix.std() < 0.025, name
    for name in state.keys() - matrices.keys():
        assert torch.equal(state[name], torch.ones_like(state[name]))
    first, second = (state[f"model.layers.{i}.mlp.experts.down_proj"] for i in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all()
    assert logits.argmax(-1).unique().numel() > 1
