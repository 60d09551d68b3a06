"""The tree of hashes: what it is, that it covers every byte, and nothing but the content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from experts.checkpoint import hashes
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.hashes import leaf_spans, num_leaves, widened
from experts.checkpoint.identity import identity_of
from experts.checkpoint.remote import remote_files
from experts.checkpoint.remote.remote_reader import MAX_CHUNK_BYTES
from tests.checkpoints import copy_of, save_mixtral
from tests.unit.experts.checkpoint.changed_files import flip_in_tensor, header_of

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def plain_identity(folder: Path, leaf_bytes: int) -> str:
    """Compute an identity as the module's docstring describes it, one byte after another."""

    def line(value: object) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    tensors = {}
    for file in folder.glob("*.safetensors"):
        header, start = header_of(file)
        data = file.read_bytes()
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            leaves = b""
            while begin < end:
                leaves += blake3(data[begin : min(end, begin + leaf_bytes)]).digest()
                begin += leaf_bytes
            tensors[name] = blake3(line([name, entry["shape"], entry["dtype"]]) + leaves).digest()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    root = line(config) + b"".join(tensors[name] for name in sorted(tensors))
    return blake3(root).hexdigest()[:32]


@pytest.mark.parametrize(
    ("shard_size", "leaf_bytes"),
    [("1GB", 256 << 10), ("1GB", 1000), ("1GB", 1), ("50KB", 256 << 10), ("50KB", 4096)],
)
def test_an_identity_is_what_the_docstring_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaf_bytes: int, shard_size: str
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24} if leaf_bytes == 1 else {}
    model = save_mixtral(tmp_path / "whole", torch.bfloat16, **sizes)
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size=shard_size)
    monkeypatch.setattr(hashes, "LEAF_BYTES", leaf_bytes)
    assert identity_of(open_checkpoint(folder)) == plain_identity(folder, leaf_bytes)


def test_every_byte_of_every_tensor_counts(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    save_mixtral(folder, num_hidden_layers=1, num_local_experts=2)
    first = identity_of(open_checkpoint(folder))
    for name, info in open_checkpoint(folder).tensors.items():
        for place in {0, 4096, info.num_bytes * 3 // 4, info.num_bytes - 1}:
            if place < info.num_bytes:
                flip_in_tensor(folder, name, place)
                assert identity_of(open_checkpoint(folder)) != first, (name, place)
                flip_in_tensor(folder, name, place)
    assert identity_of(open_checkpoint(folder)) == first


def test_configuration_names_and_dtypes_count_and_the_order_of_keys_does_not(folder: Path) -> None:
    first = identity_of(open_checkpoint(folder))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert identity_of(open_checkpoint(folder)) == first
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 2e-5}))
    assert identity_of(open_checkpoint(folder)) != first
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    other = EXPERT.replace("experts.2", "experts.3")
    save_file(tensors | {EXPERT: tensors[other], other: tensors[EXPERT]}, file)
    assert identity_of(open_checkpoint(folder)) != first
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halves, file)
    as_bfloat16 = identity_of(open_checkpoint(folder))
    save_file({name: tensor.view(torch.float16) for name, tensor in halves.items()}, file)
    assert identity_of(open_checkpoint(folder)) != as_bfloat16


def test_place_and_shards_do_not_count(folder: Path, tmp_path: Path) -> None:
    identity = identity_of(open_checkpoint(folder))
    assert len(identity) == 32
    assert identity_of(open_checkpoint(copy_of(folder, tmp_path / "copy"))) == identity
    sharded = tmp_path / "sharded"
    save_mixtral(tmp_path / "whole").save_pretrained(sharded, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert identity_of(open_checkpoint(sharded)) == identity


def test_leaves_over_a_range_are_those_that_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert remote_files.CHUNK_BYTES % hashes.LEAF_BYTES == 0  # so a chunk has whole leaves
    assert remote_files.CHUNK_BYTES <= MAX_CHUNK_BYTES
    monkeypatch.setattr(hashes, "LEAF_BYTES", 4)
    for size in range(14):
        leaves = [set(range(begin, min(size, begin + 4))) for begin in range(0, size, 4)]
        assert num_leaves(size) == len(leaves)
        for begin in range(size):
            for end in range(begin + 1, size + 1):
                touched = [n for n, leaf in enumerate(leaves) if leaf & set(range(begin, end))]
                spans = list(leaf_spans(begin, end, size))
                assert [number for number, _, _ in spans] == touched
                assert [set(range(a, b)) for _, a, b in spans] == [leaves[n] for n in touched]
                assert set(range(*widened(begin, end, size))) == set.union(
                    *(leaves[n] for n in touched)
                )
