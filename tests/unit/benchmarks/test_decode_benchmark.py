"""The benchmark of decoding: limits, the bound from them, ratios, and what a run prints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from benchmarks import avx2, bound, decode, decode_report, engine, limits
from benchmarks.bound import Weights, shares, tokens_per_s, touched, weights_of
from benchmarks.limits import Limits
from benchmarks.peers.ask import PeerFailedError
from benchmarks.peers.side import Task
from benchmarks.synthetic import MIXTRAL, shapes_of

SMALL = Weights(layers=2, dense=1000, expert=500, num_experts=4, num_experts_per_tok=2)
FAST = {"float32": 1e12, "bfloat16": 1e12}


def test_experts_of_a_token_are_spread_over_actors_by_chance() -> None:
    found = dict(shares((4, 4), 2))
    assert found == pytest.approx({(2, 0): 6 / 28, (1, 1): 16 / 28, (0, 2): 6 / 28})
    assert sum(dict(shares((3, 3, 2), 3)).values()) == pytest.approx(1)
    assert dict(shares((2, 1), 3)) == {(2, 1): 1.0}


def test_one_stream_is_bound_by_reading() -> None:
    machine = Limits(2, 1000.0, 1500.0, FAST, 0.5)
    # Dense: 4,000 bytes at 1,000/s. Experts: in 1 of 3 cases both are one actor's, 4,000 bytes at
    # 1,000/s; else each of two actors reads 2,000 bytes at 750/s.
    step_s = 4 + 2 * (4 / 3 + 2 / 3 * 2000 / 750 + 0.5)
    assert tokens_per_s(SMALL, machine, 2, 1, "float32") == pytest.approx(1 / step_s)
    halved_s = (step_s - 1) / 2 + 1
    assert tokens_per_s(SMALL, machine, 2, 1, "bfloat16") == pytest.approx(1 / halved_s)


def test_many_streams_are_bound_by_arithmetic() -> None:
    machine = Limits(2, 1e12, 1e12, {"float32": 1000.0, "bfloat16": 10.0}, 0.5)
    # Dense: 4 rows x 2 x 1,000 at 1,000/s on one thread. A layer's experts: 4 rows x 2 experts x
    # 2 x 500 at 2,000/s on two threads.
    step_s = 8 + 2 * (4 + 0.5)
    assert tokens_per_s(SMALL, machine, 2, 4, "float32") == pytest.approx(4 / step_s)
    assert tokens_per_s(SMALL, machine, 2, 4, "bfloat16") == pytest.approx(4 / step_s)
    faster = Limits(2, 1e12, 1e12, {"float32": 1000.0, "bfloat16": 4000.0}, 0.5)
    assert tokens_per_s(SMALL, faster, 2, 4, "bfloat16") == pytest.approx(4 / (2 + 2 * (1 + 0.5)))


def test_one_core_is_shared_by_all_actors() -> None:
    machine = Limits(1, 1000.0, 1000.0, FAST, 0.0)
    assert tokens_per_s(SMALL, machine, 1, 1, "float32") == pytest.approx(1 / (4 + 2 * 4))


def test_more_tokens_touch_more_experts() -> None:
    assert touched(8, 2, 1) == pytest.approx(2)
    assert touched(8, 2, 2) == pytest.approx(3.5)
    assert touched(8, 2, 100) == pytest.approx(8)


@pytest.mark.parametrize("size", list(decode.MODELS))
def test_weights_are_those_of_the_checkpoint(size: str) -> None:
    sizes = decode.MODELS[size]
    weights = weights_of(sizes)
    embedding = sizes["vocab_size"] * sizes["hidden_size"]
    experts = weights.layers * weights.num_experts * weights.expert
    total = sum(map(prod, shapes_of({**MIXTRAL, **sizes}).values()))
    assert weights.dense + embedding + experts == total
    assert f"{total / 1e6:.0f}M" == size
    if size == "111M":
        assert weights.of_a_token / 1e6 == pytest.approx(33.6, abs=0.05)


def test_the_best_of_each_limit_counts() -> None:
    first = Limits(2, 10.0, 12.0, {"float32": 5.0, "bfloat16": 9.0}, 0.2)
    second = Limits(2, 9.0, 15.0, {"float32": 6.0, "bfloat16": 8.0}, 0.3)
    best = limits.best([first, second])
    assert best == Limits(2, 10.0, 15.0, {"float32": 6.0, "bfloat16": 9.0}, 0.2)


@pytest.mark.parametrize(
    ("cpu_info", "found"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 fma avx512f\n", ["avx2", "avx512f"]),
        ("Features : fp asimd bf16\n", ["asimd", "bf16"]),
        ("", []),
    ],
)
def test_a_processors_instructions_are_those_that_linux_lists(
    cpu_info: str, found: list[str]
) -> None:
    assert limits.instructions(cpu_info) == found


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(limits, "TRIALS", 1)
    monkeypatch.setattr(limits, "TRIAL_S", 0.001)
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "HOPS", 5)
    found = limits.run(1024)
    assert found.one_thread_bytes_per_s > 0
    assert found.all_threads_bytes_per_s > 0
    assert set(found.flop_per_s) == set(bound.VALUE_BYTES)
    assert min(found.flop_per_s.values()) > 0
    assert 0 < found.hop_s < 1


def test_a_call_takes_as_long_as_in_its_best_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    durations_s = iter([9.0] + [1 / 16] * 2 + [1 / 32] * 4 + [1 / 4] * 99)

    def do() -> None:
        nonlocal now_s
        now_s += next(durations_s)

    monkeypatch.setattr(limits, "TRIAL_S", 1 / 8)
    monkeypatch.setattr(limits.time, "perf_counter", lambda: now_s)
    assert limits.best_s(do) == 1 / 32


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
        monkeypatch.setattr(limits, "measure", lambda row_bytes: Limits(2, 1e10, 2e10, FAST, 1e-5))
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
        _, streams, tokens, _, _ = arguments
        speed = self.speeds.get(options["dtype"], 1.0)
        times = {"p50_ms": 1.0, "p99_ms": 2.0}
        first = int(options["dtype"] == "bfloat16")
        return {
            "streams": {
                n: figures_of(speed * int(n), int(n), tokens, first)
                | {"step": times, "layer": times, "calls": {"stream": 3}}
                for n in streams
            },
            "prefill_s": {str(n): [200 / speed] for n in options["prefill"]},
            "memory": {"router": {"rss_mb": 500.0, "weights_mb": 100.0, "beyond_mb": 400.0}},
        }


@pytest.fixture
def machine_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], Machine]:
    return lambda speeds: Machine(monkeypatch, speeds)


def peers_folder(folder: Path) -> Path:
    for name in ("vllm", "llama.cpp"):
        (folder / name / "bin").mkdir(parents=True)
        (folder / name / "bin" / "python").touch()
    return folder


def test_ours_stand_beside_the_best_peer_in_as_many_bits(
    tmp_path: Path,
    machine_of: Callable[[dict[str, float]], Machine],
    capsys: pytest.CaptureFixture[str],
) -> None:
    speeds = {"float32": 30.0, "bfloat16": 40.0, "vllm_cpu fp32": 60.0, "llama_cpp F16": 20.0}
    machine = machine_of({**speeds, "llama_cpp Q8_0": 99.0, "hf_transformers bf16 eager": 10.0})
    file = tmp_path / "result.json"
    folder = str(peers_folder(tmp_path / "peers"))
    words = ["--peers", folder, "--prefill", "--passes", "2", "--json", str(file)]
    assert decode.main(words) == 0
    assert len(machine.asked) == 2 * (4 + 2 + 4)
    assert {len(task.long_prompts) for task in machine.asked} == {0, 3}
    result = json.loads(file.read_text())
    in_32, in_16 = (result["cluster"][dtype]["auto"] for dtype in ("float32", "bfloat16"))
    assert in_32["streams"]["32"]["best_peer"] == "vllm fp32"
    assert in_32["streams"]["32"]["ratio"] == 0.5
    assert in_16["streams"]["1"]["best_peer"] == "llama.cpp F16"
    assert in_16["streams"]["1"]["ratio"] == 2.0
    assert in_16["prefill_ratio"] == dict.fromkeys(("512", "2048", "4000"), 10 / 5)
    assert in_32["streams"]["1"]["of_bound"] == 30 / result["bounds"]["float32"]["1"]
    assert result["peers"]["vllm"]["fp32"]["streams"]["32"]["same_tokens"] == 1
    assert in_16["streams"]["32"]["same_tokens"] == 0
    assert "tokens" not in in_32["streams"]["32"]
    assert result["compare"]["float32, auto, 32 streams, ratio to the best peer"] == {
        "value": 0.5,
        "better": "higher",
    }
    printed = capsys.readouterr().out
    assert "Not installed: ik_llama.cpp (pip install ik-llama-cpp-python)." in printed
    assert "prefill" in printed


def test_a_peer_that_fails_is_left_out_and_the_exit_status_says_so(
    tmp_path: Path,
    machine_of: Callable[[dict[str, float]], Machine],
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = machine_of({"llama_cpp BF16": 0.0})
    words = ["--peers", str(peers_folder(tmp_path / "peers")), "--passes", "2"]
    words += ["--json", str(tmp_path / "result.json")]
    assert decode.main(words) == 1
    assert "FAILED: llama.cpp BF16: an illegal instruction" in capsys.readouterr().out
    assert [task.format for task in machine.asked].count("BF16") == 1
    peers = json.loads((tmp_path / "result.json").read_text())["peers"]
    assert set(peers["llama.cpp"]) == {"F32", "F16", "Q8_0"}


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
    monkeypatch: pytest.MonkeyPatch, machine_of: Callable[[dict[str, float]], Machine]
) -> None:
    machine_of({"hf_transformers bf16 eager": 1.0})
    monkeypatch.setattr(avx2, "KERNELS", avx2.KERNEL)
    for name in avx2.ENVIRONMENT:
        monkeypatch.setenv(name, "")  # put back at the end
    assert decode.main(["--avx2"]) == 0
    assert {name: os.environ[name] for name in avx2.ENVIRONMENT} == avx2.ENVIRONMENT
