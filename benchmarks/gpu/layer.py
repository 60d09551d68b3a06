"""One layer's dispatch and combine on a device: its time beyond the products, and its picture.

The time is taken in a round in which the device is idle when a layer begins and when it has ended,
so that no other work of the router hides in it or beside it. It has everything between the gate's
choice on the device and the experts' weighted sums there: the copies of both processes, frames,
sockets, and the products. The picture is of another round, as it runs without those waits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from benchmarks.gpu.device_trace import DeviceRecorder, busy_s
from benchmarks.timeline import DEVICE, KERNELS, ROUTER, Recorded, write_trace
from router.model.cpu.native_layer import NativeGate
from router.model.decoder import MixtureFeedForward
from router.moe.gate import Gate

if TYPE_CHECKING:
    from benchmarks.engine import Bench

PRODUCTS = "products"
"""The span of an actor's products on the host."""


class LayerTimes:
    """The time of each MoE layer while the context is open, the device idle at both its ends."""

    def __init__(self, device: torch.device) -> None:
        """Time the layers of models on ``device``."""
        self._device = device
        self._began_at_s = 0.0
        self.layers: list[tuple[float, float]] = []
        """Start and end (``time.perf_counter``)."""

    def __enter__(self) -> LayerTimes:
        """Begin."""
        finish = MixtureFeedForward.finish

        def timed_finish(half: MixtureFeedForward, begun: Any) -> torch.Tensor:
            output = finish(half, begun)
            self.layers.append((self._began_at_s, self._idle_at_s()))
            return output

        self._patches = ExitStack()
        for gate, name in ((Gate, "choose_by"), (NativeGate, "choice")):  # on a device, on a CPU
            timed = self._timed(getattr(gate, name))
            self._patches.enter_context(mock.patch.object(gate, name, timed))
        self._patches.enter_context(mock.patch.object(MixtureFeedForward, "finish", timed_finish))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """End."""
        self._patches.close()

    def _timed(self, choose: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method of a gate that notes when its choice is there."""

        def timed(gate: Gate, *arguments: Any, **options: Any) -> Any:
            chosen = choose(gate, *arguments, **options)
            self._began_at_s = self._idle_at_s()
            return chosen

        return timed

    def _idle_at_s(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


def beyond_products(
    layers: Sequence[tuple[float, float]], actors: Mapping[str, Sequence[Recorded]], name: str
) -> dict[str, float]:
    """Return medians of layers in milliseconds: whole, of the slowest actor's products, the rest.

    ``actors`` have spans, among which those called ``name`` are products. Raises ``ValueError``
    where no layer has one: the clocks of the spans differ, or nothing was recorded.
    """
    whole_s, products_s = [], []
    for start_s, end_s in layers:
        whole_s.append(end_s - start_s)
        within = [
            [span for span in spans if span[1] < end_s and span[2] > start_s]
            for spans in actors.values()
        ]
        products_s.append(max(busy_s(spans, name, start_s, end_s) for spans in within))
    if not any(products_s):
        raise ValueError(f"none of {len(layers)} layers has a span called {name!r} of an actor")
    beyond_s = [whole - products for whole, products in zip(whole_s, products_s, strict=True)]
    return {
        "layers": len(layers),
        "layer_ms": statistics.median(whole_s) * 1e3,
        "products_ms": statistics.median(products_s) * 1e3,
        "beyond_ms": statistics.median(beyond_s) * 1e3,
    }


def measure(
    bench: Bench, device: torch.device, streams: int, tokens: int, file: Path
) -> dict[str, float]:
    """Return :func:`beyond_products` of a round; writes the trace and the picture of another.

    The engine and its actors record (:class:`benchmarks.gpu.actors.ProfiledActor`).
    """
    for _ in range(2):  # connections come in the background
        bench.round(streams, tokens)
    with LayerTimes(device) as times:
        recorded = _recorded(bench, streams, tokens)
    is_host = device.type == "cpu"
    end = "" if is_host else DEVICE
    actors = {name: recorded[f"{name}{end}"] for name in bench.actors.handles}
    figures = beyond_products(times.layers, actors, PRODUCTS if is_host else KERNELS)
    write_trace(_recorded(bench, streams, tokens), file)
    return figures


def _recorded(bench: Bench, streams: int, tokens: int) -> dict[str, list[Recorded]]:
    """Return the spans of a round by lane: the processes, and what their devices did."""
    recorder = DeviceRecorder()
    recorder.begin()
    bench.actors.call("begin_device")
    recorded = bench.recorded_round(streams, tokens)
    devices = {ROUTER: recorder.end(), **bench.actors.call("end_device")}
    return recorded | {f"{name}{DEVICE}": spans for name, spans in devices.items() if spans}
