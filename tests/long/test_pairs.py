"""The whole command that compares two commits: one pair of a tiny model, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from benchmarks import common, pairs
from benchmarks.checkout import ROOT
from benchmarks.processor_time import worker_name
from tests.cluster_fixture import wait_until

TINY_SIZES = {
    **common.SIZES,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
START_S, END_S = 400.0, 60.0


@pytest.mark.timeout(900)
def test_a_commit_beside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "SIZES", TINY_SIZES)
    monkeypatch.setattr(pairs, "TURN_CPU_S", 0.1)
    file = tmp_path / "pairs.json"
    arguments = ["HEAD", "--pairs", "1", "--json", str(file)]
    assert pairs.main(arguments) == 1  # one pair is too few for a verdict
    result = json.loads(file.read_text())
    assert result["old"] == result["new"]
    assert list(result["cases"]) == [*pairs.DECODE_STREAMS, pairs.SERVE]
    serving = {case: {"router", "RemoteExpertActor"} for case in pairs.DECODE_STREAMS}
    serving[pairs.SERVE] = {"Router-bench", "Gateway", "Controller", "ServeController"}
    for case, summary in result["cases"].items():
        [pair] = summary["pairs"]
        assert summary["verdict"] == "too few pairs"
        assert 0.5 < pair["ratio"] < 2.0
        assert len({turn["tokens"] for turn in (*pair["old"], *pair["new"])}) == 1
        for turn in (*pair["old"], *pair["new"]):
            assert serving[case] <= set(turn["cpu_s"])
            assert all(cpu_s >= 0 for cpu_s in turn["cpu_s"].values())


@pytest.mark.timeout(600)
def test_ctrl_c_leaves_neither_processes_nor_checkouts() -> None:
    """Comes when actors are there."""
    command = [sys.executable, "-m", "benchmarks.pairs", "HEAD", "--benchmarks", "decode"]
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # short, for Ray's sockets
        environment = {**os.environ, "TMPDIR": name}
        with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
            below = psutil.Process(process.pid)

            def workers() -> list[psutil.Process]:
                found = below.children(recursive=True)
                return found if sum(map(_is_worker, found)) >= 2 else []

            left = wait_until(workers, "expert actors", START_S)
            assert any(Path(name).glob("*/old/router"))
            process.send_signal(signal.SIGINT)
            assert process.wait(END_S)
        _, alive = psutil.wait_procs(left, timeout=END_S)
        assert alive == []
        assert {path.name for path in Path(name).iterdir()} <= {"ray"}  # its logs


def _is_worker(process: psutil.Process) -> bool:
    try:
        return worker_name(" ".join(process.cmdline())) is not None
    except psutil.NoSuchProcess:
        return False
