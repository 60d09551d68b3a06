"""What ``plan`` says of a model, against transformers, its makers' figures, and the placement."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.errors import CheckpointError, ConfigError
from cluster.placement.placement import assign_experts
from cluster.spec import ModelExperts
from experts.checkpoint.checkpoint import open_checkpoint
from router.config.deployment import RouterConfig
from router.model.memory import RouterSizes
from router.ops.plan.plan import (
    ACTOR_PROCESS_BYTES,
    ROUTER_PROCESS_BYTES,
    PlannedModel,
    Wish,
    fewest_devices,
    largest_share,
    make_plan,
    problems,
)
from router.ops.plan.shape import ModelShape, shape_of
from router.ops.plan.source import find_model, known_models
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS

BUNDLED = Path(__file__).parents[5] / "deploy" / "models" / "mesh-tiny"
KNOWN = known_models()
GB = 10**9


def shape(num_layers: int, num_experts: int) -> ModelShape:
    """Return a shape of which only what is placed matters."""
    router = RouterSizes(
        parameters=100,
        float32_parameters=0,
        num_layers=num_layers,
        cached_head_values=4,
        head_values=4,
        query_heads=1,
        hidden_size=2,
        inner_size=0,
        num_experts=num_experts,
        num_experts_per_tok=2,
        vocab_size=10,
        caches_latents=False,
        caps_scores=False,
    )
    return ModelShape(
        model_type="mixtral",
        num_layers=num_layers,
        num_moe_layers=num_layers,
        num_experts=num_experts,
        num_experts_per_tok=2,
        router=router,
        lookup_parameters=0,
        expert_parameters=10,
        intermediate_size=1,
        max_position_embeddings=1024,
    )


def planned(of: ModelShape) -> PlannedModel:
    return PlannedModel("m", of, "bfloat16", "here")


def meta_model(config: dict[str, Any]) -> torch.nn.Module:
    """Return transformers' own model of a configuration, without memory for its weights."""
    fields = copy.deepcopy(config)
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(fields.pop("model_type"), **fields)
        )
    return model


def weights_of(model: torch.nn.Module) -> dict[str, int]:
    """Return the size of each weight, and of each bias that a gate keeps as a buffer."""
    biases = [named for named in model.named_buffers() if "correction_bias" in named[0]]
    return {key: one.numel() for key, one in (*model.named_parameters(), *biases)}


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "grok-1"])
def test_parameters_are_those_of_transformers_model(name: str) -> None:
    config = KNOWN[name]["config"]
    of = shape_of(config, name)
    model = meta_model(config)
    weights = weights_of(model)
    experts = sum(size for key, size in weights.items() if ".experts." in key)
    assert of.num_all_experts * of.expert_parameters == experts
    assert of.total_parameters == sum(weights.values())
    embedding = model.get_input_embeddings().weight.numel()  # type: ignore[operator]
    assert of.lookup_parameters == embedding


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_those_that_the_makers_tell(name: str) -> None:
    published, of = KNOWN[name]["published"], shape_of(KNOWN[name]["config"], name)
    assert of.total_parameters / 1e9 == pytest.approx(published["total"], rel=0.01)
    if "active" in published:
        assert of.active_parameters / 1e9 == pytest.approx(published["active"], rel=0.02)


def test_grok_has_four_norms_a_layer_and_one_table() -> None:
    of = shape_of(KNOWN["grok-1"]["config"], "grok-1")
    hidden, layers = 6144, 64
    attention = 2 * hidden * (48 + 8) * 128
    rest = 131072 * hidden + hidden + layers * (attention + 4 * hidden + 8 * hidden)
    assert of.router_parameters == rest
    assert of.active_parameters / of.total_parameters == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mixtral-8x7b", 32 * 2 * 8 * 128),
        ("dbrx", 40 * 2 * 8 * 128),
        ("gpt-oss-120b", 36 * 2 * 8 * 64),
        ("deepseek-v3", 61 * (512 + 64)),  # one latent and one rotary key a layer
    ],
)
def test_the_cache_holds_keys_and_values_or_the_latent(name: str, values: int) -> None:
    assert shape_of(KNOWN[name]["config"], name).cache_values_per_token == values


