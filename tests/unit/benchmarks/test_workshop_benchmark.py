"""The benchmark of the workshop: a checkpoint of the asked size, phases, promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import workshop
from experts.checkpoint.checkpoint import open_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_command_is_measured_by_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "intermediate_size": 48, "vocab_size": 300}
    monkeypatch.setattr(workshop, "CONFIG", workshop.CONFIG | small)
    source, text = tmp_path / "source", tmp_path / "text.txt"
    source.mkdir()
    num_bytes = workshop.make_checkpoint(source, 0.001)
    assert open_checkpoint(source).num_bytes == num_bytes == pytest.approx(1e6, rel=0.3)
    workshop.write_text(text)
    for command in workshop.COMMANDS:
        measured = workshop.run_command(command, source, tmp_path / command, text)
        phases = measured["phases_s"]
        assert sum(phases.values()) == pytest.approx(measured["whole_s"], rel=0.2)
        assert ("calibrating" in phases) is (command != workshop.COMMANDS[0])
        assert (tmp_path / command / "workshop.json").exists()


def test_promises_are_kept_or_missed() -> None:
    def result(writing_s: float, peak_mb: float) -> dict[str, Any]:
        one = {"phases_s": {"writing": writing_s}, "peak_mb": peak_mb}
        sizes = {"num_bytes": 2_000_000_000, "layer_bytes": 100_000_000}
        return {"sizes": sizes, "commands": {"prune by random": one}}

    kept = [verdict.is_kept for verdict in workshop.verdicts_of(result(19.0, 590.0))]
    missed = [verdict.is_kept for verdict in workshop.verdicts_of(result(21.0, 610.0))]
    assert (kept, missed) == ([True, True], [False, False])
