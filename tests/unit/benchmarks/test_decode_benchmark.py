"""The benchmark of decoding: limits, the bound from them, ratios, and what a run prints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import avx2, decode, decode_report, engine
from benchmarks.peers.ask import PeerFailedError
from benchmarks.peers.side import Task


def test_medians_are_over_all_passes() -> None:
    def taken(rates: list[float], time_s: float, step: int) -> dict[str, Any]:
        streams = {"1": {"rates": rates, "step": step}}
        return {"streams": streams, "prefill_s": {"512": [time_s]}, "bits": 16}

    merged = decode_report.merged([taken([1, 2], 3.0, 1), taken([9], 5.0, 2)])
    assert merged["streams"]["1"] == {"rates": [1, 2, 9], "step": 2, "tokens_per_s": 2}
    assert merged["prefill_s"] == {"512": 4.0}
    assert merged["bits"] == 16


def test_tokens_are_compared_place_by_place() -> None:
    assert decode_report.same_tokens([[1, 2], [3, 4]], [[1, 2], [3, 4]]) == 1
    assert decode_report.same_tokens([[1, 2], [3, 5]], [[1, 2], [3, 4]]) == 0.75
    with pytest.raises(ValueError, match="longer"):
        decode_report.same_tokens([[1]], [[1, 2]])


def figures_of(tokens_per_s: float, count: int, tokens: int, first: int = 0) -> dict[str, Any]:
    return {"rates": [tokens_per_s], "tokens": [list(range(first, first + tokens))] * count}


class Machine:
    """Takes the place of all that measures: sides have the speed that they are said to have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speeds: dict[str, float]) -> None:
        self.speeds = speeds
        self.asked: list[Task] = []
        monkeypatch.setattr(engine, "measure", self.engine)
        monkeypatch.setattr(decode, "ask", self.ask)
        monkeypatch.setattr(decode, "make_checkpoint", lambda folder, sizes: None)
        monkeypatch.setattr(decode, "write_gguf", self.write)

    def write(self, folder: Path, file: Path, kind: str, architecture: str) -> None:
        file.write_text(f"{kind} {architecture}")

    def ask(self, python: str, module: str, task: Task) -> dict[str, Any]:
        self.asked.append(task)
        speed = self.speeds.get(f"{module.rpartition('.')[2]} {task.format}", 1.0)
        if speed == 0:
            raise PeerFailedError("an illegal instruction")
        if task.model.endswith(".gguf"):
            assert Path(task.model).read_text().startswith(task.format)
        streams = {str(n): figures_of(speed * n, n, task.tokens) for n in task.streams}
        prefill_s = {str(len(ids)): [100 / speed] for ids in task.long_prompts}
        return {"version": "1", "threads": 2, "streams": streams, "prefill_s": prefill_s}

    def engine(self, folder: Path, transport: str, *arguments: Any, **options: Any) -> Any:
        _, streams, tokens, _ = arguments
        speed = self.speeds.get(options["dtype"], 1.0)
        first = int(options["dtype"] == "bfloat16")
        times = {"p50_ms": 1.0, "p99_ms": 2.0}
        beside = {"step": times, "layer": times, "calls": {"stream": 3}}
        return {
            "streams": {
                n: figures_of(speed * int(n), int(n), tokens, first) | beside for n in streams
            },
            "prefill_s": {str(n): [200 / speed] for n in options["prefill"]},
            "memory": {"router": {"rss_mb": 500.0, "weights_mb": 100.0, "beyond_mb": 400.0}},
        }


MachineOf = Callable[[dict[str, float]], Machine]


@pytest.fixture
def machine_of(monkeypatch: pytest.MonkeyPatch) -> MachineOf:
    return lambda speeds: Machine(monkeypatch, speeds)


def peers_folder(folder: Path) -> Path:
    for name in ("vllm", "llama.cpp"):
        (folder / name / "bin").mkdir(parents=True)
        (folder / name / "bin" / "python").touch()
    return folder


