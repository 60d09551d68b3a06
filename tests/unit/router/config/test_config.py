"""Deployment files: what is wrong is said with its place, before Ray is started for it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.exceptions import RayServeException

import deploy
from benchmarks.shipped import SERVE_KEYS
from cluster.errors import CheckpointError, ConfigError, ExpertMeshError
from cluster.spec import ScalingTargets, budgets_of
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.identity import identity_of, text_identity
from router.app import build, deployment_names
from router.config.deployment import (
    AppConfig,
    ExpertsConfig,
    GatewayConfig,
    ModelConfig,
    RouterConfig,
    load_deployment,
    parse_args,
)
from router.config.experts import PoolConfig, TlsConfig
from router.serve.options import check_serve_part, completed
from router.served import ServedModel, check_file, inspect_models, pool_specs, with_identity
from tests.checkpoints import VOCAB_SIZE, save_mixtral

DEPLOY = Path(deploy.__file__).parent
DEPLOYMENT_FILES = sorted(DEPLOY.rglob("*.yaml"))
SERVE_CONFIGS = [file for file in DEPLOYMENT_FILES if "models" not in file.parts]
MODEL = {"id": "a", "path": "models/mesh-tiny"}
TLS = {"certificate": "c", "key": "k", "authority": "a", "cert": "x"}
PREFLIGHT = "router.ops.startup.preflight:AnyReplica"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    save_mixtral(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A small checkpoint that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def config_of(folder: Path, **sections: Any) -> AppConfig:
    model = {"id": "a", "path": str(folder), **sections.pop("model", {})}
    return parse_args({"models": [model], **sections})


def pools_of(*pools: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"models": [MODEL], "experts": {"pools": list(pools), **others}}


BOUNDS = {"min_actors": 1, "max_actors": 4}
GPU, CPU = {"name": "gpu", "actors": 2, "num_gpus": 1}, {"name": "cpu", "actors": 3, "threads": 4}

# Arguments.


def test_the_smallest_arguments_are_a_model() -> None:
    config = parse_args({"models": [MODEL]})
    assert config.models == (ModelConfig(id="a", path="models/mesh-tiny"),)
    assert (config.experts, config.router, config.gateway) == (
        ExpertsConfig(),
        RouterConfig(),
        GatewayConfig(),
    )


@pytest.mark.parametrize(
    ("args", "field", "section"),
    [
        ({"models": [MODEL], "modles": 1}, "args.modles", AppConfig),
        ({"models": [{**MODEL, "pth": "x"}]}, "args.models[0].pth", ModelConfig),
        ({"models": [MODEL, {**MODEL, "id": "b", "x": 1}]}, "args.models[1].x", ModelConfig),
        ({"models": [MODEL], "experts": {"actor": 2}}, "args.experts.actor", ExpertsConfig),
        ({"models": [MODEL], "experts": {"tls": TLS}}, "args.experts.tls.cert", TlsConfig),
        (pools_of({"name": "a", "actors": 1, "n": 2}), "args.experts.pools[0].n", PoolConfig),
        ({"models": [MODEL], "router": {"batch": 2}}, "args.router.batch", RouterConfig),
        ({"models": [MODEL], "gateway": {"port": 1}}, "args.gateway.port", GatewayConfig),
    ],
)
def test_an_unknown_key_is_named_with_the_allowed_ones(
    args: dict[str, Any], field: str, section: type[Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(args)
    assert caught.value.field == field
    assert caught.value.message == "unknown key; allowed keys: " + ", ".join(
        sorted(section.model_fields)
    )


BAD_VALUES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "args.models", "Field required"),
    ({"models": []}, "args.models", "at least 1 item"),
    ({"models": "x"}, "args.models", "given: 'x'"),
    ({"models": ["x"]}, "args.models[0]", "given: 'x'"),
    ({"models": [{"path": "x"}]}, "args.models[0].id", "Field required"),
    ({"models": [{"id": "a"}]}, "args.models[0].path", "Field required"),
    ({"models": [{"id": "a", "path": ""}]}, "args.models[0].path", "given: ''"),
    ({"models": [{**MODEL, "dtype": "int8"}]}, "args.models[0].dtype", "float32"),
    ({"models": [{**MODEL, "max_model_len": 1}]}, "args.models[0].max_model_len", "given: 1"),
    ({"models": [MODEL, MODEL]}, "args.models", "more than once: a"),
    ({"models": [MODEL], "experts": {"actors": 0}}, "args.experts.actors", "given: 0"),
    ({"models": [MODEL], "experts": {"min_copies": 0}}, "args.experts.min_copies", "given: 0"),
    (
        {"models": [MODEL], "experts": {"actors": 3, "min_copies": 4}},
        "args.experts.min_copies",
        "must be at most the number of actors, 3 (given: 4)",
    ),
    (
        {"models": [MODEL], "experts": {"min_copies": 3}},
        "args.experts.min_copies",
        "must be at most the number of actors, 2 (given: 3)",
    ),
    ({"models": [MODEL], "experts": {"actors": "two"}}, "args.experts.actors", "given: 'two'"),
    ({"models": [MODEL], "experts": {"num_cpus": -1}}, "args.experts.num_cpus", "given: -1"),
    ({"models": [MODEL], "experts": {"num_gpus": 2}}, "args.experts.num_gpus", "equal to 1"),
    (pools_of(), "args.experts.pools", "at least 1 item"),
    (pools_of({"name": "a"}), "args.experts.pools[0].actors", "Field required"),
    (pools_of({"name": "A b", "actors": 1}), "args.experts.pools[0].name", "given: 'A b'"),
    (pools_of(CPU, CPU), "args.experts.pools", "names must differ; given more than once: cpu"),
    (pools_of(CPU, actors=3), "args.experts.actors", "belongs in each pool when pools are listed"),
    (
        {"models": [MODEL], "experts": {"actors": 2, "autoscaling": {"min_actors": 1}}},
        "args.experts.autoscaling.max_actors",
        "Field required",
    ),
    (
        {"models": [MODEL], "experts": {"autoscaling": {"min_actors": 3, "max_actors": 2}}},
        "args.experts.autoscaling.max_actors",
        "must be at least min_actors, 3 (given: 2)",
    ),
    (
        {"models": [MODEL], "experts": {"actors": 5, "autoscaling": BOUNDS}},
        "args.experts.autoscaling",
        "actors, 5, must be from min_actors to max_actors",
    ),
    (
        {"models": [MODEL], "experts": {"actors": 2, "autoscaling": BOUNDS, "min_copies": 2}},
        "args.experts.min_copies",
        "number of actors, 1 (given: 2)",
    ),
    (
        pools_of({**CPU, "autoscaling": {**BOUNDS, "max": 1}}),
        "args.experts.pools[0].autoscaling.max",
        "allowed keys: downscale_delay_s, dry_run, max_actors",
    ),
    (pools_of(CPU, GPU, min_copies=6), "args.experts.min_copies", "number of actors, 5 (given: 6)"),
    (
        pools_of({**CPU, "memory_budget_bytes": 9}, GPU),
        "args.experts.pools",
        "all pools must have memory_budget_bytes, or none",
    ),
    (
        pools_of({**CPU, "resources": {"GPU": 1}}),
        "args.experts.pools[0].resources",
        "'GPU' is Ray's own; use num_cpus or num_gpus",
    ),
    (
        pools_of({**CPU, "resources": {"fast": 1.5}}),
        "args.experts.pools[0].resources",
        "fast must be a whole number, or between 0 and 1",
    ),
    ({"models": [MODEL], "experts": None}, "args.experts", "given: None"),
    ({"models": [MODEL], "router": {"replicas": 1.5}}, "args.router.replicas", "given: 1.5"),
    ({"models": [MODEL], "router": {"num_gpus": 1.5}}, "args.router.num_gpus", "given: 1.5"),
    ({"models": [MODEL], "router": {"device": "cuda"}}, "args.router.device", "'accelerator'"),
    (
        {"models": [MODEL], "router": {"device": "cpu", "num_gpus": 0.5}},
        "args.router",
        "device cpu leaves the GPU unused (given: num_gpus 0.5)",
    ),
    ({"models": [MODEL], "router": {"cache_tokens": 15}}, "args.router.cache_tokens", "given: 15"),
    ({"models": [MODEL], "gateway": {"max_choices": 0}}, "args.gateway.max_choices", "given: 0"),
    (
        {"models": [MODEL], "gateway": {"on_expert_loss": "guess"}},
        "args.gateway.on_expert_loss",
        "'strict', 'next_expert' or 'drop' (given: 'guess')",
    ),
    (
        {"models": [MODEL], "gateway": {"default_timeout_s": 0}},
        "args.gateway.default_timeout_s",
        "greater than 0",
    ),
    *(
        ({"models": [{"id": name, "path": "x"}]}, "args.models[0].id", "given")
        for name in ("", " ", "a b", "-a", "a\n", "ü", "a" * 129, 5, None)
    ),
    ({"models": [MODEL], "experts": {"transport": "tcp"}}, "args.experts.transport", "'stream'"),
    ({"models": [MODEL], "experts": {"tls": {}}}, "args.experts.tls.certificate", "required"),
]


@pytest.mark.parametrize(("args", "field", "words"), BAD_VALUES)
def test_a_bad_value_is_named_with_its_place_and_what_was_given(
    args: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(args)
    assert caught.value.field == field
    assert words in caught.value.message
    assert "\n" not in str(caught.value)


# Files.


def write(file: Path, document: object) -> Path:
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    return file


def application(**changes: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "import_path": "router.app:build",
        "args": {"models": [MODEL]},
        "deployments": [
            {"name": "Controller", "request_router_config": {"request_router_class": PREFLIGHT}}
        ],
        **changes,
    }


def test_a_file_is_read_to_its_applications(tmp_path: Path) -> None:
    second = {"models": [{"id": "b", "path": "p"}]}
    document = {"applications": [application(), application(name="y", args=second)]}
    [(first, _), (name, config)] = load_deployment(write(tmp_path / "a.yaml", document))
    assert (first, name, config.models[0].id) == ("x", "y", "b")


@pytest.mark.parametrize(
    "text", [b"a: [", b"\xff\xfe\x00", b"a: b: c", b"\x00", b"!!python/name:os.x"]
)
def test_a_file_that_is_not_yaml_is_refused(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match="is not YAML") as caught:
        load_deployment(file)
    assert caught.value.field == str(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["absent", "folder"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, what: str) -> None:
    file = tmp_path / "a.yaml"
    if what == "folder":
        file.mkdir()
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_deployment(file)
    assert caught.value.field == str(file)


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        "x",
        3,
        {},
        {"applications": None},
        {"applications": []},
        {"applications": {"a": 1}},
    ],
)
def test_a_file_without_applications_is_refused(tmp_path: Path, document: object) -> None:
    with pytest.raises(ConfigError, match="needs a list 'applications'"):
        load_deployment(write(tmp_path / "a.yaml", document))


@pytest.mark.parametrize(
    ("app", "field", "words"),
    [
        ("x", "applications[1]", "must be a mapping"),
        (None, "applications[1]", "must be a mapping"),
        (application(import_path="other:app"), "applications[1].import_path", "'other:app'"),
        ({"args": {}}, "applications[1].import_path", "router.app:build"),
        (application(args=None), "applications[1].args", "must be a mapping"),
        (application(args=[MODEL]), "applications[1].args", "must be a mapping"),
        (application(args={}), "applications[1].args.models", "Field required"),
        (
            application(args={"models": [MODEL], "router": {"x": 1}}),
            "applications[1].args.router.x",
            "allowed keys: autoscaling, cache_tokens",
        ),
    ],
)
def test_a_bad_application_is_named_with_its_file_and_place(
    tmp_path: Path, app: object, field: str, words: str
) -> None:
    file = write(tmp_path / "a.yaml", {"applications": [application(), app]})
    with pytest.raises(ConfigError) as caught:
        load_deployment(file)
    assert caught.value.field == f"{file}: {field}"
    assert words in caught.value.message


def test_there_are_deployment_files() -> None:
    assert DEPLOY / "cluster.yaml" in SERVE_CONFIGS


def test_pools_become_actors_of_their_kinds(folder: Path) -> None:
    experts = {
        "pools": [
            {**GPU, "memory_budget_bytes": 4_000_000},
            {**CPU, "memory_budget_bytes": 2_000_000, "resources": {"big": 0.5}},
        ],
        "max_queue_rows": 7,
    }
    config = config_of(folder, experts=experts)
    models = inspect_models(config)
    gpu, cpu = pool_specs(config.experts, models)
    assert gpu.actor_ids() == ["gpu-0", "gpu-1"]
    assert cpu.actor_ids() == ["cpu-0", "cpu-1", "cpu-2"]
    assert (gpu.actor.num_gpus, gpu.actor.threads, dict(gpu.actor.resources)) == (1, 1, {})
    assert (cpu.actor.num_gpus, cpu.actor.threads, cpu.actor.resources) == (0, 4, {"big": 0.5})
    assert gpu.actor.digest != cpu.actor.digest
    assert gpu.actor.max_queue_rows == cpu.actor.max_queue_rows == 7
    assert budgets_of((gpu, cpu)) == {
        **dict.fromkeys(gpu.actor_ids(), 4_000_000),
        **dict.fromkeys(cpu.actor_ids(), 2_000_000),
    }
    assert config.experts.num_actors == 5


def test_a_router_of_the_real_model_asks_no_emulating_actor(folder: Path) -> None:
    """It has the model's key, and would flag rows that are zeros as exact."""
    [real] = inspect_models(config_of(folder))
    [emulated] = inspect_models(config_of(folder, experts={"emulate": {"batch_s": 0.01}}))
    [again] = inspect_models(config_of(folder, experts={"emulate": {"batch_s": 0.02}}))
    assert emulated.id == real.id
    assert emulated.key != real.key
    assert emulated.key == again.key


