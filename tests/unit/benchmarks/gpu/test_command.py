"""The command as a whole: its refusals, its settings, its verdicts and its document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import command, needs
from benchmarks.gpu.kill import ROUTER_SHARE, args
from benchmarks.gpu.models import SMALL
from benchmarks.gpu.part import parts_of
from benchmarks.gpu.parts import Outcome
from benchmarks.gpu.report import NOT_MEASURED, document, verdicts_of
from benchmarks.gpu.settings import Settings
from router.config.deployment import parse_args
from router.ops.doctor import probe
from tests.gpu.conftest import pytest_configure

ROOT = Path(__file__).parents[4]
SETTINGS = Settings("test-")


def test_without_an_accelerator_there_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), "results"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert "finds no accelerator" in line
    assert list(tmp_path.iterdir()) == []


def test_the_devices_own_tests_refuse_to_run_without_one() -> None:
    with pytest.raises(pytest.UsageError, match="needs an accelerator") as caught:
        pytest_configure(None)
    assert "\n" not in str(caught.value)


def test_the_parts_end_within_ten_minutes_and_the_promised_figures_come_first() -> None:
    parts = parts_of(SETTINGS)
    assert [part.name for part in parts] == ["parity", "model-2", "kill", "model-1", "model-0"]
    promised_s = command.CARD_LIMIT_S + sum(part.limit_s for part in parts[:3])
    assert promised_s < 590


@pytest.mark.parametrize("actors", [2, 3, 7])
def test_router_and_actors_fit_one_card(actors: int) -> None:
    settings = replace(SETTINGS, kill_actors=actors)
    config = parse_args(args(settings))
    [pool] = config.experts.all_pools()
    assert pool.num_gpus > 0
    assert config.router.num_gpus == ROUTER_SHARE > 0
    assert pool.actors * pool.num_gpus + config.router.num_gpus <= 1
    on_host = parse_args(args(replace(settings, device="cpu")))
    assert on_host.router.num_gpus == on_host.experts.all_pools()[0].num_gpus == 0


def window(name: str, failures: dict[str, int], back_s: float | None) -> dict[str, Any]:
    return {
        "name": name, "seconds": 20.0, "tokens_per_s": 1000.0,
        "gap_s": {"p50": 0.01, "p99": 0.02, "longest": 0.5},
        "longest_first_s": 0.25, "back_s": back_s, "requests": 50, "failures": failures,
    }  # fmt: skip


def parity_of(family: str, attention: str, may_read_pages: bool) -> dict[str, Any]:
    return {
        "family": family, "tokens": 24, "equal_tokens": 24, "distance": 0.04,
        "oracle_distance": 0.03, "most_distance": 0.08, "is_kept": True,
        "attention": attention, "may_read_pages": may_read_pages,
    }  # fmt: skip


def results(
    ratio: float = 0.95,
    memory_ratio: float = 0.8,
    attention: str = "varlen",
    kernel_class: str = "A Card grouped",
    **failures: int,
) -> dict[str, Any]:
    """The results of all parts, by their names."""
    memory = {"peak_bytes": 10**9, "reserved_bytes": 11 * 10**8, "held_bytes": 8 * 10**8,
              "planned_bytes": 1250 * 10**6, "ratio": memory_ratio}  # fmt: skip
    run = {
        "streams": {n: {"tokens_per_s": 2000.0 * ratio} for n in ("32", "1")},
        "memory": {"router": memory},
        "attention": attention,
        "kernel_classes": [kernel_class],
    }
    model = {
        "config": SMALL,
        "parameters": 111_000_000,
        "size": "all 8 layers",
        "transformers": {n: {"tokens_per_s": 2000.0} for n in ("32", "1")},
        "actors": dict.fromkeys(("1", "2"), run),
        "ratio": {n: {"32": ratio, "1": 0.5} for n in ("1", "2")},
    }
    windows = [
        window("no fault", {}, None),
        window("kill of an actor with copies elsewhere", failures, 3.0),
    ]
    return {
        "card": {
            "device": "cuda", "name": "A Card", "driver": "nvidia 1.2", "toolkit": "cuda 13.0",
            "free_bytes": 70 * 10**9, "total_bytes": 80 * 10**9, "native": True,
            "has_grouped_kernel": True, "machine": {"torch": "2.13"},
        },
        "parity": [parity_of("mixtral", attention, True), parity_of("gpt_oss", "gathered", False)],
        "kill": {"actors": 3, "devices": ["cuda"], "windows": windows},
        "model-0": {**model, "model": "111M", "is_largest": False},
        "model-1": {**model, "model": "445M", "is_largest": False},
        "model-2": {**model, "model": "6.7B", "is_largest": True},
    }  # fmt: skip


def test_missing_packages_and_other_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs.packages_refusal() == ""
    real = needs.version

    def version(name: str) -> str:
        if name in ("blake3", "ray"):
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(needs, "version", version)
    line = needs.refusal()
    assert line.startswith("packages are missing: pip install ")
    assert ["'ray[serve]" in line, "'blake3>=" in line, "torch" in line] == [True, True, False]
    monkeypatch.undo()
    monkeypatch.setattr(probe, "_version", lambda name: "0.1")
    line += needs.packages_refusal()
    assert "torch is 0.1; needed: >=" in line
    assert "\n" not in line


def test_the_exit_status_is_0_where_all_is_kept_and_nothing_begins_without_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, begun = results(), []

    def run_all(parts: Any, *arguments: Any) -> list[Outcome]:
        begun.extend(part.name for part in parts)
        return [
            Outcome(part.name, "ok", 1.0, "", found[part.name])
            if part.name in found
            else Outcome(part.name, "failed", 1.0, "no device")
            for part in parts
        ]

    def run(folder: Path) -> int:
        return command.run(SETTINGS, folder, time.monotonic() + 60)

    monkeypatch.setattr(command, "run_all", run_all)
    assert run(tmp_path) == 0
    assert Settings.load(tmp_path) == replace(SETTINGS, device_bytes=70 * 10**9)
    found["model-2"]["ratio"]["1"]["32"] = 0.8
    assert run(tmp_path) == 1
    del found["card"]
    begun.clear()
    assert run(tmp_path / "made") == 1
    assert begun == ["card"]
    assert NOT_MEASURED in capsys.readouterr().out
    assert json.loads((tmp_path / "made" / "results.json").read_text())["models"] == []
    assert (tmp_path / "made" / "results.md").exists()


def of(found: dict[str, Any]) -> dict[str, Any]:
    outcomes = [
        Outcome(name, "failed" if one is None else "ok", 3.0, "", one)
        for name, one in found.items()
    ]
    return json.loads(json.dumps(command.result_of(SETTINGS, outcomes)))


def test_the_promised_figures_are_kept_or_missed() -> None:
    assert [one.is_kept for one in verdicts_of(of(results()))] == [True] * 7
    missed = verdicts_of(of(results(ratio=0.89, **{"wrong": 1})))
    kept = [True, True, True, False, True, True, False]
    assert [one.is_kept for one in missed] == kept
    assert [missed[i].measured for i in (3, 6)] == ["0.89", "1 of 100"]
    uneven = results()
    uneven["parity"][0] |= {"equal_tokens": 23, "distance": 0.09}
    assert [one.is_kept for one in verdicts_of(of(uneven))][:2] == [False, False]


def test_a_fall_back_on_the_card_is_no_promise_kept() -> None:
    slow = results(memory_ratio=1.25, attention="gathered", kernel_class="A Card looped")
    *_, attention, _, memory, ways, _ = verdicts_of(of(slow))
    assert [attention.is_kept, memory.is_kept, ways.is_kept] == [False] * 3
    measured = attention.measured, memory.measured, ways.measured
    assert measured[:2] == ("0 of 1", "1.25")
    assert measured[2] == "; ".join(["gathered, A Card looped"] * 2)


def test_a_card_without_a_kernel_for_grouped_products_is_not_promised_them() -> None:
    for slow, kept in (
        ({"kernel_class": "A Card looped"}, True),
        ({"attention": "gathered"}, False),
    ):
        found = results(**slow)
        assert not verdicts_of(of(found))[-2].is_kept
        found["card"]["has_grouped_kernel"] = False
        assert verdicts_of(of(found))[-2].is_kept is kept


def test_what_was_not_measured_is_not_kept() -> None:
    found = dict.fromkeys(results())
    found["card"] = results()["card"]
    verdicts = verdicts_of(of(found))
    assert {one.measured for one in verdicts} == {NOT_MEASURED}
    assert not any(one.is_kept for one in verdicts)
    assert "| kill | failed | 3 |" in document(of(found))
    assert "unknown card" in document(of(dict.fromkeys(found)))


def test_the_document_has_card_versions_and_all_tables() -> None:
    text = document(of(results()))
    assert text.startswith("# On A Card\n")
    for part in (
        "A Card (cuda; 80 GB, 70 free), driver nvidia 1.2, cuda 13.0; torch 2.13; native code",
        "| Model | Streams | transformers | ExpertMesh, 1 actor process | "
        "ExpertMesh, 2 actor processes |",
        "| 6.7B | 32 | 2000 | 1900 (0.95) | 1900 (0.95) |",
        "- 111M: hidden 512, experts 8 of 1,024, vocabulary 4,096; all 8 layers.",
        "| 1 | router | 1.00 | 1.10 | 0.80 | 1.25 | 0.80 |",
        "| kill of an actor with copies elsewhere | 20 | 1000 | 0.010 | 0.020 | 0.500 | 0.25 | 3.0 "
        "| 50 | 0 |",
        "| mixtral | 24 of 24 | 0.0400 | 0.0300 | 0.0800 | varlen |",
    ):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
