"""Whether a machine's GPUs take the processes of a deployment, from what was found of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import deploy
from router.ops.doctor import probe
from router.ops.doctor.devices import Devices, Gpu, check_devices
from router.ops.plan.devices import Tenant

GB = 10**9
H100 = Gpu("H100", 80 * GB)
NONE = Devices(2, (), "2.13.0+cpu")
ROUTER = Tenant("router of m", "router.cache_tokens", 0.2, 3 * GB, GB, GB, 8 * GB, 100_000)
ACTOR = Tenant("gpu-0", "memory_budget_bytes of the pool gpu", 0.8, 30 * GB, GB, GB)


def has(*gpus: Gpu) -> Devices:
    return Devices(8, gpus, "2.13.0")


@pytest.mark.parametrize(
    ("devices", "tenants", "words"),
    [
        (NONE, (), "2 CPUs, no GPU"),
        (has(H100, H100), (), "8 CPUs, 2 GPUs (H100, H100)"),
        (has(H100), (ROUTER, ACTOR), "8 CPUs, 1 GPU (H100)"),
        (has(Gpu("mps")), (ROUTER, ACTOR), "8 CPUs, 1 GPU (mps)"),  # says no memory
    ],
)
def test_enough_gpus_are_ok(devices: Devices, tenants: tuple[Tenant, ...], words: str) -> None:
    check = check_devices(devices, tenants)
    assert (check.level, check.found, check.advice) == ("ok", words, "")


WHOLE = replace(ACTOR, num_gpus=1)
SIXTY = (replace(ACTOR, num_gpus=0.6), replace(ACTOR, name="gpu-1", num_gpus=0.6))


@pytest.mark.parametrize(
    ("devices", "tenants", "found", "advice"),
    [
        (
            NONE,
            (WHOLE,),
            "2 CPUs, no GPU; torch 2.13.0+cpu finds no GPU: gpu-0 would wait for ever: it needs 1 "
            "of a GPU, and there is none",
            "Change num_gpus, router.replicas or the actors of a pool, or add machines to Ray. Or "
            "install a torch that is built for the GPU",
        ),
        (
            has(H100),
            SIXTY,
            "torch 2.13.0 finds 1 GPU: gpu-1 would wait for ever: it needs 0.6 of a GPU, and "
            "the 1 that there are have gpu-0 0.6",
            "or add machines to Ray",
        ),
        (
            has(H100, H100),
            (ROUTER, ROUTER, ACTOR, replace(ACTOR, name="gpu-1")),
            "gpu-1 would wait for ever: it needs 0.8 of a GPU, and the 2 that there are have "
            "router of m 0.2, router of m 0.2; gpu-0 0.8",
            "Change num_gpus",
        ),
        (
            NONE,
            (replace(ROUTER, num_gpus=0),),
            "2 CPUs, no GPU; torch 2.13.0+cpu finds no GPU, and router of m needs one",
            "Have it computed on the CPU (num_gpus: 0, router.device: cpu), or install a torch",
        ),
        (
            has(Gpu("A10", 40 * GB)),
            (ROUTER, ACTOR),
            "GPU 0 (A10) of 40.0 GB lacks 5,000,000,000 bytes for router of m 13.0 GB, gpu-0 "
            "32.0 GB",
            "Use more GPUs, and a larger num_gpus, so that fewer processes share one; or lower",
        ),
    ],
)
def test_a_process_without_its_gpu_is_a_problem(
    devices: Devices, tenants: tuple[Tenant, ...], found: str, advice: str
) -> None:
    check = check_devices(devices, tenants)
    assert check.level == "problem"
    assert found in check.found
    assert advice in check.advice
    joined = check_devices(devices, tenants, joins=True)
    assert (joined.level, joined.found) == ("warning", check.found)
    assert joined.advice == (
        f"Ignore this if other machines of the cluster have them. Else: {check.advice}"
    )


def test_what_a_process_may_take_later_is_a_warning() -> None:
    spare = replace(ACTOR, spare_bytes=40 * GB)
    check = check_devices(has(H100), (ROUTER, spare))
    assert check.level == "warning"
    assert "GPU 0 (H100) of 80.0 GB lacks 5,000,000,000 bytes" in check.found
    assert check.advice == "Lower memory_budget_bytes of the pool gpu to 65,000,000,000."
    tight = check_devices(has(Gpu("A", 42 * GB)), (ROUTER, ACTOR))
    assert tight.level == "warning"  # weights and cache fit, and small steps


def test_a_torch_that_cannot_be_asked_is_a_problem_whatever_is_wanted() -> None:
    check = check_devices(Devices(8, reason="ImportError: torch"), ())
    assert (check.level, check.found) == (
        "problem",
        "8 CPUs; torch cannot be asked: ImportError: torch",
    )


def test_torch_is_asked_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TORCH_TIMEOUT_S", 100.0)  # a busy machine reads torch slowly
    found = probe.find_devices()
    assert found.torch_version
    assert found.reason == ""


def test_a_file_without_gpus_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(deploy.__file__).parent
    asked: list[Devices] = []
    monkeypatch.setattr(probe, "find_devices", lambda: asked.append(NONE) or NONE)
    deployment = probe.read_deployment(folder / "cluster.yaml")
    assert deployment.tenants == ()
    probe.checks_of_a_start(deployment, {})
    assert asked == []
    checks = probe.checks_of_a_start(probe.read_deployment(folder / "gpu.yaml"), {})
    assert asked == [NONE]
    assert [check.level for check in checks if check.name == "devices"] == ["problem"]
