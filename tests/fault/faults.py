"""What the fault tests share: streams under way, and signals to processes of the cluster only.

A signal goes to nothing but a pid that the cluster's own status names, and is seen to have hit
before the test goes on.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

from cluster.status import ClusterStatus
from tests.cluster_fixture import (
    RANDOM,
    ServedCluster,
    StreamReader,
    greedy,
    is_alive,
    prompt_of,
    wait_until,
)

STREAMS, LENGTH, BEFORE = 8, 200, 3
"""Streams at once, tokens of each, and how many of them come before the fault."""
HIT_S = 5.0
STALL_S = 0.5
"""A stream that has no token for so long is taken to wait for an expert."""

PROMPTS = [prompt_of(5 + 5 * seed, 1000 + seed) for seed in range(STREAMS)]


def named_pids(told: ClusterStatus) -> set[int]:
    """Return every pid that a status names."""
    parts = (*told.routers, *told.gateways, *told.actors)
    return {told.controller_pid, *(part.pid for part in parts)}


def kill(told: ClusterStatus, *pids: int) -> None:
    """Send SIGKILL to processes that ``told`` names; returns when all of them are gone."""
    _signal(told, pids, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, pids)), f"{pids} are killed", HIT_S)


@contextmanager
def stopped(told: ClusterStatus, *pids: int) -> Iterator[None]:
    """Have processes that ``told`` names hang in the body; kills those that hang after it."""
    _signal(told, pids, signal.SIGSTOP)
    try:
        wait_until(lambda: all(map(is_stopped, pids)), f"{pids} are stopped", HIT_S)
        yield
    finally:
        for pid in filter(is_stopped, pids):
            os.kill(pid, signal.SIGKILL)


def let_go(told: ClusterStatus, pid: int) -> None:
    """Send SIGCONT to a stopped process that ``told`` names; returns when it runs again."""
    assert is_stopped(pid)
    _signal(told, [pid], signal.SIGCONT)
    wait_until(lambda: is_alive(pid) and not is_stopped(pid), f"{pid} goes on", HIT_S)


def is_stopped(pid: int) -> bool:
    """Tell whether a process exists and hangs by SIGSTOP."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def start_streams(
    served: ServedCluster, model: str = RANDOM, timeout_s: float = 60.0, times: int = 1
) -> list[StreamReader]:
    """Return greedy streams that have begun and are far from their end.

    They are those of :data:`PROMPTS`, all of these ``times`` over.
    """
    expected_tokens(served)  # nothing slow may come between their start and the fault
    sampling = greedy(LENGTH)
    prompts = PROMPTS * times
    streams = [StreamReader(served.client, p, sampling, model, timeout_s) for p in prompts]
    for stream in streams:
        stream.wait_tokens(BEFORE)
    return streams


def expected_tokens(served: ServedCluster) -> list[tuple[int, ...]]:
    """Return what transformers makes of :data:`PROMPTS` with the random model."""
    return [served.expected(prompt, LENGTH) for prompt in PROMPTS]


def longest_gap_s(streams: Sequence[StreamReader]) -> float:
    """Return the longest time that any of the streams had to wait for its next tokens."""
    return max(
        after - before
        for stream in streams
        for before, after in itertools.pairwise(stream.arrived_s)
    )


def wait_stalled(streams: Sequence[StreamReader]) -> None:
    """Wait until none of the streams, which must go on, has had a token for a while."""
    last, since_s = -1, 0.0

    def stalled() -> bool:
        nonlocal last, since_s
        total = sum(len(stream.token_ids) for stream in streams)
        if total != last:
            last, since_s = total, time.monotonic()
        return time.monotonic() - since_s > STALL_S

    wait_until(stalled, "the streams stall", 10)
    assert not any(stream.ended for stream in streams)


def _signal(told: ClusterStatus, pids: Sequence[int], number: signal.Signals) -> None:
    foreign = set(pids) - named_pids(told)
    assert not foreign, f"not processes of the cluster: {foreign}"
    for pid in pids:
        os.kill(pid, number)
