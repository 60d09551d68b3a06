"""The product's engine with the product's limits, whose rounds begin at once and steps are timed.

It imports torch and the product, so only the process that measures imports it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.actors import TIMEOUT_S
from benchmarks.common import CACHE_TOKENS, MODEL
from cluster.processor import num_cpus
from experts.checkpoint.checkpoint import Checkpoint
from router.config.deployment import ExpertsConfig, RouterConfig
from router.control.placement_view import PlacementView
from router.engine.emission import Emit
from router.engine.engine import Engine
from router.engine.scheduling.prefixes import why_dependent
from router.engine.scheduling.scheduler import Limits, Scheduler
from router.model.model import MoEModel
from router.moe.combine import WeightedSums
from router.moe.dispatch import Dispatcher
from router.moe.layer import MoELayers


class Collector:
    """Takes what the engine emits, and wakes who waits when every stream has ended."""

    def __init__(self) -> None:
        """Wait for nothing yet."""
        self._ended = threading.Event()
        self._open: set[str] = set()
        self._error: Exception | None = None
        self.tokens: dict[str, list[int]] = {}

    def expect(self, request_ids: Sequence[str]) -> None:
        """Begin a round of these requests."""
        self.tokens = {request_id: [] for request_id in request_ids}
        self._open = set(request_ids)
        self._ended.clear()

    def __call__(self, emissions: Sequence[Any]) -> None:
        """Take a step's emissions, on the engine's thread."""
        for emission in emissions:
            if isinstance(emission.outcome, Exception):
                self._error = emission.outcome
                self._ended.set()
                return
            self.tokens[emission.request_id] += emission.outcome.token_ids
            if emission.outcome.finish_reason is not None:
                self._open.discard(emission.request_id)
        if not self._open:
            self._ended.set()

    def wait(self) -> None:
        """Wait for the round's end; raises what a request was answered with."""
        ended = self._ended.wait(TIMEOUT_S)
        if self._error is not None:
            raise self._error
        if not ended:
            raise TimeoutError(f"the streams did not end within {TIMEOUT_S} s")


@dataclass(slots=True)
class Steps:
    """Times of steps that only decode, of those that prefill, and of the former's layers."""

    decode_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    layer_s: list[float] = field(default_factory=list)


class HeldScheduler(Scheduler):
    """Takes no request of a round before all are there, so that rounds have one course."""

    def __init__(self, *arguments: Any) -> None:
        """As :class:`Scheduler`."""
        super().__init__(*arguments)
        self.all_there = threading.Event()

    def add(self, request: Any) -> Any:
        """Take a request once :attr:`all_there` is set."""
        self.all_there.wait(TIMEOUT_S)
        return super().add(request)


class TimedEngine(Engine):
    """Notes what each step took, and its layers."""

    def __init__(
        self, model: MoEModel, layers: MoELayers[torch.Tensor], scheduler: Scheduler, emit: Emit
    ) -> None:
        """As :class:`Engine`, for a model without an end token."""
        super().__init__(model, layers, scheduler, frozenset(), emit)
        self._steps = Steps()

    def begin_steps(self) -> Steps:
        """Return what has the times of all steps from now on."""
        self._steps = Steps()
        return self._steps

    def step(self, work: Any, trace: Any = None) -> None:
        """Compute a step."""
        self.tally.latest_layers_s.clear()
        started_s = time.perf_counter()
        super().step(work, trace)
        took_s = time.perf_counter() - started_s
        if all(item.end - item.start == 1 for item in work):
            self._steps.decode_s.append(took_s)
            self._steps.layer_s.extend(self.tally.latest_layers_s)
        else:
            self._steps.prefill_s.append(took_s)


def layers_of(view: PlacementView, transport: Any) -> MoELayers[torch.Tensor]:
    """Return what dispatches the layers; nobody is told of a suspicion, and calls are retried."""
    timeout_s = ExpertsConfig().call_timeout_s
    dispatcher = Dispatcher(MODEL, view, transport, lambda actor_id, generation: None, timeout_s)
    return MoELayers(dispatcher, WeightedSums())


def model_of(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    layers: MoELayers[torch.Tensor],
    device: torch.device,
) -> MoEModel:
    """Return the dense part on a device, with a cache of :data:`CACHE_TOKENS`."""
    threads = min(RouterConfig().prefill_threads, num_cpus())
    return MoEModel(checkpoint, dtype, CACHE_TOKENS, layers, device, threads)


def scheduler_of(model: MoEModel, layers: MoELayers[torch.Tensor]) -> HeldScheduler:
    """Return a scheduler with a router's own limits."""
    config = RouterConfig()
    is_independent = not why_dependent(model.is_independent, layers.has_limit)
    return HeldScheduler(
        Limits(config.max_batch_size, config.max_batch_tokens, config.max_queue_requests),
        model.num_pages,
        model.attention.page_size,
        model.even_context,
        MODEL if is_independent else None,
        is_independent,
    )
