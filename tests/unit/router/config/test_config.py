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
from cluster.errors import CheckpointError, ConfigError
from cluster.spec import ScalingTargets, budgets_of
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.identity import identity_of, text_identity
from router.app import build, deployment_names
from router.config.deployment import (
    AppConfig,
    ExpertsConfig,
    GatewayConfig,
    RouterConfig,
    load_deployment,
    parse_args,
)
from router.config.experts import PoolConfig, TlsConfig
from router.config.models import ModelConfig
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
    sections = (config.experts, config.router, config.gateway)
    assert sections == (ExpertsConfig(), RouterConfig(), GatewayConfig())


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
    keys = ", ".join(sorted(section.model_fields))
    assert caught.value.message in (
        f"unknown key; allowed keys: {keys}",
        f"unknown key; did you mean {NEAREST.get(field)}? Allowed keys: {keys}",
    )


NEAREST = {
    "args.modles": "models", "args.models[0].pth": "path", "args.experts.actor": "actors",
    "args.experts.tls.cert": "certificate",
}  # fmt: skip
NAMES = ("", " ", "a b", "-a", "a\n", "ü", "a" * 129, 5, None)
BAD_MODELS: list[tuple[object, str, str]] = [
    ([], "", "at least 1 item"),
    ("x", "", "given: 'x'"),
    (["x"], "[0]", "given: 'x'"),
    ([{"path": "x"}], "[0].id", "Field required"),
    ([{"id": "a"}], "[0].path", "Field required"),
    ([{"id": "a", "path": ""}], "[0].path", "given: ''"),
    ([{**MODEL, "dtype": "int8"}], "[0].dtype", "float32"),
    ([{**MODEL, "max_model_len": 1}], "[0].max_model_len", "given: 1"),
    ([MODEL, MODEL], "", "more than once: a"),
    *(([{"id": name, "path": "x"}], "[0].id", "given") for name in NAMES),
]
BAD_POOLS: list[tuple[list[dict[str, Any]], str, str]] = [
    ([], "", "at least 1 item"),
    ([{"name": "a"}], "[0].actors", "Field required"),
    ([{"name": "A b", "actors": 1}], "[0].name", "given: 'A b'"),
    ([CPU, CPU], "", "names must differ; given more than once: cpu"),
    (
        [{**CPU, "autoscaling": {**BOUNDS, "max": 1}}],
        "[0].autoscaling.max",
        "allowed keys: downscale_delay_s, dry_run, max_actors",
    ),
    ([{**CPU, "memory_budget_bytes": 9}, GPU], "", "must have memory_budget_bytes, or none"),
    ([{**CPU, "resources": {"GPU": 1}}], "[0].resources", "is Ray's own; use num_cpus or num_gpus"),
    ([{**CPU, "resources": {"fast": 1.5}}], "[0].resources", "a whole number, or between 0 and 1"),
]
BAD_EXPERTS: list[tuple[object, str, str]] = [
    ({"actors": 0}, ".actors", "given: 0"),
    ({"min_copies": 0}, ".min_copies", "given: 0"),
    (
        {"actors": 3, "min_copies": 4},
        ".min_copies",
        "must be at most the number of actors, 3 (given: 4)",
    ),
    ({"min_copies": 3}, ".min_copies", "must be at most the number of actors, 2 (given: 3)"),
    ({"actors": "two"}, ".actors", "given: 'two'"),
    ({"num_cpus": -1}, ".num_cpus", "given: -1"),
    ({"num_gpus": 2}, ".num_gpus", "equal to 1"),
    ({"pools": [CPU], "actors": 3}, ".actors", "belongs in each pool when pools are listed"),
    ({"pools": [CPU, GPU], "min_copies": 6}, ".min_copies", "number of actors, 5 (given: 6)"),
    ({"autoscaling": {"min_actors": 1}}, ".autoscaling.max_actors", "Field required"),
    (
        {"autoscaling": {"min_actors": 3, "max_actors": 2}},
        ".autoscaling.max_actors",
        "must be at least min_actors, 3 (given: 2)",
    ),
    (
        {"actors": 5, "autoscaling": BOUNDS},
        ".autoscaling",
        "5, must be from min_actors to max_actors",
    ),
    ({"autoscaling": BOUNDS, "min_copies": 2}, ".min_copies", "number of actors, 1 (given: 2)"),
    (None, "", "given: None"),
    ({"transport": "tcp"}, ".transport", "'stream'"),
    ({"tls": {}}, ".tls.certificate", "required"),
]
BAD_SECTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"router": {"replicas": 1.5}}, "router.replicas", "given: 1.5"),
    ({"router": {"num_gpus": 1.5}}, "router.num_gpus", "given: 1.5"),
    ({"router": {"device": "cuda"}}, "router.device", "'accelerator'"),
    (
        {"router": {"device": "cpu", "num_gpus": 0.5}},
        "router",
        "device cpu leaves the GPU unused (given: num_gpus 0.5)",
    ),
    ({"router": {"cache_tokens": 15}}, "router.cache_tokens", "given: 15"),
    ({"gateway": {"max_choices": 0}}, "gateway.max_choices", "given: 0"),
    (
        {"gateway": {"on_expert_loss": "guess"}},
        "gateway.on_expert_loss",
        "'strict', 'next_expert' or 'drop' (given: 'guess')",
    ),
    ({"gateway": {"default_timeout_s": 0}}, "gateway.default_timeout_s", "greater than 0"),
    (
        {"security": {"open": True, "keys_file": "/k"}},
        "security",
        "open cannot be given together with keys_file",
    ),
]
BAD_VALUES = [
    ({}, "args.models", "Field required"),
    *(({"models": bad}, f"args.models{field}", words) for bad, field, words in BAD_MODELS),
    *((pools_of(*bad), f"args.experts.pools{field}", words) for bad, field, words in BAD_POOLS),
    *(
        ({"models": [MODEL], "experts": bad}, f"args.experts{field}", words)
        for bad, field, words in BAD_EXPERTS
    ),
    *(({"models": [MODEL], **bad}, f"args.{field}", words) for bad, field, words in BAD_SECTIONS),
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
    ("text", "words"),
    [
        (None, "cannot be read"),
        *(
            (text, "is not YAML")
            for text in (b"a: [", b"\xff\xfe\x00", b"a: b: c", b"\x00", b"!!python/name:os.x")
        ),
    ],
)
def test_a_file_that_cannot_be_read_or_is_not_yaml_is_refused(
    tmp_path: Path, text: bytes | None, words: str
) -> None:
    file = tmp_path / "a.yaml"
    if text is None:
        file.mkdir()
    else:
        file.write_bytes(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_deployment(file)
    assert caught.value.field == str(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "document", [None, [], "x", 3, {}, *({"applications": wrong} for wrong in (None, [], {"a": 1}))]
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
def test_each_deployment_file_of_ours_has_serves_part_and_is_on_loopback_or_has_keys(
    file: Path,
) -> None:
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    part = {key: value for key, value in document.items() if key != "applications"}
    assert part == {key: completed({})[key] for key in SERVE_KEYS}
    check_serve_part(document)
    for app in document["applications"]:  # the serve command checks it by this class
        options = [entry.get("request_router_config", {}) for entry in app["deployments"]]
        assert PREFLIGHT in [one.get("request_router_class") for one in options]
    [(_, config)] = load_deployment(file)
    is_local = file.name in ("cluster.yaml", "mixtures.yaml", "smol.yaml")
    assert config.gateway.listen.host == ("127.0.0.1" if is_local else "0.0.0.0")
    assert config.gateway.listen.admin_host == "127.0.0.1"
    assert (config.security.keys_file is None) is is_local


# What the builder finds out about models.


def test_a_model_is_described_by_its_checkpoint_unless_the_file_says_otherwise(
    folder: Path,
) -> None:
    [served] = inspect_models(config_of(folder))
    assert (served.family, served.dtype, served.max_model_len) == ("mixtral", "float32", 256)
    assert (served.num_layers, served.num_experts, served.num_experts_per_tok) == (3, 8, 2)
    assert served.vocab_size == VOCAB_SIZE
    assert served.source.experts.expert_bytes == 3 * 64 * 96 * 4
    checkpoint = open_checkpoint(folder)
    assert served.source.identity == identity_of(checkpoint)
    assert served.text_identity == text_identity(checkpoint)
    config = config_of(folder, model={"dtype": "bfloat16", "max_model_len": 255})
    [served] = inspect_models(config)
    assert (served.dtype, served.max_model_len) == ("bfloat16", 255)
    assert served.source.dtype == "bfloat16"
    assert served.source.experts.expert_bytes == 3 * 64 * 96 * 2


def test_a_context_longer_than_the_models_own_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"at most the model's own 256 \(given: 257\)") as caught:
        inspect_models(config_of(folder, model={"max_model_len": 257}))
    assert caught.value.field == "args.models[0].max_model_len"


@pytest.mark.parametrize("copies", [1, 2])
def test_a_memory_budget_that_cannot_hold_a_share_is_refused(folder: Path, copies: int) -> None:
    share = 3 * 4 * copies * 3 * 64 * 96 * 4  # layers, half of the experts, bytes of an expert
    inspect_models(config_of(folder, experts={"memory_budget_bytes": share, "min_copies": copies}))
    with pytest.raises(ConfigError, match=str(2 * share)) as caught:
        inspect_models(
            config_of(folder, experts={"memory_budget_bytes": share - 1, "min_copies": copies})
        )
    assert caught.value.field == "args.experts.memory_budget_bytes"


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


def test_deployments_are_named_after_their_models_which_may_not_be_too_alike() -> None:
    assert deployment_names(served("a", "org/b", "c.d_e-f")) == {
        "a": "Router-a",
        "org/b": "Router-org-b",
        "c.d_e-f": "Router-c.d_e-f",
    }
    with pytest.raises(ConfigError, match="too alike") as caught:
        deployment_names(served("org/b", "org-b"))
    assert caught.value.field == "args.models"


OPEN = {"gateway": {"listen": {"admin_host": "0.0.0.0"}}}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"models": [{**MODEL, "x": 1}]}, r"args\.models\[0\]\.x: unknown key"),
        ({"models": [{**MODEL, "id": name} for name in ("a/b", "a-b")]}, "too alike"),
        ({"models": [MODEL], **OPEN}, r"args\.gateway\.listen\.admin_host: must be .* got '0\.0"),
    ],
)
def test_the_builder_reports_what_is_wrong_as_serve_shows_it(
    args: dict[str, Any], words: str
) -> None:
    with pytest.raises(RayServeException, match=words):
        build(args)


def test_the_builder_refuses_a_serve_with_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RayServeException("Serve runs proxies")

    monkeypatch.setattr("router.app.refuse_proxies", refuse)
    with pytest.raises(RayServeException, match="Serve runs proxies"):
        build({"models": [MODEL]})
