"""The processor's name, and how much of it is usable."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from cluster import processor


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("processor\t: 0\nmodel name\t: A: CPU 9\nflags : x\nmodel name\t: B\n", "A: CPU 9"),
        ("Processor: ARM\n", platform.machine()),
        ("", platform.machine()),
    ],
)
def test_the_processor_is_told_by_its_model_or_its_architecture(
    told: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "CPU_INFO", file)
    assert processor.processor_name() == platform.machine()
    file.write_text(told, encoding="utf-8")
    assert processor.processor_name() == name


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "300000 100000\n"}, 3),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "25000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "50000\n"}, 8),
        ({"cpu.max": ""}, 8),
        ({"cpu.max": "100000 0\n"}, 8),
    ],
)
def test_a_process_uses_no_more_processors_than_its_containers_limit(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert processor.num_cpus(tmp_path) == expected


def test_a_process_uses_its_machines_processors() -> None:
    assert 1 <= processor.num_cpus() <= (os.cpu_count() or 1)
