"""The grouped product: what torch's kernel takes, its results, and the choice of a loop instead."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from experts.checkpoint.config import checked_shape, family_of, usual_config
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute import grouped_ffn as module
from experts.compute.ffn import ACTIVATIONS
from experts.compute.grouped_ffn import MAX_GROUPS, choose_grouped_mm, grouped_ffn
from router.ops.plan.source import known_models

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NUM_EXPERTS = 4


@pytest.fixture(autouse=True)
def no_choice_of_other_tests() -> Iterator[None]:
    module._choose.cache_clear()
    yield
    module._choose.cache_clear()


def check_shapes(like: GatedFfnWeights, act: str) -> None:
    """Have torch check what it is given on CUDA: dtypes, strides, ends; without a GPU."""
    hidden_size = like.down.shape[0]
    with FakeTensorMode():
        weights = like.map(
            lambda part: torch.empty((NUM_EXPERTS, *part.shape), dtype=part.dtype, device=CUDA)
        )
        for num_rows in (1, 7, 300):
            rows = torch.empty(num_rows, hidden_size, dtype=like.down.dtype, device=CUDA)
            ends = torch.empty(NUM_EXPERTS, dtype=torch.int32, device=CUDA)
            found = grouped_ffn(rows, weights, ACTIVATIONS[act], ends, functional.grouped_mm)
            assert (found.shape, found.dtype) == (rows.shape, rows.dtype)


@pytest.mark.parametrize("name", known_models())
def test_torchs_kernel_takes_the_experts_of_every_known_model(name: str) -> None:
    file = Path(name)
    config = known_models()[name]["config"]
    family = family_of(config, file)
    config = usual_config(family, config, file)
    shape = checked_shape(family, config, file)
    sizes = (shape.hidden_size, shape.intermediate_size)
    assert module._obstacle(functional.grouped_mm, CPU, torch.bfloat16, sizes) is None
    assert shape.num_experts <= MAX_GROUPS
    shapes = [(2 * sizes[1], sizes[0]), sizes]
    shapes += [(2 * sizes[1],), (sizes[0],)] if shape.has_biases else []
    like = GatedFfnWeights(
        *(torch.empty(own, dtype=torch.bfloat16, device="meta") for own in shapes)
    )
    check_shapes(like, shape.activation)
    # Not float32: newer torch has a loop for it, which `_obstacle` refuses.
    with pytest.raises(RuntimeError, match=r"BF(loat)?16"):
        check_shapes(like.map(torch.Tensor.double), shape.activation)


SIZES = (64, 48)
Change = Callable[[pytest.MonkeyPatch], object]


def test_the_grouped_product_is_chosen_once_and_that_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted = Mock(side_effect=functional.grouped_mm)
    monkeypatch.setattr(functional, "grouped_mm", counted)
    with caplog.at_level(logging.INFO, "expertmesh.actor"):
        for num_experts in (1, 8):
            assert choose_grouped_mm(CPU, torch.float32, SIZES, num_experts) is counted
    assert counted.call_count == 1
    assert caplog.messages == [
        "experts of 64 x 48 in torch.float32 on cpu: one grouped product per layer"
    ]
    monkeypatch.delattr(functional, "grouped_mm")  # before torch 2.10 it has a private name
    assert choose_grouped_mm(CPU, torch.bfloat16, SIZES, 8) is torch._grouped_mm


def lacks_it(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(functional, "grouped_mm")
    patch.delattr(torch, "_grouped_mm")


def product_is(product: Callable[..., torch.Tensor]) -> Change:
    return lambda patch: patch.setattr(functional, "grouped_mm", product)


def capability_is(*capability: int) -> Change:
    return lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


def failing(error: Exception) -> Callable[..., torch.Tensor]:
    def grouped_mm(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise error

    return grouped_mm


REASONS: dict[str, tuple[torch.device, Change, str]] = {
    "none": (CPU, lacks_it, "has no grouped_mm"),
    "fails": (
        CPU, product_is(failing(NotImplementedError("no kernel here\nsecond line"))),
        r"grouped_mm fails \(no kernel here\)$",
    ),
    "wrong": (CPU, product_is(lambda rows, _, offs: rows), "gives wrong results"),
    "old": (CUDA, capability_is(8, 6), r"9 or 10, not \(8, 6\)"),
    "new": (CUDA, capability_is(12, 0), r"9 or 10, not \(12, 0\)"),
    "rocm": (CUDA, lambda patch: patch.setattr(torch.version, "hip", "6.4"), "may be a loop"),
    "xpu": (torch.device("xpu"), lambda patch: None, "may be a loop"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_a_loop_is_chosen_with_its_reason_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    device, change, reason = REASONS[name]
    change(monkeypatch)
    assert choose_grouped_mm(device, torch.bfloat16, SIZES, 8) is None
    assert caplog.records[0].levelno == logging.WARNING
    assert caplog.messages[0].startswith("experts of 64 x 48 in torch.bfloat16 on ")
    logged = caplog.messages[0].partition("one product per expert, because ")[2]
    assert re.search(reason, logged)


@pytest.mark.parametrize(
    ("device", "dtype", "sizes", "num_experts", "reason"),
    [
        (CUDA, torch.float32, SIZES, 8, "only bfloat16"),
        (CPU, torch.bfloat16, (64, 44), 8, "multiples of 16 bytes"),
        (CPU, torch.bfloat16, (60, 48), 8, "multiples of 16 bytes"),
        (CPU, torch.bfloat16, SIZES, 1024, "more than 1023"),
    ],
)
def test_experts_that_the_kernel_does_not_take_are_computed_one_by_one(
    caplog: pytest.LogCaptureFixture,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    num_experts: int,
    reason: str,
) -> None:
    assert choose_grouped_mm(device, dtype, sizes, num_experts) is None
    assert reason in caplog.text


def test_a_device_in_error_is_no_reason_for_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = failing(torch.AcceleratorError("an illegal memory access was encountered"))
    monkeypatch.setattr(functional, "grouped_mm", broken)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: CUDA)
    monkeypatch.setattr(torch.accelerator, "synchronize", broken)
    with pytest.raises(torch.AcceleratorError):
        choose_grouped_mm(CPU, torch.bfloat16, SIZES, 8)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    assert choose_grouped_mm(CPU, torch.bfloat16, SIZES, 8) is None  # it works
