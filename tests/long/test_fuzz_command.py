"""``benchmarks.fuzz`` as a command, which runs each target in a process of its own."""

from __future__ import annotations

from pathlib import Path

from benchmarks import fuzz


def test_the_command_runs_targets_and_says_how_much(tmp_path: Path) -> None:
    result = fuzz.run(["frame"], "mutation", 0.01, 1, tmp_path)
    [told] = result["targets"]
    assert told["finding"] is None
    assert told["runs"] > 100
    assert 20 < told["peak_mb"] < 2000
