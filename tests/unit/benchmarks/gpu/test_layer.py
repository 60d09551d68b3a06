"""What becomes of a profiler's trace, and the time of a layer beyond its products."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.gpu import device_trace
from benchmarks.gpu.device_trace import DeviceRecorder, busy_s, device_spans
from benchmarks.gpu.layer import LayerTimes, beyond_products
from benchmarks.timeline import DEVICE, KERNELS, ROUTER, TO_DEVICE, TO_HOST, write_trace
from cluster.device import CPU
from tests.checkpoints import save_mixtral
from tests.emulated_device import emulated_device
from tests.local_cluster import LocalCluster, greedy_request


def event(category: str, name: str, ts: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur}


def test_kernels_and_copies_come_from_the_profilers_trace_on_the_hosts_clock() -> None:
    trace = {
        "baseTimeNanoseconds": 1_700_000_000_000_000_000,
        "traceEvents": [
            {"ph": "M", "name": "process_name"},
            event("cuda_runtime", "cudaMemcpyAsync", 0.0, 5.0),
            event("kernel", "void gemm()", 10.0, 5.0),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 20.0, 2.0),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 30.0, 3.0),
            event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 40.0, 1.0),
            event("gpu_memcpy", "Memcpy M2D(MEMORY -> DEVICE)", 50.0, 1.0),
            event("gpu_memset", "Memset (Device)", 60.0, 1.0),
            event("cpu_op", "aten::mm", 10.0, 5.0),
        ],
    }
    spans = device_spans(trace, clock_s=1_699_999_900.0)
    assert [span[0] for span in spans] == [KERNELS, TO_HOST, TO_DEVICE, KERNELS, TO_DEVICE, KERNELS]
    assert spans[0][1:] == pytest.approx((100.00001, 100.000015), abs=1e-6)


def test_the_profilers_clock_is_that_of_the_day(tmp_path: Path) -> None:
    before_s = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(8, 8) @ torch.ones(8, 8)
    after_s = time.perf_counter()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    for one in trace["traceEvents"]:  # as if the host's operations were a device's
        one["cat"] = "kernel" if one.get("cat") == "cpu_op" else ""
    spans = device_spans(trace, time.time() - time.perf_counter())
    assert spans
    for _, start_s, end_s in spans:
        assert before_s - 0.001 <= start_s <= end_s <= after_s + 0.001


def test_busy_time_counts_overlaps_once_and_ends_at_the_window() -> None:
    spans = [("k", 0.0, 2.0), ("k", 1.0, 3.0), ("x", 3.0, 4.0), ("k", 5.0, 9.0), ("k", 5.5, 6.0)]
    assert busy_s(spans, "k", 0.5, 7.0) == pytest.approx(2.5 + 2.0)
    assert busy_s(spans, "k", 3.0, 5.0) == 0.0


def test_a_layer_is_its_time_without_the_slowest_actors_products() -> None:
    layers = [(0.0, 0.010), (1.0, 1.020), (2.0, 2.030)]
    actors = {
        "a": [(KERNELS, at + 0.002, at + 0.004) for at, _ in layers],
        "b": [(KERNELS, at + 0.002, at + 0.008) for at, _ in layers] + [(TO_HOST, 0.0, 9.0)],
    }
    assert beyond_products(layers, actors, KERNELS) == {
        "layers": 3,
        "layer_ms": pytest.approx(20.0),
        "products_ms": pytest.approx(6.0),
        "beyond_ms": pytest.approx(14.0),
    }


def test_products_that_were_not_recorded_are_not_taken_for_none() -> None:
    late = {"a": [(KERNELS, 5.0, 6.0)]}
    for actors in (late, {"a": []}, {"a": [(TO_HOST, 0.0, 1.0)]}):
        with pytest.raises(ValueError, match="none of 1 layers has a span called 'kernels'"):
            beyond_products([(0.0, 1.0)], actors, KERNELS)


def test_each_layer_is_timed_with_an_idle_device_at_both_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_mixtral(tmp_path)
    with emulated_device() as device:
        cluster = LocalCluster(tmp_path, device=device.device, experts_device=device.device)
        waits = []
        synchronize = torch.accelerator.synchronize

        def counted(*where: Any) -> None:
            waits.append(where)
            synchronize(*where)

        monkeypatch.setattr(torch.accelerator, "synchronize", counted)
        with LayerTimes(device.device) as times:
            cluster.generate(greedy_request("r", [5, 9, 7], 4))
        steps, num_layers = 4, len(cluster.checkpoint.shape.layers)
        assert len(times.layers) == steps * num_layers
        assert waits == [(device.device,)] * (2 * steps * num_layers)
        instants = [instant for layer in times.layers for instant in layer]
        assert instants == sorted(instants)
        cluster.generate(greedy_request("after", [5, 9, 7], 1))
        cluster.close()
    assert len(times.layers) == steps * num_layers


def test_a_layer_on_the_host_begins_with_its_own_choice(tmp_path: Path) -> None:
    save_mixtral(tmp_path)
    cluster = LocalCluster(tmp_path)
    began_at_s = time.perf_counter()
    with LayerTimes(CPU) as times:
        cluster.generate(greedy_request("r", [5, 9, 7], 4))
    cluster.close()
    instants = [instant for layer in times.layers for instant in layer]
    assert instants == sorted(instants)
    assert began_at_s < instants[0]


def test_a_process_without_a_device_records_nothing() -> None:
    recorder = DeviceRecorder()
    recorder.begin()
    assert recorder.end() == []


def test_a_profiler_that_fails_is_an_error_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="records no device"):
        DeviceRecorder().begin()
    monkeypatch.setattr(device_trace, "TIMEOUT_S", 0.01)
    monkeypatch.setattr(DeviceRecorder, "_record", lambda self: self._over.wait())
    with pytest.raises(TimeoutError, match="did not begin"):
        DeviceRecorder().begin()


def test_the_picture_has_a_lane_for_each_device(tmp_path: Path) -> None:
    recorded: dict[str, list[tuple[str, float, float]]] = {
        ROUTER: [
            ("step", 0.0, 0.010),
            ("layer", 0.002, 0.008),
            ("wait", 0.003, 0.007),
        ],
        f"{ROUTER}{DEVICE}": [(KERNELS, 0.0, 0.002), (TO_HOST, 0.002, 0.0025)],
        "actor-0": [("products", 0.004, 0.006)],
        f"actor-0{DEVICE}": [(TO_DEVICE, 0.004, 0.0045), (KERNELS, 0.0045, 0.006)],
    }
    file = tmp_path / "timeline.json"
    write_trace(recorded, file)
    trace = json.loads(file.read_text())
    threads = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert threads == {"engine", "stream", "device"}
    root = ElementTree.fromstring(file.with_suffix(".svg").read_text())
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    lanes = [ROUTER, f"{ROUTER}{DEVICE}", "actor-0", f"actor-0{DEVICE}"]
    assert [text for text in texts if text in lanes] == lanes
    for name in (KERNELS, TO_HOST, TO_DEVICE):
        assert any(text.startswith(f"{name} (") for text in texts if text)
