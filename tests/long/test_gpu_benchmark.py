"""The command for a machine with an accelerator, with tiny models and the CPU in its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.common import SIZES
from benchmarks.gpu.command import run
from benchmarks.gpu.report import verdicts_of
from benchmarks.gpu.settings import Settings
from benchmarks.synthetic import MIXTRAL
from router.ops.doctor.machine import SHARED_MEMORY

ROOT = Path(__file__).parents[2]
TINY = {
    **MIXTRAL,
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SETTINGS = Settings(
    f"expertmesh-gpu-test-{os.getpid()}-",
    device="cpu",
    families=("mixtral", "gpt_oss"),
    models=(TINY, {**TINY, "hidden_size": 128}),
    streams=("4", "1"),
    tokens=8,
    rounds=1,
    kill_streams=4,
    quiet_s=3.0,
    kill_s=8.0,
)


@pytest.mark.timeout(600)
def test_all_parts_run_and_leave_results_and_nothing_else(tmp_path: Path) -> None:
    status = run(SETTINGS, tmp_path, time.monotonic() + 590)
    result = json.loads((tmp_path / "results.json").read_text())
    parts = {part["name"]: part["status"] for part in result["parts"]}
    assert parts == dict.fromkeys(("card", "parity", "model-1", "kill", "model-0"), "ok"), result
    verdicts = verdicts_of(result)
    assert status == int(not all(one.is_kept for one in verdicts))
    fp32, bf16, *_, kill = verdicts  # those in between are promises for an accelerator
    assert fp32.is_kept
    assert bf16.is_kept
    assert kill.is_kept
    small, large = result["models"]
    assert (small["is_largest"], large["is_largest"]) == (False, True)
    for model in result["models"]:
        for count in ("1", "2"):
            # The path's own tokens, whoever holds the experts.
            ours = [model["actors"][one]["streams"]["4"]["tokens"] for one in ("1", count)]
            assert ours[0] == ours[1]
            assert set(model["actors"][count]["streams"]["4"]["calls"]) == {"stream"}
            assert model["ratio"][count]["4"] > 0
    assert "| kill of an actor with copies elsewhere |" in (tmp_path / "results.md").read_text()
    for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        assert list(folder.glob(f"{SETTINGS.label}*")) == []


@pytest.mark.timeout(120)
def test_the_devices_own_tests_end_at_once_with_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "gpu")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    [line] = [one for one in (done.stdout + done.stderr).splitlines() if one]
    assert "needs an accelerator" in line
