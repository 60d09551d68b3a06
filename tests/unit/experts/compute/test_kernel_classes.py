"""Which kernel class an expert is of, by what computes it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from cluster.device import CPU
from cluster.spec import Emulation, ExpertKey, ModelKernel
from experts.actor import kernels_of
from experts.bank import Expert, GatedFfnExpert
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute import device_experts, kernel_classes, native_ffn
from experts.compute.device_experts import Block
from experts.compute.emulated import EmulatedExpert
from experts.compute.ffn import TorchFfn, gated_ffn
from experts.compute.kernel_classes import torch_class
from tests.arrays import on_host, results
from tests.emulated_device import emulated_device

H, INNER = 64, 96
PORTABLE = ("portable", "unfused", "unfused")
LOGGER = "expertmesh.actor"


@pytest.fixture(autouse=True)
def nothing_logged_yet() -> Iterator[None]:
    kernel_classes.log_torch.cache_clear()
    yield
    kernel_classes.log_torch.cache_clear()


def weights_of(dtype: torch.dtype, inner: int = INNER) -> GatedFfnWeights:
    generator = torch.Generator().manual_seed(0)
    parts = (torch.randn(shape, generator=generator) for shape in ((2 * inner, H), (H, inner)))
    return GatedFfnWeights(*(part.to(dtype) for part in parts))


def expert_of(dtype: torch.dtype, inner: int = INNER) -> GatedFfnExpert:
    return GatedFfnExpert(on_host(weights_of(dtype, inner)), "silu", 1)


@pytest.mark.parametrize(
    ("kernel", "dtype", "expected"),
    [
        (("avx2", "fused", "fused"), torch.float32, "fused"),
        (("avx2", "fused", "fused"), torch.bfloat16, "fused"),
        (("amx", "fused", "tiled"), torch.float32, "fused"),
        (("amx", "fused", "tiled"), torch.bfloat16, "tiled"),
        (("avx512_bf16", "fused", "paired"), torch.float16, "fused"),
        (("avx512_bf16", "fused", "paired"), torch.bfloat16, "paired"),
        (PORTABLE, torch.bfloat16, "unfused"),
    ],
)
def test_a_native_expert_has_the_class_of_the_processors_fastest_kernel(
    monkeypatch: pytest.MonkeyPatch, kernel: tuple[str, str, str], dtype: torch.dtype, expected: str
) -> None:
    monkeypatch.setattr(native_ffn, "KERNELS", (kernel, PORTABLE))
    assert expert_of(dtype).kernel_class == expected


def test_without_native_code_an_expert_is_torchs_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (native_ffn, kernel_classes):
        monkeypatch.setattr(module, "native", None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with caplog.at_level(logging.WARNING, LOGGER):
        experts = [expert_of(torch.float32) for _ in range(3)]
        expert_of(torch.float32, 32)
        monkeypatch.setattr(kernel_classes, "native", object())
        doubles = expert_of(torch.float64)
    assert [expert.kernel_class for expert in experts] == ["torch-avx2"] * 3
    rows = torch.randn(3, H, generator=torch.Generator().manual_seed(1))
    weights = weights_of(torch.float32)
    assert torch.equal(results(experts[0], rows), gated_ffn(rows, weights, functional.silu))
    assert isinstance(doubles.ffn, TorchFfn)
    assert doubles.kernel_class.startswith("torch-")
    first, other, third = [record.message for record in caplog.records]
    assert first.startswith(f"experts of {H} x {INNER} in float32 are computed by torch")
    assert "(torch-avx2): the package was installed without its native code" in first
    assert f"{H} x 32" in other
    assert third.endswith(": native code has no kernel for this dtype or these sizes")


@pytest.mark.parametrize(
    ("amx", "pairs", "limit", "dtype", "expected"),
    [
        (True, True, None, torch.bfloat16, "torch-amx"),
        (False, True, None, torch.bfloat16, "torch-avx512_bf16"),
        (False, False, None, torch.float16, "torch-avx512"),
        (True, True, "AVX2", torch.bfloat16, "torch-avx2"),
        (True, True, "AVX2", torch.float32, "torch-avx512"),
        (True, True, None, torch.float32, "torch-avx512"),
    ],
)
def test_torchs_class_names_the_instructions_that_it_may_use(
    monkeypatch: pytest.MonkeyPatch,
    amx: bool,
    pairs: bool,
    limit: str | None,
    dtype: torch.dtype,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: pairs)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert torch_class(CPU, dtype) == expected


def test_experts_of_a_device_have_its_name_and_the_way_of_their_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    assert torch_class(torch.device("cuda:1"), torch.bfloat16) == "Card 1"
    with emulated_device() as device:
        own = device.device
        assert torch_class(own, torch.float32) == own.type
        for grouped, way in ((functional.linear, "grouped"), (None, "looped")):
            monkeypatch.setattr(device_experts, "choose_grouped_mm", lambda *_, g=grouped: g)
            block = Block(weights_of(torch.float32), 2, functional.silu, own)
            assert block.take().kernel_class == f"{own.type} {way}"


def test_experts_without_a_class_are_not_reported() -> None:
    emulated = EmulatedExpert(Emulation(1.0, 0.0), (H,), (H,), "float32")
    real = expert_of(torch.float32)
    held = [("b", 0, real), ("b", 1, real), ("a", 0, real), ("e", 0, emulated)]
    experts: dict[ExpertKey, Expert] = {
        ExpertKey(model, layer_id, 0): expert for model, layer_id, expert in held
    }
    expected = [ModelKernel(model, real.kernel_class) for model in ("a", "b")]
    assert kernels_of(experts) == tuple(expected)