def test_other_ends_or_another_tokenizer_are_another_identity_of_the_same_weights(
    folder: Path,
) -> None:
    config = config_of(folder)
    [served] = inspect_models(config)
    assert with_identity(served, config) == served
    for changed in (
        replace(served, text_identity="another tokenizer"),
        replace(served, eos_token_ids=(*served.eos_token_ids, 7)),
    ):
        assert changed.key == served.key
        assert with_identity(changed, config).identity != served.identity


def test_without_pools_all_actors_are_of_one_kind(folder: Path) -> None:
    config = config_of(folder, experts={"actors": 3, "threads": 2, "num_cpus": 1.5})
    [pool] = pool_specs(config.experts, inspect_models(config))
    assert pool.actor_ids() == ["expert-0", "expert-1", "expert-2"]
    assert (pool.actor.threads, pool.actor.num_cpus) == (2, 1.5)
    assert budgets_of([pool]) is None


def test_each_pool_follows_its_load_within_its_own_bounds(folder: Path) -> None:
    config = config_of(folder, experts={"pools": [GPU, {**CPU, "autoscaling": BOUNDS}]})
    gpu, cpu = pool_specs(config.experts, inspect_models(config))
    assert gpu.autoscaling is None
    assert cpu.autoscaling == ScalingTargets(1, 4, 0.6, 0.02, 5.0, 120.0)
    assert [cpu.autoscaling.bounded(n) for n in (0, 1, 3, 9)] == [1, 1, 3, 4]
    told = {**BOUNDS, "target_busy": 0.5, "standby_actors": 2, "dry_run": True}
    config = config_of(folder, experts={"actors": 4, "autoscaling": told})
    [pool] = pool_specs(config.experts, inspect_models(config))
    assert pool.autoscaling == ScalingTargets(1, 4, 0.5, 0.02, 5.0, 120.0, 2, dry_run=True)
    assert parse_args(config.effective()) == config


