"""Parts in processes of their own: what comes back, limits, and that nothing is left."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu import parts
from benchmarks.gpu.parts import Part, remove_folders, run_all, run_part

PROGRAM = """
import json, pathlib, subprocess, sys, time
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
print("begun", flush=True)
print("(raylet) of no interest", flush=True)
if name == "fails":
    raise SystemExit("a reason")
if name == "hangs":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "pids").write_text(json.dumps([child.pid]))
    time.sleep(60)
if name != "silent":
    (folder / f"{name}.json").write_text(json.dumps({"name": name}))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_part.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(parts, "END_S", 1.0)
    return "a_part"


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path: Path, module: str) -> None:
    said: list[str] = []
    given = [Part("fails", 20.0), Part("silent", 20.0), Part("good", 20.0)]
    outcomes = run_all(given, tmp_path, "no-such-", time.monotonic() + 60, said.append, module)
    assert [(one.name, one.status) for one in outcomes] == [
        ("fails", "failed"),
        ("silent", "failed"),
        ("good", "ok"),
    ]
    assert "a reason" in outcomes[0].reason
    assert outcomes[2].result == {"name": "good"}
    assert "good: begun" in said
    assert not any("raylet" in line for line in said)
    assert any(line.startswith("fails: failed, ") for line in said)


def test_a_part_over_its_limit_is_killed_with_what_it_has_started(
    tmp_path: Path, module: str
) -> None:
    started_s = time.monotonic()
    outcome = run_part(Part("hangs", 3.0), tmp_path, lambda line: None, module)
    assert (outcome.status, outcome.result) == ("over its limit", None)
    assert time.monotonic() - started_s < 60.0
    for pid in json.loads((tmp_path / "pids").read_text()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


def test_an_old_result_is_not_taken_for_a_new_one(tmp_path: Path, module: str) -> None:
    (tmp_path / "silent.json").write_text("{}")
    assert run_part(Part("silent", 20.0), tmp_path, lambda line: None, module).status == "failed"


def test_parts_share_the_time_that_is_left(tmp_path: Path, module: str) -> None:
    said: list[str] = []
    given = [Part("good", 20.0)]
    [outcome] = run_all(given, tmp_path, "no-such-", time.monotonic() + 1.0, said.append, module)
    assert (outcome.status, outcome.result) == ("no time left", None)
    [outcome] = run_all(given, tmp_path, "no-such-", time.monotonic() + 5.0, said.append, module)
    assert outcome.status == "ok"
    assert "good: at most 5 s" in said


def test_temporary_folders_of_this_run_alone_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    for name in ("mine-1", "mine-2", "other-1", "temp/mine-3"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("x")
    remove_folders("mine-")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["other-1", "temp"]
    assert list((tmp_path / "temp").iterdir()) == []
