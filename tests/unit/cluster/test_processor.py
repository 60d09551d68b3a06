"""The processor's name."""

from __future__ import annotations

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
