"""What an accelerator does while a process runs, by torch's profiler, on the host's own clock.

The profiler knows each kernel and each copy, whoever starts them, so that nothing of the product is
marked for it.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timeline import KERNELS, TO_DEVICE, TO_HOST, Recorded

TIMEOUT_S = 60.0
_COPIES = {TO_HOST: ("DtoH", "D2H", "D2M"), TO_DEVICE: ("HtoD", "H2D", "M2D")}
"""How CUDA, ROCm and XPU name copies; a copy on the device counts as a kernel."""
_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")


def device_spans(trace: Mapping[str, Any], clock_s: float) -> list[Recorded]:
    """Return the device's spans of a Chrome trace of torch's profiler.

    ``clock_s`` is what the clock of the day says beyond ``time.perf_counter``.
    """
    base_s = trace.get("baseTimeNanoseconds", 0) / 1e9 - clock_s
    spans = []
    for event in trace["traceEvents"]:
        if event.get("ph") != "X" or event.get("cat") not in _CATEGORIES:
            continue
        start_s = base_s + event["ts"] / 1e6
        spans.append((_kind(event["name"]), start_s, start_s + event["dur"] / 1e6))
    return spans


def _kind(name: str) -> str:
    for kind, parts in _COPIES.items():
        if name.startswith("Memcpy") and any(part in name for part in parts):
            return kind
    return KERNELS


def busy_s(spans: Sequence[Recorded], name: str, start_s: float, end_s: float) -> float:
    """Return how long there was a span of this name between two times; overlaps count once."""
    total_s, until_s = 0.0, start_s
    for begin_s, ended_s in sorted((b, e) for n, b, e in spans if n == name):
        begin_s, ended_s = max(begin_s, until_s), min(ended_s, end_s)
        if ended_s > begin_s:
            total_s += ended_s - begin_s
            until_s = ended_s
    return total_s


class DeviceRecorder:
    """Records this process's device from :meth:`begin` to :meth:`end`, on a thread of its own.

    torch's profiler must end on the thread where it began; the two methods are called from any.
    """

    def __init__(self) -> None:
        """Record nothing yet."""
        self._ready = threading.Event()
        self._over = threading.Event()
        self._spans: list[Recorded] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="profiler", daemon=True)

    def begin(self) -> None:
        """Return once the profiler records; raises what it raised."""
        self._thread.start()
        if not self._ready.wait(TIMEOUT_S):
            raise TimeoutError(f"torch's profiler did not begin within {TIMEOUT_S:g} s")
        if self._error is not None:
            raise self._error

    def end(self) -> list[Recorded]:
        """Return the device's spans since :meth:`begin`; none of a process without a device."""
        self._over.set()
        self._thread.join(TIMEOUT_S)
        if self._thread.is_alive():
            raise TimeoutError(f"torch's profiler did not end within {TIMEOUT_S:g} s")
        if self._error is not None:
            raise self._error
        return self._spans

    def _run(self) -> None:
        try:
            self._record()
        except Exception as error:  # raised by the caller's method
            self._error = error
        finally:
            self._ready.set()

    def _record(self) -> None:
        if not torch.accelerator.is_available():
            self._ready.set()
            self._over.wait()
            return
        activities = torch.profiler.supported_activities() - {torch.profiler.ProfilerActivity.CPU}
        if not activities:
            raise RuntimeError(f"the profiler of torch {torch.__version__} records no device")
        with torch.profiler.profile(activities=sorted(activities, key=str)) as profiler:
            self._ready.set()
            self._over.wait()
            torch.accelerator.synchronize()
        clock_s = time.time() - time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "trace.json"
            profiler.export_chrome_trace(str(file))
            self._spans = device_spans(json.loads(file.read_text(encoding="utf-8")), clock_s)
