"""Mixtures as the builder, `check`, `doctor` and `plan` find them before anything is deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.exceptions import RayServeException

from cluster.errors import CheckpointError, ConfigError
from cluster.spec import model_id_of
from experts.checkpoint.identity import identity_of
from experts.checkpoint.mixture import open_mixture
from experts.mixture.spec import interface_of
from router.app import application, deployment_names
from router.config.deployment import AppConfig, parse_args
from router.ops.doctor.needs import needs_of
from router.ops.plan.source import find_model
from router.serve.router import MixtureDeployment, RouterDeployment
from router.served import (
    ServedMixture,
    ServedModel,
    check_file,
    inspect_models,
    language_models,
    pool_specs,
)
from tests.mixtures import save_given, save_tree

TINY = {"id": "mesh-tiny", "path": "models/mesh-tiny"}


def config_of(*models: dict[str, Any], **others: Any) -> AppConfig:
    return parse_args({"models": list(models), **others})


def mixture_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"id": "m/x", "path": str(folder), **changes}


def test_a_mixture_is_served_under_its_content(tmp_path: Path) -> None:
    folder = save_tree(tmp_path / "a")
    [served] = inspect_models(config_of(mixture_of(folder)))
    assert isinstance(served, ServedMixture)
    assert served.id == "m/x" == model_id_of(served.key)
    opened = open_mixture(folder)
    assert served.source.identity == identity_of(opened)
    assert served.source.dtype == "float64"
    assert served.spec == opened.spec
    assert served.interface == interface_of(opened.spec)
    experts = served.source.experts
    assert (experts.layers, experts.num_experts) == ((0,), 5)
    assert experts.expert_bytes == 7 * 8  # six weights and a bias


def test_other_content_is_another_model_and_other_settings_another_identity(tmp_path: Path) -> None:
    [one] = inspect_models(config_of(mixture_of(save_given(tmp_path / "a", 3))))
    [copy] = inspect_models(config_of(mixture_of(save_given(tmp_path / "b", 3))))
    [other] = inspect_models(config_of(mixture_of(save_given(tmp_path / "c", 4))))
    assert (one.key, one.identity) == (copy.key, copy.identity)
    assert other.key != one.key
    emulated = {"experts": {"actors": 1, "emulate": {"batch_s": 0.1}}}
    [stand_in] = inspect_models(config_of(mixture_of(save_given(tmp_path / "a", 3)), **emulated))
    assert stand_in.key != one.key
    assert stand_in.identity != one.identity


def test_the_interface_is_that_of_tensors_and_not_of_experts(tmp_path: Path) -> None:
    three, four, tree = (
        open_mixture(folder).spec
        for folder in (
            save_given(tmp_path / "a", 3), save_given(tmp_path / "b", 4), save_tree(tmp_path / "c")
        )
    )  # fmt: skip
    assert interface_of(three) == interface_of(four) != interface_of(tree)


def test_mixtures_and_language_models_have_routers_of_their_kind(tmp_path: Path) -> None:
    config = config_of(TINY, mixture_of(save_given(tmp_path / "a", 3)))
    served = inspect_models(config)
    assert [type(model) for model in served] == [ServedModel, ServedMixture]
    assert [model.id for model in language_models(served)] == ["mesh-tiny"]
    assert deployment_names(served) == {"mesh-tiny": "Router-mesh-tiny", "m/x": "Router-m-x"}
    [pool] = pool_specs(config.experts, served)
    assert [source.experts.num_experts for source in pool.actor.models] == [8, 3]
    app = application({"models": [TINY, mixture_of(tmp_path / "a")]})
    names = {}
    for handle in app._bound_deployment.init_args[3].values():
        deployment = handle._bound_deployment
        names[deployment.name] = deployment.func_or_class
    assert issubclass(names["Router-mesh-tiny"], RouterDeployment)
    assert issubclass(names["Router-m-x"], MixtureDeployment)


def test_nothing_is_built_while_others_may_read_rays_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "auth_token"
    token.write_text("0123456789abcdef")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with pytest.raises(RayServeException, match=f"may be used .* run: chmod 600 {token}"):
        application({"models": [TINY]})
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # then nobody uses it
    application({"models": [TINY]})
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(token))
    with pytest.raises(RayServeException, match=f"Ray's TLS key, {token}, may be used"):
        application({"models": [TINY]})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dtype": "float32"}, "args.models[0].dtype"),
        ({"dtype": "bfloat16"}, "args.models[0].dtype"),
        ({"max_model_len": 10}, "args.models[0].max_model_len"),
    ],
)
def test_keys_of_language_models_are_refused(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    config = config_of(mixture_of(save_given(tmp_path, 3), **changes))
    with pytest.raises(ConfigError) as caught:
        inspect_models(config)
    assert caught.value.field == field
    same = {**changes, "dtype": "auto", "max_model_len": None}
    inspect_models(config_of(mixture_of(tmp_path, **same)))


def test_a_wrong_expert_is_refused_before_anything_starts_with_the_models_place(
    tmp_path: Path,
) -> None:
    folder = save_given(tmp_path, 3)
    (folder / "experts.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError) as caught:
        inspect_models(config_of(mixture_of(folder)))
    assert caught.value.field.startswith(f"args.models[0].path: {folder}/experts.safetensors")


def test_check_describes_a_mixture_and_doctor_counts_its_files(tmp_path: Path) -> None:
    folder = save_given(tmp_path / "a", 3, fragile=True)
    args = {"models": [mixture_of(folder)], "experts": {"actors": 2, "min_copies": 2}}
    applications = [
        {"name": "x", "route_prefix": "/", "import_path": "router.app:build", "args": args}
    ]
    file = tmp_path / "app.yaml"
    file.write_text(yaml.safe_dump({"applications": applications}))
    lines = check_file(file)
    assert any(
        line.startswith("mixture m/x: 3 linear, 1 sklearn experts (at most 1 a row), mean, float64")
        for line in lines
    )
    size = open_mixture(folder).num_bytes
    needs = needs_of([(parse_args(args), {"m/x": size})])
    assert needs.experts_bytes == 2 * size
    assert needs.routers_bytes == 0


def test_plan_says_that_it_is_for_language_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mixture"):
        find_model(str(save_given(tmp_path, 3)))