def test_dense_layers_and_missing_query_ranks_are_counted_too() -> None:
    small = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
    }
    qwen = small | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_experts": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
    }
    deepseek = KNOWN["deepseek-v3"]["config"] | small
    deepseek |= {"num_hidden_layers": 3, "first_k_dense_replace": 0, "q_lora_rank": None}
    for config in (qwen, deepseek):
        total = sum(weights_of(meta_model(config)).values())
        assert shape_of(config, "here").total_parameters == total


def test_a_checkpoint_is_planned_from_its_config_and_headers(tmp_path: Path) -> None:
    save_mixtral(tmp_path / "random")
    for folder in (BUNDLED, tmp_path / "random"):
        model, checkpoint = find_model(str(folder)), open_checkpoint(folder)
        values = {name: torch.Size(one.shape).numel() for name, one in checkpoint.tensors.items()}
        assert model.shape.total_parameters == sum(values.values())
        plan = make_plan(model, Wish())
        assert plan.expert_bytes == checkpoint.expert_bytes(checkpoint.dtype)
        of_experts = sum(count for name, count in values.items() if ".experts." in name)
        assert plan.all_experts_bytes == of_experts * 4
        assert plan.router_weight_bytes == (sum(values.values()) - of_experts) * 4
        assert model.dtype == "float32"
    half = find_model("mesh-tiny", "bfloat16")
    assert half.shape == find_model(str(BUNDLED)).shape
    assert 2 * make_plan(half, Wish()).expert_bytes == open_checkpoint(BUNDLED).expert_bytes(
        "float32"
    )


def test_a_configuration_without_weights_is_planned_too(tmp_path: Path) -> None:
    config = KNOWN["gpt-oss-120b"]["config"] | {"torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for model in (find_model(str(tmp_path)), find_model("GPT-OSS-120B")):
        assert model.shape == shape_of(config, "")
    assert find_model(str(tmp_path)).dtype == "float16"
    assert "mxfp4" in find_model("gpt-oss-120b").note


@pytest.mark.parametrize("name", sorted(SAVERS))
def test_every_familys_checkpoint_is_planned_as_large_as_it_is(tmp_path: Path, name: str) -> None:
    oracle = SAVERS[name](tmp_path)
    model = find_model(str(tmp_path))
    tensors = oracle.state_dict()
    of_experts = sum(one.numel() for key, one in tensors.items() if ".experts." in key)
    assert model.shape.num_all_experts * model.shape.expert_parameters == of_experts
    assert model.shape.total_parameters == sum(one.numel() for one in tensors.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "unknown model_type 'llama'"),
        ({"hidden_size": None}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers must be a positive integer"),
        ({"num_experts": 0}, "num_experts must be a positive integer"),
        ({"mlp_only_layers": 3}, "mlp_only_layers must be a list"),
    ],
)
def test_a_wrong_config_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    config = KNOWN["qwen3-235b-a22b"]["config"] | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words) as caught:
        find_model(str(tmp_path))
    assert caught.value.field == str(tmp_path / "config.json")


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="lacks the key ffn_hidden_size"):
        shape_of(KNOWN["dbrx"]["config"] | {"ffn_config": None}, "here")
    with pytest.raises(ConfigError, match=r"neither a folder nor a known model; known: mixtral"):
        find_model("mixtral-9x9b")
    with pytest.raises(ConfigError, match="--dtype: must be one of auto"):
        find_model("mesh-tiny", "int4")


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("num_devices", [3, 4, 5, 7, 16])
def test_the_fullest_device_is_the_one_of_the_placement(copies: int, num_devices: int) -> None:
    for num_layers, num_experts in ((1, 1), (4, 8), (7, 5), (3, 16)):
        of = shape(num_layers, num_experts)
        experts = ModelExperts("m", tuple(range(num_layers)), num_experts, 10)
        ids = [f"expert-{i}" for i in range(num_devices)]
        shares = assign_experts([experts], ids, None, copies)
        assert largest_share(of, num_devices, copies) == max(len(keys) for keys in shares.values())


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("room", [1, 2, 5, 9, 1000])
def test_the_fewest_devices_are_really_the_fewest(copies: int, room: int) -> None:
    of = shape(3, 5)
    assert fewest_devices(of, copies, 0) is None  # no device holds less than an expert
    enough = [n for n in range(copies, 30) if largest_share(of, n, copies) <= room]
    assert fewest_devices(of, copies, room) == (min(enough) if enough else None)
    if room == 1000:
        assert min(enough) == copies  # copies are on devices of their own, however small