def test_pools_too_small_for_the_experts_are_refused(folder: Path) -> None:
    pools = [{**pool, "memory_budget_bytes": 300_000} for pool in (GPU, CPU)]
    with pytest.raises(ConfigError, match="5 actors with budgets of 1500000 bytes in all"):
        inspect_models(config_of(folder, experts={"pools": pools}))


@pytest.mark.parametrize("file", SERVE_CONFIGS, ids=lambda f: f.name)
def test_every_deployment_file_of_ours_is_fine(file: Path, saved: Path, tmp_path: Path) -> None:
    # The user makes the model of smol.yaml: another one is in its place here.
    made = file.read_text(encoding="utf-8").replace("path: models/smol", f"path: {saved}")
    copy = tmp_path / file.name
    copy.write_text(made, encoding="utf-8")
    lines = check_file(copy)
    assert any(line.startswith("application ") for line in lines)
    assert any(line.startswith("model ") for line in lines)


def test_the_deployment_files_are_those_that_the_documents_name() -> None:
    names = ["cluster.yaml", "gpu.yaml", "mixtures.yaml", "multi-node.yaml", "smol.yaml"]
    assert [file.name for file in SERVE_CONFIGS] == names


@pytest.mark.parametrize("file", SERVE_CONFIGS, ids=lambda f: f.name)
def test_each_deployment_file_of_ours_has_all_of_serves_part(file: Path) -> None:
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    part = {key: value for key, value in document.items() if key != "applications"}
    assert part == {key: completed({})[key] for key in SERVE_KEYS}
    check_serve_part(document)


