"""Every family against transformers: the same tokens and logits, whoever holds the experts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointError
from experts.checkpoint.checkpoint import open_checkpoint
from router.engine.batch import pack
from router.engine.scheduling.scheduler import Limits
from router.model.model import load_dense
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS, save_dbrx
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import check_greedy, prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=sorted(SAVERS))
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """A family's checkpoint, in several shards, and transformers' own model of it."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, SAVERS[request.param](folder, max_shard_size="150KB")


@pytest.fixture(scope="module")
def cluster(saved: tuple[Path, Any]) -> Iterator[LocalCluster]:
    cluster = LocalCluster(saved[0], num_actors=3, limits=Limits(32, 48, 64))
    yield cluster
    cluster.close()


@pytest.mark.parametrize("is_named", [True, False])
def test_dbrx_may_say_that_it_clips_nothing_or_say_nothing_of_it(
    tmp_path: Path, is_named: bool
) -> None:
    # transformers fails on such a model; it clips nothing of one that clips at a large number.
    attention: dict[str, Any] = {"kv_n_heads": 2, "rope_theta": 5e5}
    oracle = save_dbrx(tmp_path, attn_config=attention | {"clip_qkv": 1e30})
    change_config(tmp_path, "attn_config", attention | ({"clip_qkv": None} if is_named else {}))
    check_tokens(tmp_path, oracle, 20, 8)


def test_tokens_alone_and_in_a_crowd_of_mixed_lengths_equal_transformers(
    cluster: LocalCluster, saved: tuple[Path, Any]
) -> None:
    alone = [[(length, 16)] for length in (1, 17, 100)]
    crowd = [(1 + (7 * i) % 60, 1 + (5 * i) % 17) for i in range(12)]
    for sizes in (*alone, crowd):
        requests = [
            greedy_request(f"{i} of {sizes}", prompt_of(length, i + length), count)
            for i, (length, count) in enumerate(sizes)
        ]
        answers = cluster.generate(*requests)
        for request, (_, count), [event] in zip(requests, sizes, answers, strict=True):
            check_greedy(event.token_ids, saved[1], request.prompt_token_ids, count)


@torch.inference_mode()
def test_logits_are_transformers_own(saved: tuple[Path, Any]) -> None:
    folder, oracle = saved
    cluster = LocalCluster(folder, num_actors=2, threaded=False, limits=Limits(8, 64, 8))
    prompt = prompt_of(40, 3)
    cluster.scheduler.add(greedy_request("r", prompt, 4))
    for _ in range(4):  # a prefill and three decodes
        work = cluster.scheduler.schedule()
        ids = list(work[0].sequence.token_ids)
        step = pack(work, cluster.model.attention)
        ours = cluster.forward(step)
        theirs = oracle(torch.tensor([ids])).logits[0, -1:].float()
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        cluster.engine.step(work)


