"""The same checkpoint in one process of transformers, in bf16, for comparison."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.common import CACHE_TOKENS, prompts
from benchmarks.peers.ask import ask
from benchmarks.peers.side import Task

MODULE, FORMAT = "benchmarks.peers.hf_transformers", "bf16 grouped_mm"


def measure(
    folder: Path, streams: Sequence[int], tokens: int, rounds: int, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Generate in a fresh process; returns median tokens per second by number of streams.

    ``device`` is ``cpu``, on all cores, or ``accelerator``.
    """
    threads, given = psutil.cpu_count() or 1, prompts(max(streams))
    model = str(folder)
    task = Task(
        model, FORMAT, threads, given, tuple(streams), tokens, rounds, [], CACHE_TOKENS, device
    )
    reply = ask(sys.executable, MODULE, task)["streams"]
    return {n: {"tokens_per_s": statistics.median(one["rates"])} for n, one in reply.items()}
