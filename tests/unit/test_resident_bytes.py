"""The bytes that loaded experts are said to take, against what the process really grows by."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch

from cluster.placement import ExpertKey
from experts.bank import ExpertBank, GatedFfnExpert
from experts.ffn import ACTIVATIONS
from experts.weights import GatedFfnWeights

COUNT = 12


def expert(hidden: int, inner: int, dtype: torch.dtype) -> GatedFfnExpert:
    gate_up = torch.full((2 * inner, hidden), 0.01, dtype=dtype)
    down = torch.full((hidden, inner), 0.01, dtype=dtype)
    return GatedFfnExpert(GatedFfnWeights(gate_up, down), ACTIVATIONS["silu"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_tells_the_bytes_that_its_process_grows_by(dtype: torch.dtype) -> None:
    hidden, inner = 1024, 1536
    expert(hidden, inner, dtype)  # whatever is set up once
    gc.collect()
    process, bank = psutil.Process(), ExpertBank()
    assert bank.num_bytes == 0
    before = process.memory_info().rss
    for expert_id in range(COUNT):
        bank.experts[ExpertKey("m", 0, expert_id)] = expert(hidden, inner, dtype)
    gc.collect()
    grown = process.memory_info().rss - before
    weights = COUNT * 3 * hidden * inner * dtype.itemsize
    assert bank.num_bytes == pytest.approx(weights, rel=0.02)
    assert bank.num_bytes >= weights
    # The allocator keeps the room of some plain weights that were let go once they were packed.
    assert 0.95 * bank.num_bytes <= grown <= bank.num_bytes + 4 * weights / COUNT
    bank.experts.pop(ExpertKey("m", 0, 0))
    assert bank.num_bytes == pytest.approx(weights * (COUNT - 1) / COUNT, rel=0.02)


def test_odd_sizes_count_with_what_a_layout_pads_them_by() -> None:
    hidden, inner = 65, 130  # no multiple of anything that a processor's unit takes
    whole = expert(hidden, inner, torch.bfloat16).num_bytes
    weights = 3 * hidden * inner * 2
    assert weights <= whole <= 3 * weights
    assert expert(hidden, inner, torch.float32).num_bytes == 2 * weights
