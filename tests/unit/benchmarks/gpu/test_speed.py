"""The parts that measure, as far as they need no Ray: ``tests/long`` runs all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import baseline, engine
from benchmarks.common import SIZES, machine
from benchmarks.failover import KILL, QUIET
from benchmarks.gpu import card, kill, models, speed
from benchmarks.gpu.settings import Settings
from benchmarks.synthetic import MIXTRAL, write_checkpoint

TINY = {
    **MIXTRAL, **SIZES, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SETTINGS = Settings(
    "test-gpu-", device="cpu", device_bytes=1 << 40, models=(TINY, TINY), tokens=4, rounds=1
)


def test_one_process_generates_for_each_number_of_streams(tmp_path: Path, one_thread: None) -> None:
    write_checkpoint(tmp_path, TINY)
    measured = baseline.measure(tmp_path, [4, 1], 3, 2)
    assert measured.keys() == {"4", "1"}
    assert all(figures["tokens_per_s"] > 0 for figures in measured.values())


@pytest.mark.parametrize("number", [0, 1])
def test_a_model_is_written_measured_and_removed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temp, results = tmp_path / "temp", tmp_path / "results"
    temp.mkdir()
    seen: list[Path] = []

    def room(device_bytes: int) -> models.Room:
        assert device_bytes == SETTINGS.device_bytes
        return models.Room(device_bytes, 1 << 40, {str(temp): 1 << 40})

    def measure(folder: Path, *arguments: Any) -> dict[str, Any]:
        assert arguments == ([32, 1], 4, 1, "cpu")
        assert json.loads((folder / "config.json").read_text()) == TINY
        seen.append(folder)
        return {n: {"tokens_per_s": 100.0} for n in ("32", "1")}

    def run_module(module: str, words: list[str], environment: dict[str, str]) -> dict[str, Any]:
        assert (module, words) == ("benchmarks.gpu.speed", [str(seen[0]), str(results)])
        assert environment["RAY_ADDRESS"] == "local"
        assert environment["OMP_NUM_THREADS"] == "1"
        streams = {n: {"tokens_per_s": 90.0} for n in ("32", "1")}
        return {"actors": {"1": {"streams": streams}}}

    monkeypatch.setattr(speed, "room", room)
    monkeypatch.setattr(baseline, "measure", measure)
    monkeypatch.setattr(engine, "run_module", run_module)
    result = speed.run(SETTINGS, number, results)
    assert result["ratio"] == {"1": {"32": 0.9, "1": 0.9}}
    assert result["is_largest"] == (number == 1)
    assert result["parameters"] == models.bytes_of(TINY) // 2
    assert seen[0].name.startswith(SETTINGS.label)
    assert list(temp.iterdir()) == []


def test_the_card_is_described_with_all_versions() -> None:
    described = card.run("cpu")
    assert described["device"] == "cpu"
    assert described["free_bytes"] > 0
    assert described["machine"] == machine()
    assert set(described) >= {"name", "driver", "toolkit", "native"}


def test_a_drivers_version_is_what_its_tool_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert card.driver_version() == card.UNKNOWN
    for name, text in (("nvidia-smi", "exit 9"), ("rocm-smi", "echo name; echo card0,6.3")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    assert card.driver_version() == "rocm card0,6.3"  # NVIDIA's failed
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.95.05\n")
    assert card.driver_version() == "nvidia 580.95.05"


def test_a_kill_is_kept_where_no_request_failed_and_the_actor_is_back() -> None:
    def kept(**changes: Any) -> bool:
        of_both = {"requests": 9, "failures": {}}
        killed = {"name": KILL, **of_both, "back_s": 2.0, **changes}
        return kill.kept({"windows": [{"name": QUIET, **of_both, "back_s": None}, killed]})

    assert kept()
    assert not kept(failures={"wrong tokens at index 3": 1})
    assert not kept(back_s=None)
    assert not kept(requests=0)
