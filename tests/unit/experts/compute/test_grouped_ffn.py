"""The grouped product: what torch's kernel takes, its results, and the choice of a loop instead."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.config import checked_shape, family_of, usual_config
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute import grouped_ffn as module
from experts.compute.ffn import ACTIVATIONS, clamped_ffn, gated_ffn
from experts.compute.grouped_ffn import MAX_GROUPS, choose_grouped_mm, grouped_ffn
from router.ops.plan.source import known_models
from tests.arrays import loaded
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS
from tests.grok_oracle import save_grok

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NUM_EXPERTS = 4
ALL: dict[str, Callable[[Path], Any]] = {"mixtral": save_mixtral, "grok": save_grok, **SAVERS}
COUNTS = [[1, 0, 0, 0], [0, 3, 0, 2], [40, 1, 0, 0], [5, 6, 7, 8]]


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


@pytest.mark.parametrize("family", ALL)
def test_torchs_kernel_takes_the_experts_of_every_family(tmp_path: Path, family: str) -> None:
    ALL[family](tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    layer_id = checkpoint.shape.layers[0]
    like = loaded(checkpoint, layer_id, 0, "bfloat16")
    check_shapes(like, checkpoint.shape.activation)


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
    like = (torch.empty(own, dtype=torch.bfloat16, device="meta") for own in shapes)
    check_shapes(GatedFfnWeights(*like), shape.activation)


def test_the_check_of_shapes_refuses_what_the_kernel_does_not_take() -> None:
    like = GatedFfnWeights(torch.empty(96, 60, device="meta"), torch.empty(60, 48, device="meta"))
    # Not float32: newer torch has a loop for it, which `_obstacle` refuses.
    for dtype, reason in ((torch.float64, "BF(loat)?16"), (torch.bfloat16, "multiple of 16 bytes")):
        with pytest.raises(RuntimeError, match=reason):
            check_shapes(like.map(lambda part, dtype=dtype: part.to(dtype)), "silu")  # type: ignore[misc]


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
def test_the_results_are_those_of_each_expert_alone(
    counts: list[int], dtype: torch.dtype, has_biases: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 96, 64), (4, 64, 48), (4, 96), (4, 64)][: 4 if has_biases else 2]
    weights = GatedFfnWeights(
        *(torch.randn(shape, generator=generator).mul(0.1).to(dtype) for shape in shapes)
    )
    rows = torch.randn(sum(counts), 64, generator=generator).to(dtype)
    ends = torch.tensor(counts).cumsum(0).int()
    expected = []
    for expert, own in enumerate(rows.split(counts)):
        alone = weights.map(lambda part, expert=expert: part[expert])  # type: ignore[misc]
        expected.append(
            clamped_ffn(own, alone) if has_biases else gated_ffn(own, alone, functional.silu)
        )
    found = grouped_ffn(rows, weights, functional.silu, ends, functional.grouped_mm)
    tolerance = 1e-6 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found, torch.cat(expected), rtol=tolerance, atol=tolerance)


SIZES = (64, 48)


def test_the_grouped_product_is_chosen_once_and_that_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trials = []
    product = functional.grouped_mm

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        trials.append(args)
        return product(*args, **kwargs)

    monkeypatch.setattr(functional, "grouped_mm", counted)
    with caplog.at_level(logging.INFO, "expertmesh.actor"):
        for num_experts in (1, 8):
            assert choose_grouped_mm(CPU, torch.float32, SIZES, num_experts) is counted
    assert len(trials) == 1
    [line] = caplog.messages
    assert line == ("experts of 64 x 48 in torch.float32 on cpu: one grouped product per layer")


def test_before_torch_2_10_the_function_has_a_private_name(monkeypatch: pytest.MonkeyPatch) -> None:
    private = torch._grouped_mm
    monkeypatch.delattr(functional, "grouped_mm")
    assert choose_grouped_mm(CPU, torch.bfloat16, SIZES, 8) is private


def lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(functional, "grouped_mm")
    monkeypatch.delattr(torch, "_grouped_mm")


def fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("no kernel here\nsecond line")

    monkeypatch.setattr(functional, "grouped_mm", failing)


def is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "grouped_mm", lambda rows, _, offs: rows)


def has_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


REASONS: dict[str, tuple[torch.device, Callable[[pytest.MonkeyPatch], object], str]] = {
    "none": (CPU, lacks_it, "has no grouped_mm"),
    "fails": (CPU, fails, r"grouped_mm fails \(no kernel here\)$"),
    "wrong": (CPU, is_wrong, "gives wrong results"),
    "old": (CUDA, lambda patch: has_capability(patch, (8, 6)), r"9 or 10, not \(8, 6\)"),
    "new": (CUDA, lambda patch: has_capability(patch, (12, 0)), r"9 or 10, not \(12, 0\)"),
    "rocm": (CUDA, lambda patch: patch.setattr(torch.version, "hip", "6.4"), "may be a loop"),
    "xpu": (torch.device("xpu"), lambda patch: None, "may be a loop"),
}


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
    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(functional, "grouped_mm", failing)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: cuda)
    monkeypatch.setattr(torch.accelerator, "synchronize", failing)
    with pytest.raises(torch.AcceleratorError):
        choose_grouped_mm(CPU, torch.bfloat16, SIZES, 8)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    assert choose_grouped_mm(CPU, torch.bfloat16, SIZES, 8) is None  # it works
