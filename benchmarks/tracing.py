"""Tracing of a router's engine and of expert actors, by subclasses: the product has no hook."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ray
import torch

from benchmarks.timeline import Recorded
from cluster.transport.base import Call, IsGone, Outcome, PendingCalls, Transport, never_gone
from experts.actor import ExpertActor
from experts.remote import sealed_answer
from router.moe.combine import WeightedSums
from router.moe.layer import BegunLayer, MoELayers

Begun = TypeVar("Begun")
Result = TypeVar("Result")


class Recorder:
    """Spans of the engine's thread; what lies between them in a step is ``dense``."""

    def __init__(self) -> None:
        """Start empty."""
        self.spans: list[Recorded] = []
        self._dense_since_s = 0.0
        self.last_s = 0.0

    def step(self, work: Callable[[], None]) -> None:
        """Run a step."""
        started_s = self._dense_since_s = time.perf_counter()
        work()
        ended_s = time.perf_counter()
        self.spans.append(("dense", self._dense_since_s, ended_s))
        self.spans.append(("step", started_s, ended_s))

    def begin(self, work: Callable[[], Begun]) -> tuple[float, Begun]:
        """Run a layer's dispatch; returns when it began, and its result."""
        started_s = self._end_dense()
        begun = work()
        self.mark("send")
        self._dense_since_s = self.last_s
        return started_s, begun

    def finish(self, started_s: float, work: Callable[[], Result]) -> Result:
        """Run the rest of a layer that began then; after its last wait it is ``combine``."""
        self._end_dense()
        combined = work()
        self.mark("combine")
        self.spans.append(("layer", started_s, self.last_s))
        self._dense_since_s = self.last_s
        return combined

    def _end_dense(self) -> float:
        now_s = self.last_s = time.perf_counter()
        self.spans.append(("dense", self._dense_since_s, now_s))
        return now_s

    def mark(self, name: str) -> None:
        """Give what lies between the last mark and now a name."""
        now_s = time.perf_counter()
        self.spans.append((name, self.last_s, now_s))
        self.last_s = now_s


class TracingLayers(MoELayers[torch.Tensor]):
    """The router's MoE layers, recording each."""

    def __init__(self, dispatcher: Any, recorder: Recorder) -> None:
        """As :class:`MoELayers`."""
        super().__init__(dispatcher, WeightedSums())
        self._recorder = recorder
        self._started_s: dict[int, float] = {}
        """By the identity of a layer under way."""

    def begin(self, *arguments: Any) -> BegunLayer:
        """As :class:`MoELayers`."""
        begin = super().begin
        started_s, begun = self._recorder.begin(lambda: begin(*arguments))
        self._started_s[id(begun)] = started_s
        return begun

    def finish(self, begun: BegunLayer) -> torch.Tensor:
        """As :class:`MoELayers`."""
        finish = super().finish
        return self._recorder.finish(self._started_s.pop(id(begun)), lambda: finish(begun))


class TracingTransport:
    """A transport around another one, recording what its calls and waits take."""

    def __init__(self, inner: Transport, recorder: Recorder) -> None:
        """Carry everything through ``inner``."""
        self._inner = inner
        self._recorder = recorder
        self.calls = inner.calls

    def send(self, calls: Sequence[Call]) -> PendingCalls:
        """See :class:`Transport`."""
        pending = self._inner.send(calls)
        self._recorder.mark("send")
        return _TracingCalls(pending, self._recorder)

    def renew(self, actor_id: str) -> None:
        """See :class:`Transport`."""
        self._inner.renew(actor_id)

    def is_ready(self, actor_id: str, generation: int) -> bool:
        """See :class:`Transport`."""
        return self._inner.is_ready(actor_id, generation)

    def close(self) -> None:
        """See :class:`Transport`."""
        self._inner.close()


class _TracingCalls:
    def __init__(self, inner: PendingCalls, recorder: Recorder) -> None:
        self._inner = inner
        self._recorder = recorder

    @property
    def took_s(self) -> float | None:
        """See :class:`PendingCalls`."""
        return self._inner.took_s

    @property
    def times_s(self) -> Mapping[int, float]:
        """See :class:`PendingCalls`."""
        return self._inner.times_s

    def wait(self, is_gone: IsGone = never_gone) -> list[Outcome]:
        """See :class:`PendingCalls`."""
        outcomes = self._inner.wait(is_gone)
        self._recorder.mark("wait")
        return outcomes

    def drop(self) -> None:
        """See :class:`PendingCalls`."""
        self._inner.drop()


class TracingActor(ExpertActor):
    """The expert actor, recording; over Ray's calls there is no ``idle`` and no ``send``.

    Python answers frames that come alone too, so that their products are seen.
    """

    def __init__(self, *arguments: Any) -> None:
        """As :class:`ExpertActor`."""
        self._recorded: list[Recorded] = []
        super().__init__(*arguments)
        server: Any = self._streams
        if server._alone is not None:
            server._selector.unregister(server._alone)
            server._alone = None
        server._selector.select = self._timed("idle", server._selector.select)
        server._send = self._timed("send", server._send)
        queue: Any = self._queue
        queue._compute_batch = self._timed("products", queue._compute_batch)
        answer = self._timed("answer", lambda data: list(queue.compute_all(data)))
        server._answer = self.compute_all = lambda data: iter(answer(data))  # all at once

    def _timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started_s = time.perf_counter()
            result = work(*arguments)
            self._recorded.append((name, started_s, time.perf_counter()))
            return result

        return timed

    def compute(self, data: bytes) -> bytes:  # type: ignore[override]
        """As :class:`RemoteExpertActor` does."""
        return sealed_answer(super().compute, data)

    @ray.method(concurrency_group="control")
    def recorded(self) -> list[Recorded]:
        """Return what was recorded since the last call."""
        spans, self._recorded = self._recorded, []
        return spans