def test_ours_stand_beside_the_best_peer_in_as_many_bits(
    tmp_path: Path, machine_of: MachineOf, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds = {"float32": 30.0, "bfloat16": 40.0, "vllm_cpu fp32": 60.0, "llama_cpp F16": 20.0}
    machine = machine_of({**speeds, "llama_cpp Q8_0": 99.0, "hf_transformers bf16 eager": 10.0})
    file = tmp_path / "result.json"
    folder = str(peers_folder(tmp_path / "peers"))
    assert decode.main(["--peers", folder, "--prefill", "--passes", "2", "--json", str(file)]) == 0
    assert len(machine.asked) == 2 * (4 + 2 + 4)
    assert {len(task.long_prompts) for task in machine.asked} == {0, 3}
    sides = {(s["program"], s["format"]): s for s in json.loads(file.read_text())["sides"]}
    in_32, in_16 = (sides["ExpertMesh, auto", dtype] for dtype in ("float32", "bfloat16"))
    of_32, of_16 = in_32["streams"]["32"], in_16["streams"]["1"]
    assert (of_32["best_peer"], of_32["ratio"]) == ("vllm fp32", 0.5)
    assert (of_16["best_peer"], of_16["ratio"]) == ("llama.cpp F16", 2.0)
    assert in_16["prefill_ratio"] == dict.fromkeys(("512", "2048", "4000"), 10 / 5)
    assert sides["vllm", "fp32"]["streams"]["32"]["same_tokens"] == 1
    assert in_16["streams"]["32"]["same_tokens"] == 0
    assert "tokens" not in of_32
    printed = capsys.readouterr().out
    assert "Not installed: ik_llama.cpp (pip install ik-llama-cpp-python)." in printed
    assert "prefill" in printed


def test_a_peer_that_fails_is_left_out_and_the_exit_status_says_so(
    tmp_path: Path, machine_of: MachineOf, capsys: pytest.CaptureFixture[str]
) -> None:
    machine, file = machine_of({"llama_cpp BF16": 0.0}), tmp_path / "result.json"
    folder = str(peers_folder(tmp_path / "peers"))
    assert decode.main(["--peers", folder, "--passes", "2", "--json", str(file)]) == 1
    assert "FAILED: llama.cpp BF16: an illegal instruction" in capsys.readouterr().out
    assert [task.format for task in machine.asked].count("BF16") == 1
    sides = json.loads(file.read_text())["sides"]
    formats = {one["format"] for one in sides if one["program"] == "llama.cpp"}
    assert formats == {"F32", "F16", "Q8_0"}


def test_a_folder_without_peers_ends_the_run_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        decode.main(["--peers", str(tmp_path / "nowhere")])
    assert "is no folder" in capsys.readouterr().err


def test_avx2_alone_is_refused_where_native_code_uses_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = (("avx512", "fused", "fused"), *avx2.KERNEL)
    monkeypatch.setattr(avx2, "KERNELS", wide)
    with pytest.raises(SystemExit, match="2"):
        decode.main(["--avx2"])
    told = " ".join(capsys.readouterr().err.split())
    assert "the native code here has avx512, avx2; install it with CFLAGS=-DWITHOUT_AVX512" in told


def test_avx2_alone_is_asked_of_torch_and_its_libraries(
    monkeypatch: pytest.MonkeyPatch, machine_of: MachineOf
) -> None:
    machine_of({"hf_transformers bf16 eager": 1.0})
    monkeypatch.setattr(avx2, "KERNELS", avx2.KERNEL)
    for name in avx2.ENVIRONMENT:
        monkeypatch.setenv(name, "")  # put back at the end
    assert decode.main(["--avx2"]) == 0
    assert {name: os.environ[name] for name in avx2.ENVIRONMENT} == avx2.ENVIRONMENT
