"""The document of all benchmarks: what it has, and that nothing is needed but the files."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import results

BENCHMARKS = Path(results.__file__).parent
DAY = datetime.date(2025, 1, 31)
MACHINE = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0", "transformers": "5.24.0"}


def keep(folder: Path, name: str, status: int = 0, whole: bool = True) -> None:
    """Write what all.sh keeps of one benchmark."""
    number = len(list(folder.glob("*.command"))) + 1
    kept = folder / f"{number:02d}-{name}"
    kept.with_suffix(".command").write_text(f"python -m benchmarks.{name} --quick\n")
    kept.with_suffix(".status").write_text(f"{status}\n")
    kept.with_suffix(".txt").write_text(f"(raylet) a word\n\n{name} told │ 1 │   \n")
    if whole:
        kept.with_suffix(".json").write_text(json.dumps({"machine": MACHINE}))


def test_each_benchmark_has_its_command_its_output_and_how_it_ended(tmp_path: Path) -> None:
    keep(tmp_path, "serve")
    keep(tmp_path, "edges", status=1)
    keep(tmp_path, "dispatch", status=1, whole=False)
    text = results.document(results.read(tmp_path), DAY, ["- a machine"])
    assert "on 2025-01-31" in text
    assert "- a machine" in text
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == ["serve", "edges", "dispatch"]
    assert "| `python -m benchmarks.serve --quick` | well |" in text
    assert "| `python -m benchmarks.edges --quick` | missed or failed |" in text
    assert "| `python -m benchmarks.dispatch --quick` | broke off (exit status 1) |" in text
    assert "```\nserve told │ 1 │\n```" in text


def test_the_machine_is_told_without_names_and_places(tmp_path: Path) -> None:
    keep(tmp_path, "wires", whole=False)
    keep(tmp_path, "serve")
    told = results.machine_lines(results.read(tmp_path))
    assert re.fullmatch(r"- .+, \d+ cores", told[0])
    assert re.fullmatch(r"- \d+ GB of memory", told[1])
    assert told[2] == "- python 3.11.9, ray 2.60.0, torch 2.13.0, transformers 5.24.0"


def test_a_folder_with_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file"):
        results.read(tmp_path)


def test_the_script_runs_benchmarks_that_there_are_with_options_that_they_know() -> None:
    script = (BENCHMARKS / "all.sh").read_text()
    lines = re.findall(r"^  run (\w+)(.*)$", script, re.MULTILINE)
    assert len(lines) == 54
    for name, options in lines:
        source = (BENCHMARKS / f"{name}.py").read_text() + (BENCHMARKS / "common.py").read_text()
        for option in ["--json", *re.findall(r"--[a-z-]+", options)]:
            assert f'"{option}"' in source, f"{name} {option}"
    subprocess.run(["bash", "-n", BENCHMARKS / "all.sh"], check=True, timeout=20)