def test_the_router_holds_all_but_the_experts(saved: tuple[Path, Any]) -> None:
    folder, oracle = saved
    checkpoint = open_checkpoint(folder)
    assert len({info.file for info in checkpoint.tensors.values()}) > 1
    loaded = load_dense(checkpoint, torch.float32).state_dict()
    expected = {n: p for n, p in oracle.state_dict().items() if ".experts." not in n}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    parameters = sum(tensor.numel() for tensor in loaded.values())
    shapes = checkpoint.family.dense_tensors(checkpoint.config).values()
    assert parameters == sum(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize("name", sorted([*SAVERS, "mixtral"]))
def test_float16_is_served_too(tmp_path: Path, name: str) -> None:
    # Logits in bfloat16 are those of router/model/test_bfloat16.py.
    oracle = (SAVERS | {"mixtral": save_mixtral})[name](tmp_path, dtype=torch.float16)
    cluster = LocalCluster(tmp_path, threaded=False)
    assert cluster.checkpoint.dtype == "float16"
    prompt = prompt_of(20, 1)
    cluster.scheduler.add(greedy_request("r", prompt, 1))
    step = pack(cluster.scheduler.schedule(), cluster.model.attention)
    ours = cluster.forward(step)
    with torch.inference_mode():
        theirs = oracle(torch.tensor([prompt])).logits[0, -1:].float()
    # Roundings differ, so that a choice between nearly equal experts may.
    assert torch.cosine_similarity(ours, theirs).item() > 0.98


@pytest.mark.parametrize(
    ("name", "key", "value"), [("olmoe", "sliding_window", 8), ("qwen3_moe", "clip_qkv", 0.3)]
)
def test_a_key_that_only_other_families_have_changes_nothing(
    tmp_path: Path, name: str, key: str, value: Any
) -> None:
    oracle = SAVERS[name](tmp_path)
    change_config(tmp_path, key, value)
    check_tokens(tmp_path, oracle, 40, 8)


# What is refused, before anything is started.


def change_config(folder: Path, path: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    *parents, last = path.split(".")
    part = config
    for key in parents:
        part = part[key]
    part[last] = value
    (folder / "config.json").write_text(json.dumps(config))


REFUSED: list[tuple[str, str, Any, str]] = [
    ("dbrx", "d_model", "64", "d_model must be a positive integer"),
    ("dbrx", "ffn_config", 3, "ffn_config must be a mapping"),
    (
        "dbrx",
        "ffn_config.moe_num_experts",
        9,
        "router.layer.weight has shape [8, 64]; config.json says",
    ),
    ("dbrx", "ffn_config.moe_num_experts", 10**9, "config.json says"),
    ("dbrx", "ffn_config.ffn_act_fn", {"name": "sine"}, "unknown hidden_act 'sine'"),
    (
        "qwen3_moe",
        "rope_parameters",
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
        "partial_rotary_factor is not supported",
    ),
    ("olmoe", "num_experts", 9, "lacks 9 tensors"),
    ("qwen2_moe", "rope_scaling", {"type": "longrope"}, "rope type 'longrope' is not supported"),
    ("qwen2_moe", "shared_expert_intermediate_size", 71, "config.json says [71, 64]"),
    ("qwen2_moe", "decoder_sparse_step", 0, "decoder_sparse_step must be a positive integer"),
    ("qwen3_moe", "mlp_only_layers", ["1"], "mlp_only_layers must be a list of integers"),
    ("qwen3_moe", "mlp_only_layers", [0, 1, 2, 3], "must have positive numbers of experts"),
    ("qwen3_moe", "moe_intermediate_size", None, "lacks the key moe_intermediate_size"),
    ("qwen3_moe", "attention_bias", True, "lacks 16 tensors"),
    ("qwen3_moe", "head_dim", 16, "config.json says"),
    ("gpt_oss", "num_local_experts", 9, "config.json says [9"),
    ("gpt_oss", "attention_bias", False, "has unexpected 16 tensors"),
    ("deepseek_v2", "topk_group", 1, "topk_group 1 of n_group 4 does not fit"),
    ("deepseek_v2", "kv_lora_rank", 21, "config.json says"),
    ("deepseek_v3", "n_group", 3, "n_group 3 does not fit n_routed_experts 8"),
    ("deepseek_v3", "n_shared_experts", 1, "config.json says [48, 64]"),
    ("deepseek_v3", "first_k_dense_replace", -1, "first_k_dense_replace must be an integer"),
    ("deepseek_v3", "num_nextn_predict_layers", "1", "num_nextn_predict_layers must be"),
]


@pytest.mark.parametrize(("name", "key", "value", "words"), REFUSED)
def test_a_config_that_is_not_served_or_fits_no_tensor_is_refused(
    tmp_path: Path, name: str, key: str, value: Any, words: str
) -> None:
    SAVERS[name](tmp_path)
    open_checkpoint(tmp_path)
    change_config(tmp_path, key, value)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert words in caught.value.message
    assert str(tmp_path) in caught.value.field


def test_layers_that_predict_a_token_more_are_not_read(tmp_path: Path) -> None:
    oracle = SAVERS["deepseek_v3"](tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    last, more = "model.layers.2.", {}
    for name in (name for name in tensors if name.startswith(last)):
        more["model.layers.3." + name.removeprefix(last)] = tensors[name].clone()
    save_file(tensors | more, tmp_path / "model.safetensors", {"format": "pt"})
    change_config(tmp_path, "num_nextn_predict_layers", 1)
    assert open_checkpoint(tmp_path).tensors.keys() == tensors.keys()
    check_tokens(tmp_path, oracle, 9, 5)


def test_corrections_may_be_more_precise_than_the_rest(tmp_path: Path) -> None:
    SAVERS["deepseek_v3"](tmp_path, dtype=torch.bfloat16)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    save_file({**tensors, name: tensors[name].float()}, file, {"format": "pt"})
    assert open_checkpoint(tmp_path).dtype == "bfloat16"
    norm = "model.norm.weight"
    save_file({**tensors, norm: tensors[norm].float()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="mixes the dtypes BF16, F32"):
        open_checkpoint(tmp_path)


def test_latents_are_cached_not_keys_and_values(tmp_path: Path) -> None:
    SAVERS["deepseek_v3"](tmp_path)
    cache = LocalCluster(tmp_path, cache_tokens=64, threaded=False).model.decoder._cache
    assert [tuple(keys.shape) for keys in cache.keys] == 3 * [(4, 16, 1, 20 + 8)]
    assert all(v.data_ptr() == k.data_ptr() for k, v in zip(cache.keys, cache.values, strict=True))


def check_tokens(folder: Path, oracle: Any, length: int, count: int, **options: Any) -> None:
    """Check that a cluster of a checkpoint gives the tokens of transformers' own model."""
    cluster = LocalCluster(folder, **options)
    prompt = prompt_of(length, 1)
    [[event]] = cluster.generate(greedy_request("r", prompt, count))
    cluster.close()
    check_greedy(event.token_ids, oracle, prompt, count)