@pytest.mark.parametrize("file", SERVE_CONFIGS, ids=lambda f: f.name)
def test_a_deployment_file_of_ours_listens_on_loopback_or_has_keys(file: Path) -> None:
    [(_, config)] = load_deployment(file)
    is_local = file.name in ("cluster.yaml", "mixtures.yaml", "smol.yaml")
    assert config.gateway.listen.host == ("127.0.0.1" if is_local else "0.0.0.0")
    assert config.gateway.listen.admin_host == "127.0.0.1"
    assert (config.security.keys_file is None) is is_local


@pytest.mark.parametrize("file", SERVE_CONFIGS, ids=lambda f: f.name)
def test_every_deployment_file_of_ours_is_checked_by_the_serve_command(file: Path) -> None:
    for app in yaml.safe_load(file.read_text(encoding="utf-8"))["applications"]:
        classes = [
            entry.get("request_router_config", {}).get("request_router_class")
            for entry in app["deployments"]
        ]
        assert PREFLIGHT in classes


# What the builder finds out about models.


def test_a_model_is_described_by_its_checkpoint(folder: Path) -> None:
    [served] = inspect_models(config_of(folder))
    assert (served.family, served.dtype, served.max_model_len) == ("mixtral", "float32", 256)
    assert (served.num_layers, served.num_experts, served.num_experts_per_tok) == (3, 8, 2)
    assert served.vocab_size == VOCAB_SIZE
    assert served.source.experts.expert_bytes == 3 * 64 * 96 * 4
    checkpoint = open_checkpoint(folder)
    assert served.source.identity == identity_of(checkpoint)
    assert served.text_identity == text_identity(checkpoint)


