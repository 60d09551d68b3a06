"""What lies on each device of a deployment file, and whether it fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import deploy
from cluster.spec import ExpertKey
from cluster.staging import ALIGNMENT
from cluster.wire.frames import DTYPE_BYTES
from experts.bank import ExpertBank
from experts.checkpoint.checkpoint import open_checkpoint
from experts.compute.expert_device import ExpertDevice
from router.model.memory import StepLimits, router_sizes
from router.ops.plan.deployment import read_tenants
from router.ops.plan.devices import Device, Tenant, place, shortages
from router.ops.plan.plan import ACTOR_PROCESS_BYTES, ROUTER_PROCESS_BYTES, actor_batch_bytes
from router.ops.plan.source import find_model
from tests.checkpoints import save_mixtral
from tests.emulated_device import emulated_device
from tests.family_checkpoints import SAVERS
from tests.local_cluster import LocalCluster
from tests.mixtures import save_given
from tests.unit.experts.test_bank_on_device import load

GB = 10**9
GPU = Path(deploy.__file__).parent / "gpu.yaml"
FAMILIES = {"mixtral": save_mixtral, **SAVERS}


def tenant(name: str, num_gpus: float, **sizes: int) -> Tenant:
    zero = {"weight_bytes": 0, "working_bytes": 0, "process_bytes": 0}
    return Tenant(name, f"setting of {name}", num_gpus, **(zero | sizes))  # type: ignore[arg-type]


def file_of(tmp_path: Path, folder: Path, dtype: str = "auto", **args: Any) -> Path:
    app = {
        "name": "a",
        "import_path": "router.app:build",
        "args": {"models": [{"id": "m", "path": str(folder), "dtype": dtype}], **args},
    }
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump({"applications": [app]}), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("wanted", "num_devices", "expected", "unplaced"),
    [
        ([("r", 0.2), ("a", 0.8)], None, ["r a"], []),
        ([("r", 0.2), ("a", 1.0)], None, ["r", "a"], []),
        ([("a", 0.6), ("b", 0.6)], None, ["a", "b"], []),
        ([("a", 0.6), ("b", 0.6)], 1, ["a"], ["b"]),
        # Ray 2.60 places these so: the second router goes to the device that is in use.
        ([("r", 0.2), ("s", 0.2), ("a", 0.8), ("b", 0.8)], 2, ["r s", "a"], ["b"]),
        ([("r", 0.2), ("s", 0.2), ("a", 0.8), ("b", 0.8)], None, ["r s", "a", "b"], []),
        ([("r", 0.55), ("s", 0.55), ("a", 0.45), ("b", 0.45)], 2, ["r a", "s b"], []),
        ([("a", 0.3), ("b", 0.5), ("c", 0.2), ("d", 0.7)], None, ["a b c", "d"], []),
        ([("a", 0.1)] * 10, None, [" ".join("a" * 10)], []),  # ten tenths are a whole
        ([("r", 0.0), ("a", 1.0)], 1, ["r a"], []),  # an unreserved accelerator
        ([("a", 1.0), ("b", 0.5)], 0, [], ["a", "b"]),
    ],
)
def test_processes_are_placed_as_ray_places_them(
    wanted: list[tuple[str, float]],
    num_devices: int | None,
    expected: list[str],
    unplaced: list[str],
) -> None:
    planned = place([tenant(*one) for one in wanted], num_devices)
    found = [" ".join(one.name for one in device.tenants) for device in planned.devices]
    assert found == expected
    assert [one.name for one in planned.unplaced] == unplaced
    assert bool(planned.unplaced_line()) == bool(unplaced)


def test_the_shipped_file_has_a_router_and_an_actor_on_one_device() -> None:
    tenants = read_tenants(GPU)
    shares = [(one.name, one.num_gpus) for one in tenants]
    assert shares == [("router of mesh-tiny", 0.2), ("gpu-0", 0.8)]
    planned = place(tenants)
    assert len(planned.devices) == 1
    assert shortages(planned, 24 * GB) == []
    assert sum(one.most_bytes for one in tenants) == planned.devices[0].most_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_planned_bytes_are_those_that_are_allocated(
    tmp_path: Path, family: str, dtype: str
) -> None:
    folder, cache_tokens = tmp_path / "m", 1000
    FAMILIES[family](folder)
    router: dict[str, Any] = {"cache_tokens": cache_tokens, "num_gpus": 0.5}
    router |= {"max_batch_size": 4, "max_batch_tokens": 32}
    experts = {"actors": 1, "num_gpus": 0.5}
    file = file_of(tmp_path, folder, dtype, router=router, experts=experts)
    on_router, on_actor = read_tenants(file)
    checkpoint = open_checkpoint(folder)
    keys = [
        ExpertKey("m", layer_id, expert_id)
        for layer_id in checkpoint.shape.layers
        for expert_id in range(checkpoint.shape.num_experts)
    ]
    with emulated_device() as device:
        cluster = LocalCluster(folder, cache_tokens=cache_tokens, dtype=dtype, device=device.device)
        held = torch.accelerator.memory_allocated()
        bank = ExpertBank(ExpertDevice(device.device, "expert-0", print))
        load(bank, checkpoint, keys, dtype)
        loaded = torch.accelerator.memory_allocated() - held - ALIGNMENT  # of copies
        assert loaded == on_actor.held_bytes == bank.num_bytes
        assert 0 <= held - on_router.held_bytes < 1024  # tables of a rotation are left out
        cluster.close()
    sizes = router_sizes(checkpoint.family, checkpoint.config)
    step_bytes = sizes.step_bytes(StepLimits(4, 32, 256), DTYPE_BYTES[dtype])
    assert on_router.working_bytes == step_bytes
    assert on_router.most_bytes == on_router.held_bytes + step_bytes + ROUTER_PROCESS_BYTES
    batch_bytes = actor_batch_bytes(find_model(str(folder)).shape, DTYPE_BYTES[dtype], 32)
    assert on_actor.most_bytes == on_actor.held_bytes + batch_bytes + ACTOR_PROCESS_BYTES


def test_a_budget_counts_up_to_one_copy_of_every_expert(tmp_path: Path) -> None:
    save_mixtral(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    one = checkpoint.expert_bytes("float32")
    every = one * len(checkpoint.shape.layers) * checkpoint.shape.num_experts
    for budget, most in ((every, every), (10 * every, every), (every - one, every - one)):
        experts = {"actors": 2, "num_gpus": 1, "memory_budget_bytes": budget}
        for actor in read_tenants(file_of(tmp_path, tmp_path / "m", experts=experts)):
            assert actor.weight_bytes == every // 2
            assert actor.weight_bytes + actor.spare_bytes == most


def test_a_mixture_is_on_the_host_and_reserves_what_it_is_told_to(tmp_path: Path) -> None:
    save_given(tmp_path / "m", 3)
    args = {"router": {"num_gpus": 0.5}, "experts": {"actors": 2, "num_gpus": 1}}
    tenants = read_tenants(file_of(tmp_path, tmp_path / "m", **args))
    assert [(one.name, one.most_bytes) for one in tenants] == [("expert-0", 0), ("expert-1", 0)]


def test_routers_of_all_models_come_first_and_an_unreserved_one_too(tmp_path: Path) -> None:
    document = yaml.safe_load(GPU.read_text(encoding="utf-8"))
    args = document["applications"][0]["args"]
    args["models"].append({"id": "b", "path": "models/mesh-tiny"})
    args["router"] = {"replicas": 2, "device": "accelerator"}
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    routers = [*["router of mesh-tiny"] * 2, *["router of b"] * 2]
    assert [one.name for one in read_tenants(file)] == [*routers, "gpu-0"]
    args["router"] = {"num_gpus": 0}
    args["experts"] = {"actors": 2}
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    assert read_tenants(file) == ()


ROUTER = tenant(
    "r", 0.2, weight_bytes=3 * GB, cache_bytes=8 * GB, working_bytes=GB, process_bytes=GB
)
ROUTER = replace(ROUTER, cache_token_bytes=100_000)
ACTOR = tenant("a", 0.8, weight_bytes=10 * GB, spare_bytes=20 * GB, working_bytes=GB)


@pytest.mark.parametrize(
    ("memory_gb", "lacking", "advice"),
    [
        (44, 0, ""),
        (40, 4, "Lower setting of a to 26,000,000,000."),
        (24, 20, "Lower setting of a to 10,000,000,000."),
    ],
)
def test_a_budget_is_lowered_first(memory_gb: int, lacking: int, advice: str) -> None:
    device = Device((ROUTER, ACTOR))
    line, advised = device.shortage("Device 0", memory_gb * GB)
    assert advised == advice
    if lacking:
        assert line == (
            f"Device 0 of {memory_gb}.0 GB lacks {lacking * GB:,} bytes for r 13.0 GB, a 31.0 GB"
        )
    assert not device.lacks_at_start(memory_gb * GB)


def test_then_a_cache_and_then_other_devices_are_advised() -> None:
    device = Device((ROUTER, replace(ACTOR, spare_bytes=0)))  # 13 and 11 GB
    assert "Lower setting of r to 50,000." in device.shortage("x", 21 * GB)[1]
    assert "Use more GPUs, and a larger num_gpus" in device.shortage("x", 19 * GB)[1]
    assert device.lacks_at_start(21 * GB - 1)
    assert not device.lacks_at_start(21 * GB)
    alone = Device((replace(ACTOR, spare_bytes=0),))
    assert "Use actors on more GPUs" in alone.shortage("x", 9 * GB)[1]


def test_the_advised_settings_make_it_fit() -> None:
    actors = (ACTOR, replace(ACTOR, name="b", setting="other", spare_bytes=5 * GB))
    device = Device((ROUTER, *actors))
    memory = device.most_bytes - 7 * GB - 1
    lower = dict(device._lower_budgets(7 * GB + 1, 25 * GB))
    fitted = [replace(a, spare_bytes=lower[a.setting] - a.weight_bytes) for a in actors]
    assert Device((ROUTER, *fitted)).shortage("x", memory) == ("", "")
    [(_, tokens)] = device._smaller_caches(3 * GB + 1, 8 * GB)
    smaller = replace(ROUTER, cache_bytes=tokens * ROUTER.cache_token_bytes)
    assert ROUTER.most_bytes - smaller.most_bytes > 3 * GB
