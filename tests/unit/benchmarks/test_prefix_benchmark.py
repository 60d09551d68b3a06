"""What the benchmark of prefixes makes of its times, and what it promises of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import prefix

FAST = {"cold": [0.02, 0.5, 0.01], "hot": [0.004, 0.001, 0.003], "whole": [0.005, 0.006, 0.004]}
SLOW = {**FAST, "hot": [0.0041, 0.0042, 0.0043]}


def test_a_summary_has_medians_and_their_ratios() -> None:
    assert prefix.summary(FAST) == pytest.approx(
        {"cold, ms": 20, "hot, ms": 3, "whole, ms": 5, "hot / cold": 0.15, "whole / cold": 0.25}
    )


@pytest.mark.parametrize(("times_s", "status"), [(FAST, 0), (SLOW, 1)])
def test_the_exit_status_says_whether_the_promise_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times_s: Any, status: int
) -> None:
    file = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["prefix", "--json", str(file)])
    monkeypatch.setattr(prefix, "measure", lambda folder, tokens, rounds: times_s)
    monkeypatch.setattr(prefix, "make_checkpoint", lambda folder: None)
    assert prefix.main() == status
    models = json.loads(file.read_text())["models"]
    assert models["random"] == models["mesh-tiny"] == prefix.summary(times_s)