def test_dtype_and_length_of_the_configuration_win(folder: Path) -> None:
    config = config_of(folder, model={"dtype": "bfloat16", "max_model_len": 256})
    [served] = inspect_models(config)
    assert (served.dtype, served.max_model_len) == ("bfloat16", 256)
    assert served.source.dtype == "bfloat16"
    assert served.source.experts.expert_bytes == 3 * 64 * 96 * 2


def test_a_context_longer_than_the_models_own_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"at most the model's own 256 \(given: 257\)") as caught:
        inspect_models(config_of(folder, model={"max_model_len": 257}))
    assert caught.value.field == "args.models[0].max_model_len"


def test_a_memory_budget_that_cannot_hold_a_share_is_refused(folder: Path) -> None:
    share = 3 * 4 * 3 * 64 * 96 * 4  # layers, experts of one of two actors, bytes of an expert
    inspect_models(config_of(folder, experts={"memory_budget_bytes": share}))
    with pytest.raises(ConfigError, match=str(2 * share)) as caught:
        inspect_models(config_of(folder, experts={"memory_budget_bytes": share - 1}))
    assert caught.value.field == "args.experts.memory_budget_bytes"


def test_a_memory_budget_has_to_hold_every_copy(folder: Path) -> None:
    share = 3 * 8 * 3 * 64 * 96 * 4  # with two copies each of two actors holds all
    inspect_models(config_of(folder, experts={"memory_budget_bytes": share, "min_copies": 2}))
    with pytest.raises(ConfigError, match=str(2 * share)):
        inspect_models(
            config_of(folder, experts={"memory_budget_bytes": share - 1, "min_copies": 2})
        )


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_tls_files_that_are_not_there_are_named_with_their_place(
    folder: Path, tmp_path: Path, broken: int
) -> None:
    files = dict.fromkeys(TlsConfig.model_fields, str(folder / "config.json"))
    name = list(files)[broken]
    files[name] = str(tmp_path / "nothing.pem")
    with pytest.raises(ConfigError, match="no such file") as caught:
        inspect_models(config_of(folder, experts={"tls": files}), "file: args")
    assert caught.value.field == f"file: args.experts.tls.{name}"


