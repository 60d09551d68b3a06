"""The planned memory of a router and of an actor, against the bytes of an emulated device."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import UnavailableError
from cluster.spec import ExpertKey
from cluster.staging import ALIGNMENT
from cluster.wire.frames import DTYPE_BYTES, RowsFrame
from experts.bank import ExpertBank
from experts.checkpoint.checkpoint import open_checkpoint
from experts.compute import device_experts
from experts.compute.expert_device import RESERVED_ROWS, ExpertDevice
from experts.queue import MAX_BATCH_ROWS
from router.engine.scheduling.scheduler import Limits
from router.model.attention.paged import GatheredAttention
from router.model.attention.varlen import HEAD_STEP, MAX_HEAD_SIZE, VarlenAttention
from router.model.cpu.native_attention import NATIVE_PAGE_SIZE
from router.model.memory import (
    PAGE_SIZE,
    VARLEN_HEAD_STEP,
    VARLEN_MAX_HEAD,
    VARLEN_PAGE_SIZE,
    StepLimits,
    router_sizes,
)
from router.model.model import MoEModel
from router.ops.plan.plan import ACTOR_BATCH_ROWS, Wish, actor_batch_bytes, make_plan
from router.ops.plan.source import find_model
from tests import emulated_device as emulation
from tests.checkpoints import save_mixtral
from tests.emulated_device import emulated_device
from tests.family_checkpoints import SAVERS
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.experts.frames import dispatch_frame
from tests.unit.experts.test_bank_on_device import load

FAMILIES = {"mixtral": save_mixtral, **SAVERS}
ROTATION_BYTES = 1024
"""More than the tables of a rotation, which are buffers of the model and left out of the plan."""
DECODED = 8
LIMITS = StepLimits(max_batch_size=4, max_batch_tokens=32, longest=120)
STEPS = [
    *itertools.product(FAMILIES, ["float32", "bfloat16"], [False]),
    *itertools.product(["mixtral", "qwen3_moe"], ["bfloat16"], [True]),
]
"""Family, dtype, and whether the device refuses attention that reads pages. It changes nothing for
float32, nor for families whose attention gathers."""


def refusing(*args: Any) -> Any:
    raise RuntimeError("this kernel is not for you")


@pytest.mark.parametrize(("family", "dtype", "is_refused"), STEPS)
def test_a_router_holds_the_planned_bytes_and_its_steps_take_no_more_than_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str, is_refused: bool
) -> None:
    """Also where the device refuses the attention that the plan takes for granted."""
    two_layers = {"n_layers" if family == "dbrx" else "num_hidden_layers": 2}
    FAMILIES[family](tmp_path, **two_layers)
    value_bytes = DTYPE_BYTES[dtype]
    if is_refused:
        monkeypatch.setattr(emulation, "varlen_attention", refusing)
    with emulated_device() as device:
        cluster = LocalCluster(
            tmp_path,
            limits=Limits(LIMITS.max_batch_size, LIMITS.max_batch_tokens, 256),
            dtype=dtype,
            device=device.device,
        )
        sizes = router_sizes(cluster.checkpoint.family, cluster.checkpoint.config)
        attention, num_pages = cluster.model.attention, cluster.model.num_pages
        reads_pages = isinstance(attention, VarlenAttention)
        assert reads_pages == (sizes.reads_pages(value_bytes) and not is_refused)
        num_slots = num_pages * attention.page_size
        assert is_refused or sizes.cache_slots(num_slots - 1, value_bytes) == num_slots
        held = torch.accelerator.memory_allocated()
        assert 0 <= held - sizes.held_bytes(num_slots, value_bytes) < ROTATION_BYTES
        torch.accelerator.reset_peak_memory_stats()
        # All are prefilled in chunks, decode together at last, and reach the longest context.
        length = LIMITS.longest - DECODED
        prompts = [[3 + (7 * i + j) % 50 for j in range(length)] for i in range(4)]
        cluster.generate(*(greedy_request(f"r{i}", p, DECODED) for i, p in enumerate(prompts)))
        cluster.close()
        taken = torch.accelerator.max_memory_allocated() - held
    planned = sizes.step_bytes(LIMITS, value_bytes, reads_pages)
    assert taken <= planned <= 4 * taken


def test_pages_and_heads_are_those_of_the_attentions() -> None:
    assert GatheredAttention.page_size == NATIVE_PAGE_SIZE == PAGE_SIZE
    assert VarlenAttention.page_size == VARLEN_PAGE_SIZE
    assert (HEAD_STEP, MAX_HEAD_SIZE) == (VARLEN_HEAD_STEP, VARLEN_MAX_HEAD)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_plan_of_a_model_has_the_bytes_of_its_checkpoint(tmp_path: Path, family: str) -> None:
    FAMILIES[family](tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    sizes = router_sizes(checkpoint.family, checkpoint.config)
    plan = make_plan(find_model(str(tmp_path), "bfloat16"), Wish(context=128, concurrency=2))
    assert plan.router_weight_bytes == sizes.weight_bytes(2)
    assert plan.wanted_cache_bytes == sizes.cache_bytes(256, 2)
    assert plan.router_step_bytes == sizes.step_bytes(StepLimits(2, 512, 128), 2)


def test_a_device_with_a_byte_too_little_is_refused_before_anything_is_copied(
    tmp_path: Path,
) -> None:
    save_mixtral(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    sizes = router_sizes(checkpoint.family, checkpoint.config)
    needed = sizes.held_bytes(sizes.cache_slots(1000, 4), 4)
    layers: Any = None
    with emulated_device(memory_bytes=needed - 1) as device:
        with pytest.raises(UnavailableError, match=f"lacks 1 bytes of the {needed:,}") as caught:
            MoEModel(checkpoint, torch.float32, 1000, layers, device.device)
        assert caught.value.field == "args.router.cache_tokens"
        assert torch.accelerator.memory_allocated() == 0
    with emulated_device(memory_bytes=needed + ROTATION_BYTES) as device:
        MoEModel(checkpoint, torch.float32, 1000, layers, device.device)


@pytest.mark.parametrize("is_grouped", [True, False], ids=["grouped", "one by one"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_an_actors_batch_takes_no_more_than_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, is_grouped: bool
) -> None:
    FAMILIES[family](tmp_path)
    assert ACTOR_BATCH_ROWS == MAX_BATCH_ROWS == RESERVED_ROWS
    if not is_grouped:
        monkeypatch.setattr(device_experts, "choose_grouped_mm", lambda *_: None)
    checkpoint = open_checkpoint(tmp_path)
    shape, layer_id = checkpoint.shape, checkpoint.shape.layers[0]
    keys = [ExpertKey("m", layer_id, expert_id) for expert_id in range(shape.num_experts)]
    rows = torch.randn(ACTOR_BATCH_ROWS // 8, shape.hidden_size).bfloat16()
    counts = dict.fromkeys(range(shape.num_experts), len(rows) // shape.num_experts)
    frames = [dispatch_frame(rows, counts, request_id=i, layer_id=layer_id) for i in range(8)]
    with emulated_device() as device:
        bank = ExpertBank(ExpertDevice(device.device, "expert-0", print))
        load(bank, checkpoint, keys, "bfloat16")
        held = torch.accelerator.memory_allocated()
        assert held == shape.num_experts * checkpoint.expert_bytes("bfloat16") + ALIGNMENT
        bank.compute(frames[:1])  # buffers that stay
        torch.accelerator.reset_peak_memory_stats()
        answers = bank.compute(frames)
        taken = torch.accelerator.max_memory_allocated() - held
    assert all(isinstance(answer, RowsFrame) for answer in answers)
    planned = actor_batch_bytes(find_model(str(tmp_path)).shape, 2, 32)
    assert taken <= planned <= 5 * taken


def test_a_device_that_others_fill_meanwhile_is_told_as_one_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_mixtral(tmp_path)

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("the device is out of memory")

    monkeypatch.setattr("router.model.model.make_cache", full)
    with emulated_device() as device, pytest.raises(UnavailableError, match="contiguous") as caught:
        LocalCluster(tmp_path, device=device.device)
    assert caught.value.field == "args.router.cache_tokens"
