"""What the benchmark of resumed requests makes of its times, and what it promises of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import resume

FAST = {"at once": [0.02, 0.5, 0.01], "one to a step": [0.1, 0.2, 0.04]}
SLOW = {**FAST, "one to a step": [0.01, 0.02, 0.01]}


def test_a_summary_has_medians_and_their_ratio() -> None:
    expected = {"at once, s": 0.02, "one to a step, s": 0.1, "ratio": 0.2}
    assert resume.summary(FAST) == pytest.approx(expected)


@pytest.mark.parametrize(("times_s", "status"), [(FAST, 0), (SLOW, 1)])
def test_the_exit_status_says_whether_the_promise_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times_s: Any, status: int
) -> None:
    file = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["resume", "--json", str(file)])
    monkeypatch.setattr(resume, "measure", lambda folder, rounds: {"1 x 100": times_s})
    monkeypatch.setattr(resume, "make_checkpoint", lambda folder: None)
    assert resume.main() == status
    assert json.loads(file.read_text())["loads"] == {"1 x 100": resume.summary(times_s)}