def test_a_missing_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer") as caught:
        inspect_models(config_of(folder))
    assert caught.value.field == f"args.models[0].path: {folder}"


def test_a_damaged_checkpoint_is_refused_with_yaml_path_and_file(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(CheckpointError) as caught:
        inspect_models(config_of(folder), "file: args")
    assert caught.value.field == f"file: args.models[0].path: {folder / 'model.safetensors'}"


def with_eos(folder: Path, config: object, generation: object) -> Path:
    """Write the end-of-sequence ids into both files; ``...`` leaves the key or the file out."""
    file = folder / "config.json"
    values = {k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token_id"}
    if config is not ...:
        values["eos_token_id"] = config
    file.write_text(json.dumps(values))
    other = folder / "generation_config.json"
    other.unlink(missing_ok=True)
    if generation is not ...:
        other.write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (3, ..., (3,)),
        ([3, 4], ..., (3, 4)),
        (3, {}, (3,)),
        (3, {"eos_token_id": 5}, (5,)),
        (3, {"eos_token_id": [5, 6]}, (5, 6)),
        (..., {"eos_token_id": 5}, (5,)),
        (..., ..., ()),
        (None, {}, ()),
    ],
)
def test_the_generation_configuration_decides_what_ends_a_text(
    folder: Path, config: object, generation: object, expected: tuple[int, ...]
) -> None:
    [served] = inspect_models(config_of(with_eos(folder, config, generation)))
    assert served.eos_token_ids == expected


@pytest.mark.parametrize("eos", [-1, VOCAB_SIZE, "3", 3.0, True, [3, -1], [[3]], {"a": 1}])
def test_an_end_of_sequence_id_outside_the_vocabulary_is_refused(folder: Path, eos: object) -> None:
    for config, generation in ((eos, ...), (3, {"eos_token_id": eos})):
        with pytest.raises(CheckpointError, match="not in the vocabulary"):
            inspect_models(config_of(with_eos(folder, config, generation)))


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", '"x"', "[" * 100_000])
def test_a_damaged_generation_configuration_is_refused(folder: Path, text: str) -> None:
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        inspect_models(config_of(folder))
    assert caught.value.field.endswith("generation_config.json")


def served(*ids: str) -> list[ServedModel]:
    return inspect_models(parse_args({"models": [{**MODEL, "id": model_id} for model_id in ids]}))


def test_deployments_are_named_after_their_models() -> None:
    assert deployment_names(served("a", "org/b", "c.d_e-f")) == {
        "a": "Router-a",
        "org/b": "Router-org-b",
        "c.d_e-f": "Router-c.d_e-f",
    }


def test_models_whose_deployments_would_clash_are_refused() -> None:
    with pytest.raises(ConfigError, match="too alike") as caught:
        deployment_names(served("org/b", "org-b"))
    assert caught.value.field == "args.models"


def test_the_builder_reports_what_is_wrong_as_serve_shows_it(folder: Path) -> None:
    with pytest.raises(RayServeException, match=r"args\.models\[0\]\.x: unknown key"):
        build({"models": [{**MODEL, "x": 1}]})
    clashing = [{"id": name, "path": str(folder)} for name in ("a/b", "a-b")]
    with pytest.raises(RayServeException, match="too alike"):
        build({"models": clashing})


@pytest.mark.parametrize("key", ["host", "admin_host"])
def test_the_builder_refuses_a_host_that_others_reach_without_keys(key: str) -> None:
    args = {"models": [MODEL], "gateway": {"listen": {key: "0.0.0.0"}}}
    with pytest.raises(
        RayServeException, match=rf"args\.gateway\.listen\.{key}: must be .* got '0\.0\.0\.0'"
    ):
        build(args)


def test_the_builder_refuses_a_serve_with_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RayServeException("Serve runs proxies")

    monkeypatch.setattr("router.app.refuse_proxies", refuse)
    with pytest.raises(RayServeException, match="Serve runs proxies"):
        build({"models": [MODEL]})


def test_every_error_of_a_check_is_one_of_ours(tmp_path: Path) -> None:
    for args in ({"models": [{**MODEL, "path": "nowhere"}]}, {"models": [MODEL], "experts": 3}):
        with pytest.raises(ExpertMeshError):
            check_file(write(tmp_path / "a.yaml", {"applications": [application(args=args)]}))
