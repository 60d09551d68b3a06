"""Cores that actors keep for themselves on small machines."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from experts import cores
from experts.cores import CoreClaim


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretend that this process may use four cores whose claims no real actor has."""
    allowed = [4096, 4097, 4098, 4099]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed))
    return allowed


def test_each_claim_has_cores_of_its_own_until_none_is_left(small_machine: list[int]) -> None:
    claims = [CoreClaim(1), CoreClaim(2), CoreClaim(1), CoreClaim(1)]
    try:
        assert [len(claim.cores) for claim in claims] == [1, 2, 1, 0]
        assert set().union(*(claim.cores for claim in claims)) == set(small_machine)
    finally:
        for claim in claims:
            claim.close()


def test_a_claim_that_is_too_large_takes_nothing(small_machine: list[int]) -> None:
    first, too_large = CoreClaim(2), CoreClaim(3)
    rest = CoreClaim(2)
    try:
        assert not too_large.cores
        assert first.cores | rest.cores == set(small_machine)
    finally:
        first.close()
        rest.close()


def test_cores_are_free_again_when_their_process_is_killed(small_machine: list[int]) -> None:
    code = (
        "import os, sys\n"
        "os.sched_getaffinity = lambda pid: {4096, 4097, 4098, 4099}\n"
        "from experts.cores import CoreClaim\n"
        "claim = CoreClaim(4)\n"
        "print(len(claim.cores), flush=True)\n"
        "sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "4\n"
        assert not CoreClaim(1).cores
    finally:
        other.kill()
        other.communicate(timeout=10)
    claim = CoreClaim(4)
    claim.close()
    assert claim.cores == set(small_machine)


def test_nothing_is_claimed_where_cores_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    many = set(range(4096, 4096 + cores.MAX_CORES + 1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: many)
    assert not CoreClaim(1).cores


def test_only_the_thread_that_is_bound_keeps_to_its_cores() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    claim = CoreClaim(0)
    claim.cores = frozenset({one})
    seen: list[set[int]] = []

    def bound() -> None:
        claim.bind_thread()
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=bound)
    thread.start()
    thread.join(10)
    assert seen == [{one}]
    assert os.sched_getaffinity(0) == before


def test_no_core_leaves_the_thread_free() -> None:
    before = os.sched_getaffinity(0)
    CoreClaim(0).bind_thread()
    assert os.sched_getaffinity(0) == before