def test_mixtral_fits_where_arithmetic_says_so() -> None:
    plan = make_plan(find_model("mixtral-8x7b"), Wish(copies=2, device_memory_bytes=80 * GB))
    expert = 3 * 4096 * 14336 * 2
    assert (plan.expert_bytes, plan.all_experts_bytes) == (expert, 256 * expert)
    assert plan.cache_token_bytes == 32 * 2 * 8 * 128 * 2
    [devices] = plan.devices
    batch = 1024 * (4 * 4096 + 6 * 14336) * 2
    room = (80 * GB - ACTOR_PROCESS_BYTES - batch) // expert
    assert devices.num_devices == -(-512 // room) == 3
    actor = devices.experts_on_fullest * expert + ACTOR_PROCESS_BYTES + batch
    assert devices.bytes_on_fullest == actor <= 80 * GB
    free = 80 * GB - ROUTER_PROCESS_BYTES - plan.router_weight_bytes - plan.router_step_bytes
    assert devices.cache_tokens == free // plan.cache_token_bytes
    assert devices.cache_tokens_beside_actor == (free - actor) // plan.cache_token_bytes
    assert problems(plan) == []


def test_a_router_shares_the_fullest_device_where_its_step_fits_there_too() -> None:
    model = find_model("mixtral-8x7b", "float32")  # whose attention gathers the cache
    wish = Wish(device_memory_bytes=96 * GB, devices=2)
    [devices] = make_plan(model, wish).devices
    assert devices.cache_tokens > 0 == devices.cache_tokens_beside_actor
    [devices] = make_plan(model, replace(wish, devices=3)).devices
    longer = devices.cache_tokens_beside_actor
    [devices] = make_plan(model, replace(wish, devices=3, context=4096)).devices
    assert devices.cache_tokens_beside_actor > longer > 0  # a shorter context, a smaller step


def test_given_devices_are_judged() -> None:
    model = find_model("mixtral-8x7b")
    plan = make_plan(model, Wish(copies=2, device_memory_bytes=24 * GB, devices=4))
    [devices] = plan.devices
    assert not devices.experts_fit
    assert devices.most_copies == 1
    [problem] = problems(plan)
    assert problem == (
        "2 copies of the experts need 45.7 GB on each of 4 devices of 24.0 GB, which hold one copy."
    )
    alone = make_plan(model, Wish(copies=2, devices=4))
    assert alone.devices == ()
    assert alone.needed_device_bytes == devices.bytes_on_fullest


def test_what_does_not_fit_is_said_once_each() -> None:
    tight = make_plan(find_model("deepseek-v3"), Wish(device_memory_bytes=24 * GB))
    assert len(problems(tight)) == 1
    assert problems(tight)[0].startswith("A router's weights, process and step need 45.1 GB")
    small = make_plan(find_model("grok-1"), Wish(device_memory_bytes=GB))
    assert [sentence.split(" ")[0] for sentence in problems(small)] == ["One", "A"]
    wide = Wish(device_memory_bytes=24 * GB, context=32768, concurrency=8)
    [cache] = problems(make_plan(find_model("mixtral-8x7b"), wide))
    assert cache.startswith("A cache of 262,144 tokens needs 34.4 GB;")
    small = planned(shape(4, 8))
    alone = make_plan(small, Wish()).actor_bytes_without_experts
    none = make_plan(small, Wish(device_memory_bytes=alone + 20))
    assert problems(none)[0].startswith("One copy of the experts needs more than 1000 devices")


def test_the_cache_is_what_a_router_reserves_unless_asked_otherwise() -> None:
    model = find_model("mixtral-8x7b")
    default = RouterConfig().cache_tokens_for(32768)
    assert make_plan(model, Wish()).wanted_cache_tokens == default == 65536
    assert make_plan(model, Wish(context=1000)).wanted_cache_tokens == 32_000
    assert make_plan(model, Wish(concurrency=4)).wanted_cache_tokens == 4 * 32768
    both = make_plan(model, Wish(context=1000, concurrency=4))
    assert both.router_bytes == both.router_bytes_without_cache + 4000 * both.cache_token_bytes


def test_wishes_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--copies: must be at most the number of devices, 2"):
        make_plan(planned(shape(4, 8)), Wish(copies=3, devices=2))
    with pytest.raises(ConfigError, match=r"--context: must be at most the model's own, 1024"):
        make_plan(planned(shape(4, 8)), Wish(context=1025))
