"""Peers: the process that measures one, the folder of environments, and the GGUF files."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
import torch
from transformers import MixtralForCausalLM
from typer.testing import CliRunner

from benchmarks.common import SIZES, make_checkpoint
from benchmarks.peers import registry
from benchmarks.peers.ask import PeerFailedError, ask
from benchmarks.peers.batches import Row, generate
from benchmarks.peers.gguf_file import as_pairs, write_gguf
from benchmarks.peers.hf_transformers import Transformers
from benchmarks.peers.side import Task
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.expert_weights import read_tensor
from router.cli.app import app

FAKE = "tests.unit.benchmarks.fake_peer"
TASK = Task(
    model="a folder", format="plain", threads=1, prompts=[[1, 2], [10, 20], [7, 7]],
    streams=(3, 1), tokens=4, rounds=2, long_prompts=[[5] * 9], context=64,
)  # fmt: skip
TINY = {
    **SIZES, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3,
}  # fmt: skip


def test_a_peer_is_measured_in_a_process_of_its_own() -> None:
    reply = ask(sys.executable, FAKE, TASK)
    assert (reply["version"], reply["threads"]) == ("fake 1", 1)
    three, one = (reply["streams"][number] for number in ("3", "1"))
    assert three["tokens"] == [[3, 4, 5, 6], [21, 22, 23, 24], [8, 9, 10, 11]]
    assert one["tokens"] == [[3, 4, 5, 6]]
    assert len(three["rates"]) == len(one["rates"]) == 2
    assert min(*three["rates"], *one["rates"]) > 0
    assert {length: len(times_s) for length, times_s in reply["prefill_s"].items()} == {"9": 2}


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("crash", r"crash ended with status 3; .*\nno such number format"),
        ("silent", "silent ended without a reply"),
        ("short", r"3 streams of 4 tokens gave \[3, 3, 3\] tokens"),
    ],
)
def test_a_peer_that_fails_says_why(behaviour: str, message: str) -> None:
    with pytest.raises(PeerFailedError, match=message):
        ask(sys.executable, FAKE, replace(TASK, format=behaviour))


def test_a_peer_that_hangs_ends_with_its_children() -> None:
    children: list[str] = []
    for timeout_s in (2, 20, 120):  # a busy machine needs longer to start the child
        with pytest.raises(PeerFailedError, match=f"hang took longer than {timeout_s} s") as raised:
            ask(sys.executable, FAKE, replace(TASK, format="hang"), timeout_s=timeout_s)
        children = re.findall(r"child (\d+)", str(raised.value))
        if children:
            break
    [child] = children
    deadline_s = time.monotonic() + 20
    while is_alive(int(child)):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class CountingContext:
    """The next token is the sum of a sequence's tokens, modulo 10; keeps the batches."""

    def __init__(self) -> None:
        self.batches: list[list[Row]] = []
        self.sequences: dict[int, list[int]] = {}

    def clear(self) -> None:
        self.sequences.clear()

    def step(self, rows: Sequence[Row]) -> list[int]:
        self.batches.append(list(rows))
        following = []
        for row in rows:
            tokens = self.sequences.setdefault(row.sequence, [])
            assert row.position == len(tokens)
            tokens.append(row.token)
            if row.wants_next:
                following.append(sum(tokens) % 10)
        return following


def test_sequences_of_different_lengths_decode_in_one_batch() -> None:
    context = CountingContext()
    for _ in range(2):  # the second time begins anew
        assert generate(context, [[1, 2], [5]], 3) == [[3, 6, 2], [5, 0, 0]]
    prefill, *steps = context.batches[:3]
    assert prefill == [Row(1, 0, 0, False), Row(2, 1, 0, True), Row(5, 0, 1, True)]
    assert steps[0] == [Row(3, 2, 0, True), Row(5, 1, 1, True)]


def test_peers_are_the_environments_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").mkdir()
    python = tmp_path / "llama.cpp" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    found = {peer.name: where for peer, where in registry.installed(tmp_path).items()}
    assert found == {"transformers": sys.executable, "llama.cpp": str(python)}
    assert set(registry.missing(registry.installed(tmp_path))) == {"vllm", "ik_llama.cpp"}
    assert [peer.name for peer in registry.installed(None)] == ["transformers"]
    for peer in registry.PEERS:
        assert {*map(registry.bits_of, peer.formats)} <= {32, 16, 8}
    with pytest.raises(ValueError, match="is no folder"):
        registry.installed(tmp_path / "nowhere")
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'expertmesh"):  # which writes GGUF
        registry.installed(tmp_path)
    (tmp_path / "llama.cpp").rename(tmp_path / "lama.cpp")
    with pytest.raises(ValueError, match=r"no peers: lama.cpp .* peers are vllm, llama.cpp"):
        registry.installed(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, sizes=TINY)
    return folder


def test_transformers_gives_its_own_greedy_tokens(checkpoint: Path, one_thread: None) -> None:
    prompts = [[1, 2, 3], [50, 60, 70]]
    model = MixtralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor(prompts)
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    task = replace(TASK, model=str(checkpoint), format="fp32 eager")
    assert Transformers(task).generate(prompts, 4) == ids[:, 3:].tolist()


@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_a_gguf_file_converts_back_to_the_same_weights(
    checkpoint: Path, kind: str, tmp_path: Path
) -> None:
    write_gguf(checkpoint, tmp_path / "model.gguf", kind, "llama")
    words = ["convert", str(tmp_path / "model.gguf"), str(tmp_path / "back"), "--dtype", "bfloat16"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    before, after = open_checkpoint(checkpoint), open_checkpoint(tmp_path / "back")
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        ours = read_tensor(before, name, "bfloat16")
        assert np.array_equal(ours, read_tensor(after, name, "bfloat16")), name
    for key in ("num_local_experts", "num_experts_per_tok", "rms_norm_eps", "num_key_value_heads"):
        assert before.config[key] == after.config[key]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_matrices_have_the_format_and_gates_and_vectors_fp32(
    checkpoint: Path, kind: str, tmp_path: Path
) -> None:
    write_gguf(checkpoint, tmp_path / "model.gguf", kind, "mistral3")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "mistral3"
    assert fields["mistral3.vocab_size"] == TINY["vocab_size"]
    assert fields["mistral3.expert_used_count"] == TINY["num_experts_per_tok"]
    opened = open_checkpoint(checkpoint)
    for tensor in reader.tensors:
        is_plain = "norm" in tensor.name or "ffn_gate_inp" in tensor.name
        assert tensor.tensor_type.name == ("F32" if is_plain else kind), tensor.name
        if tensor.name == "blk.1.ffn_down_exps.weight":
            name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
            expected = read_tensor(opened, name, "bfloat16").astype(np.float32)
            stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)[2]
            step = {"F32": 0.0, "BF16": 0.0, "F16": 1e-7, "Q8_0": np.abs(expected).max() / 127}
            assert np.abs(stored - expected).max() <= step[kind]
    assert len(reader.tensors) == 3 + 2 * 10


def test_a_heads_halves_alternate() -> None:
    rows = torch.arange(8.0).reshape(8, 1)
    assert as_pairs(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
