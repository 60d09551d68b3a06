"""The line of a slow start: the measured cause, or none."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from router.ops.startup import announce, slow_start
from router.ops.startup.slow_start import Usage, cause, explain_slow_start, usage

BEFORE = Usage(
    at_s=100.0, read_bytes=10**8, own_cpu_s=5.0, cpu_s=1000.0, disk_wait_s=50.0, cpu_wait_s=70.0
)
LATER = replace(BEFORE, at_s=110.0, read_bytes=7 * 10**8, own_cpu_s=12.0, cpu_s=1008.0)
LIMIT_S = 60.0


@pytest.mark.parametrize(
    ("disk_wait_s", "cpu_wait_s", "others_cpu_s", "resource", "reason"),
    [
        (0.5, 9.0, 1.0, "", ""),  # its own processes want more than the processors have
        (4.9, 9.0, 1.0, "", ""),
        (5.0, 0.0, 0.0, "disk", "waits for the disk, 0.7 GB read so far;"),
        (9.0, 9.0, 15.0, "disk", "waits for the disk, 0.7 GB read so far;"),
        (0.5, 9.0, 13.0, "cpu", "other programs keep 1.3 of 2 processors busy"),
        (0.5, 4.0, 13.0, "", ""),  # the others are busy, but nobody waits for long
        (0.5, 9.0, 9.9, "", ""),
    ],
)
def test_a_cause_is_named_only_where_it_took_half_of_the_time(
    disk_wait_s: float, cpu_wait_s: float, others_cpu_s: float, resource: str, reason: str
) -> None:
    now = replace(
        LATER,
        disk_wait_s=BEFORE.disk_wait_s + disk_wait_s,
        cpu_wait_s=BEFORE.cpu_wait_s + cpu_wait_s,
        cpu_s=BEFORE.cpu_s + 7.0 + others_cpu_s,
    )
    found, told = cause(BEFORE, now, processors=2)
    assert (found, bool(told)) == (resource, bool(reason))
    assert told.startswith(reason)


def test_usage_is_that_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for resource, total_us in (("io", 1_500_000), ("cpu", 70_000_000)):
        (tmp_path / resource).write_text(
            f"some avg10=0.00 avg60=9.02 avg300=0.13 total={total_us}\n"
            "full avg10=0.00 avg60=0.02 avg300=0.11 total=3\n"
        )
    monkeypatch.setattr(slow_start, "PRESSURE", tmp_path)
    before = usage(psutil.Process())
    assert (before.disk_wait_s, before.cpu_wait_s) == (1.5, 70.0)
    while (now := usage(psutil.Process())).own_cpu_s == before.own_cpu_s:
        pass
    assert 0 < now.own_cpu_s < now.cpu_s
    assert now.at_s > before.at_s
    assert now.read_bytes >= before.read_bytes


def explained(monkeypatch: pytest.MonkeyPatch, slow_s: float, start: announce.Start) -> list[str]:
    """Return what is printed of a start, until it is ready."""
    monkeypatch.setattr(slow_start, "SLOW_S", slow_s)
    monkeypatch.setattr(slow_start, "LOOK_S", -1e9)  # the next look is always due
    monkeypatch.setattr(slow_start, "POLL_S", 0.001)
    lines: list[str] = []
    before = set(threading.enumerate())
    explain_slow_start(lines.append, [start])
    for thread in set(threading.enumerate()) - before:  # it may have ended already
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    return lines


@pytest.mark.parametrize(("slow_s", "num_lines"), [(0.0, 1), (1e9, 0)])
def test_each_cause_is_told_once_and_of_a_quick_start_none(
    slow_s: float, num_lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = announce.Start(time.monotonic() - 30.0, threading.Event())
    looks = itertools.count(start.began_at_s + 30.0)

    def usage(command: psutil.Process) -> Usage:
        now_s = next(looks)  # a second a look, in which something waits for the disk
        if now_s > start.began_at_s + 30.0 + 3 * slow_start.LOOKS:
            start.is_ready.set()
        return replace(BEFORE, at_s=now_s, disk_wait_s=now_s)

    monkeypatch.setattr(slow_start, "usage", usage)
    lines = explained(monkeypatch, slow_s, start)
    assert len(lines) == num_lines
    for line in lines:
        assert line.startswith("expertmesh: not ready after 3")
        assert " s: waits for the disk, 0.1 GB read so far;" in line


def test_where_linux_counts_no_waits_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_start, "PRESSURE", tmp_path / "absent")
    start = announce.Start(time.monotonic() - 30.0, threading.Event())
    assert explained(monkeypatch, 0.0, start) == []
