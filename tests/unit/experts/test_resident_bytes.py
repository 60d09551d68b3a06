"""The bytes that loaded experts are said to take, against what a process really grows by."""

from __future__ import annotations

import gc
import json
import subprocess
import sys

import numpy as np
import psutil
import pytest

from cluster.spec import ExpertKey
from cluster.wire.arrays import DTYPES
from experts.bank import ExpertBank, GatedFfnExpert
from experts.checkpoint.expert_weights import GatedFfnWeights, paged

COUNT, HIDDEN, INNER = 12, 1024, 1536


def expert(hidden: int, inner: int, dtype: str) -> GatedFfnExpert:
    shapes = (2 * inner, hidden), (hidden, inner)
    parts = [paged(shape, DTYPES[dtype]) for shape in shapes]  # as a checkpoint is read
    for part in parts:
        part.fill(0.01)
    return GatedFfnExpert(GatedFfnWeights(*parts), "silu", 1)


def fill_a_bank(dtype: str) -> tuple[int, int]:
    """Load experts; returns the bytes that the bank tells, and those that this process grew by."""
    expert(HIDDEN, INNER, dtype)  # whatever is set up once
    gc.collect()
    process, bank = psutil.Process(), ExpertBank()
    before = process.memory_info().rss
    for expert_id in range(COUNT):
        bank.hold(ExpertKey("m", 0, expert_id), expert(HIDDEN, INNER, dtype))
    gc.collect()
    return bank.num_bytes, process.memory_info().rss - before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bank_tells_the_bytes_that_its_process_grows_by(dtype: str) -> None:
    # In a process of its own, whose heap has no room left over from other tests.
    program = (
        "import json; from tests.unit.experts.test_resident_bytes import fill_a_bank; "
        f"print(json.dumps(fill_a_bank({dtype!r})))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    told, grown = json.loads(done.stdout)
    weights = COUNT * 3 * HIDDEN * INNER * DTYPES[dtype].itemsize
    assert weights <= told <= 1.02 * weights
    # One expert may lie where the first one lay, or one that is packed may leave its room behind.
    assert abs(grown - told) <= 1.1 * weights / COUNT


def test_a_bank_counts_what_it_holds_now_with_what_a_layout_pads() -> None:
    bank = ExpertBank()
    assert bank.num_bytes == 0
    for expert_id in range(3):
        bank.hold(ExpertKey("m", 0, expert_id), expert(64, 32, "float32"))
    assert bank.num_bytes == 3 * 3 * 64 * 32 * 4
    bank.release(ExpertKey("m", 0, 1))
    assert bank.num_bytes == 2 * 3 * 64 * 32 * 4
    hidden, inner = 65, 130  # no multiple of anything that a processor's unit takes
    weights = 3 * hidden * inner * 2
    assert weights <= expert(hidden, inner, "bfloat16").num_bytes <= 3 * weights
    assert 2 * weights <= expert(hidden, inner, "float32").num_bytes <= 3 * weights


def test_every_second_weight_that_is_let_go_goes_back_to_the_system() -> None:
    process, count, num_bytes = psutil.Process(), 64, 256 << 10
    before = process.memory_info().rss
    weights = [paged((256, 1024), np.dtype(np.uint8)) for _ in range(count)]
    for weight in weights:
        assert weight.flags.c_contiguous
        weight.fill(1)
    held = process.memory_info().rss
    assert held - before >= 0.9 * count * num_bytes
    del weights[::2]
    assert held - process.memory_info().rss >= 0.9 * (count // 2) * num_bytes
    assert all(bool((weight == 1).all()) for weight in weights)
