"""The kernel class of a router's dense part."""

from __future__ import annotations

import pytest
import torch

from cluster.device import CPU
from experts.compute.kernel_classes import NATIVE_CLASSES, torch_class
from experts.compute.native_ffn import KERNELS
from router.engine import kernel_class
from router.engine.kernel_class import dense_class


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_with_and_without_native_code_are_of_several_classes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(kernel_class, "kernel_class", lambda dtype: "fused")
    assert dense_class(CPU, dtype, True, "native") == "fused"
    assert dense_class(CPU, dtype, False, "gathered") == f"{torch_class(CPU, dtype)}+fused"
    monkeypatch.setattr(kernel_class, "kernel_class", lambda dtype: None)
    assert dense_class(CPU, dtype, False, "gathered") == torch_class(CPU, dtype)


def test_a_router_on_a_device_has_the_devices_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(kernel_class, "kernel_class", lambda dtype: "fused")
    for attention in ("varlen", "gathered"):
        found = dense_class(torch.device("cuda:0"), torch.bfloat16, False, attention)
        assert found == f"Card+{attention}"


def test_the_classes_of_native_code_are_known_from_those_of_torch() -> None:
    assert {name for kernel in KERNELS for name in kernel[1:]} <= NATIVE_CLASSES
    for dtype in (torch.float32, torch.bfloat16):
        assert torch_class(CPU, dtype) not in NATIVE_CLASSES
