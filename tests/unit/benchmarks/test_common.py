"""The benchmarks' pure parts: summaries, and pages of memory."""

from __future__ import annotations

import mmap

import pytest
import torch

from benchmarks.common import mapped_mb, summary_ms
from benchmarks.serve import summarize
from benchmarks.serve_clients import Timed


def test_summary_is_in_milliseconds() -> None:
    assert summary_ms([0.001, 0.002, 0.009]) == {"p50_ms": 2.0, "p99_ms": 9.0, "count": 3}


def test_a_round_is_timed_from_its_first_request_to_its_last_answer() -> None:
    slow = Timed(10.0, [(10.5, 1), (10.7, 1), (11.0, 2)], 11.0)
    quick = Timed(10.1, [(10.2, 4)], 10.2)
    result = summarize([[slow, quick]], stream=True)
    assert result["tokens_per_s"] == pytest.approx(8.0)
    assert result["request"]["p99_ms"] == pytest.approx(1000.0)
    assert result["first_token"]["p99_ms"] == pytest.approx(500.0)
    assert result["between_tokens"] == {"p50_ms": 250.0, "p99_ms": 300.0, "count": 2}
    assert "first_token" not in summarize([[slow, quick]], stream=False)


@pytest.mark.parametrize("num_pages", [0, 1, 1000])
def test_only_pages_of_a_tensor_that_were_touched_are_resident(num_pages: int) -> None:
    tensor = torch.frombuffer(mmap.mmap(-1, 2000 * mmap.PAGESIZE), dtype=torch.uint8)
    tensor[: num_pages * mmap.PAGESIZE] = 1
    assert mapped_mb(tensor) == pytest.approx(num_pages * mmap.PAGESIZE / 1e6)
