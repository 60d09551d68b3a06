"""A shard that is written a tensor at a time is the library's, and a plan may mix dtypes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.family_checkpoints import SAVERS
from workshop.convert.plan import STORED, Piece, Shard, make_plan
from workshop.convert.source import Take
from workshop.convert.write import open_source, write_shard


def test_the_library_reads_what_is_written_with_wide_numbers_first(tmp_path: Path) -> None:
    tensors = {
        "narrow": torch.randn(3, 5).to(torch.bfloat16),
        "wide": torch.randn(7),
        "half": torch.randn(2, 2, 3).to(torch.float16),
    }
    pieces = tuple(
        Piece(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), Take(name))
        for name, t in tensors.items()
    )
    size_bytes = sum(piece.num_bytes for piece in pieces)
    file = tmp_path / "a.safetensors"
    write_shard(file, Shard(file.name, pieces, size_bytes), iter(tensors.values()))
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert opened.offset_keys()[0] == "wide"


def test_a_plan_keeps_the_dtype_of_each_tensor(tmp_path: Path) -> None:
    SAVERS["deepseek_v3"](tmp_path, dtype=torch.bfloat16)
    correction = "mlp.gate.e_score_correction_bias"
    stored = load_file(tmp_path / "model.safetensors")
    stored = {n: t.float() if n.endswith(correction) else t for n, t in stored.items()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    plan = make_plan(open_source(tmp_path), STORED, 10**9)
    dtypes = {piece.name: piece.dtype for shard in plan.shards for piece in shard.pieces}
    assert dtypes == {n: str(t.dtype).removeprefix("torch.") for n, t in stored.items()}
    assert {d for name, d in dtypes.items() if name.endswith(correction)} == {"float32"}
    assert plan.dtype == "bfloat16"
