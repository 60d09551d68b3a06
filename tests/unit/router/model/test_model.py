"""A router's model: transformers' own but for the experts, which it neither holds nor reads."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import MixtralForCausalLM
from transformers.models.mixtral import modeling_mixtral

from cluster.errors import CheckpointError
from experts.checkpoint.checkpoint import open_checkpoint
from router.model.model import load_dense
from router.model.parts import RemoteExperts, take_gates, torch_attention
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_part_is_transformers_own(folder: Path, dtype: torch.dtype) -> None:
    whole = MixtralForCausalLM.from_pretrained(folder, dtype=dtype)
    model = load_dense(open_checkpoint(folder), dtype)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    loaded = model.state_dict()
    expected = {n: p for n, p in whole.state_dict().items() if ".experts." not in n}
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    save_mixtral(tmp_path, tie_word_embeddings=True)
    model = load_dense(open_checkpoint(tmp_path), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_transformers_own_class_is_put_back_even_after_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = modeling_mixtral.MixtralExperts
    load_dense(open_checkpoint(folder), torch.float32)
    assert modeling_mixtral.MixtralExperts is original
    import transformers

    def fails(*_: object, **__: object) -> None:
        assert modeling_mixtral.MixtralExperts is RemoteExperts
        raise RuntimeError("a fault of the test's")

    monkeypatch.setattr(transformers.MixtralForCausalLM, "from_pretrained", fails)
    with pytest.raises(RuntimeError, match="a fault of the test's"):
        load_dense(open_checkpoint(folder), torch.float32)
    assert modeling_mixtral.MixtralExperts is original


def test_each_layers_experts_know_their_layer_and_hold_its_gate(folder: Path) -> None:
    model = load_dense(open_checkpoint(folder), torch.float32)
    take_gates(model, open_checkpoint(folder))
    replaced = [m for m in model.modules() if isinstance(m, RemoteExperts)]
    assert [m.layer_id for m in replaced] == [0, 1, 2]
    assert len({m.gate for m in replaced} - {None}) == 3
    assert not any("gate" in name for name, _ in model.named_parameters())


def test_a_model_with_another_number_of_mixtures_is_refused(folder: Path) -> None:
    model = load_dense(open_checkpoint(folder), torch.float32)
    del model.model.layers[1]
    with pytest.raises(CheckpointError, match="2 expert modules were replaced, 3 expected"):
        take_gates(model, open_checkpoint(folder))


def test_a_layer_with_unknown_parts_is_refused(folder: Path) -> None:
    model = load_dense(open_checkpoint(folder), torch.float32)
    del model.model.layers[1].self_attn
    with pytest.raises(CheckpointError, match="MixtralDecoderLayer has unknown parts"):
        torch_attention(model.model.layers[1])


def test_a_checkpoint_that_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    save_mixtral(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    with safe_open(tmp_path / "model.safetensors", "pt") as shard:
        tensors = {key: shard.get_tensor(key) for key in shard.keys() if key != name}  # noqa: SIM118
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        load_dense(checkpoint, torch.float32)


MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from experts.checkpoint.checkpoint import open_checkpoint
from router.model.model import load_dense

def peak_mb():
    # Not getrusage: its peak is handed down from the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

load_dense(open_checkpoint(Path(sys.argv[1])), torch.float32)  # whatever loading costs once
checkpoint = open_checkpoint(Path(sys.argv[2]))
before = peak_mb()
load_dense(checkpoint, torch.float32)
dense = peak_mb()
from transformers import MixtralForCausalLM
model = MixtralForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
sum(float(p.sum()) for p in model.parameters())
print(json.dumps([dense - before, peak_mb() - before]))
"""


def test_loading_a_router_takes_no_memory_for_the_experts(folder: Path, tmp_path: Path) -> None:
    save_mixtral(tmp_path, intermediate_size=9000)
    shape = open_checkpoint(tmp_path).shape
    experts_mb = len(shape.layers) * shape.num_experts * 3 * shape.hidden_size * 9000 * 4 / 2**20
    assert experts_mb > 150
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    dense_mb, whole_mb = json.loads(result.stdout.splitlines()[-1])
    # A page of a mapped file counts as soon as it is read, so this says "unread" as well.
    assert dense_mb < experts_mb / 10
    assert whole_mb > experts_mb  # the measurement sees experts where there are some


def test_a_token_attends_to_so_many_others_at_the_cost_of_its_products(tmp_path: Path) -> None:
    save_mixtral(tmp_path, num_hidden_layers=2)
    attention, gate, experts = 2 * 64 * 64 + 2 * 64 * 32, 64 * 8, 2 * 3 * 64 * 96
    norms = 2 * 2 * 64 + 64
    weights = 2 * (attention + gate + experts) + norms
    assert LocalCluster(tmp_path, threaded=False).model.even_context == weights / (2 * 4 * 2 * 16)


def test_windows_that_bound_all_layers_make_no_token_dearer(tmp_path: Path) -> None:
    save_mixtral(tmp_path, num_hidden_layers=1, sliding_window=32)
    assert LocalCluster(tmp_path, threaded=False).model.even_context == math.inf
