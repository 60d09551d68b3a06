"""A router's engine with its experts in the same process: the real path without Ray.

Everything is the product's own code except the transport, which hands the encoded frames to
expert banks directly; it can be told to lose calls.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, cast

import torch

from cluster.device import CPU
from cluster.errors import ExpertMeshError
from cluster.placement.placement import Placement, assign_experts, empty_placement
from cluster.spec import Emulation, ExpertKey, ModelExperts
from cluster.transport.base import Call, CallFailure, IsGone, Outcome, Transport, never_gone
from cluster.wire.frames import DispatchFrame, decode, encode
from cluster.wire.tensors import TORCH_DTYPES
from experts.bank import Expert, ExpertBank, GatedFfnExpert
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.expert_weights import load_expert
from experts.compute.emulated import EmulatedExpert
from experts.compute.expert_device import ExpertDevice
from router.config.capacity import CapacityConfig
from router.control.placement_view import PlacementView
from router.engine.batch import StepInput, context_of
from router.engine.constraints import Grammars
from router.engine.emission import Emission
from router.engine.engine import Engine
from router.engine.scheduling.prefixes import why_dependent
from router.engine.scheduling.scheduler import Limits, Scheduler
from router.messages.receipts import merge_events
from router.messages.request import GenerationRequest, SamplingParams, TokenEvent
from router.model.model import MoEModel
from router.moe.capacity import CapacityLimit
from router.moe.combine import WeightedSums
from router.moe.dispatch import Dispatcher
from router.moe.layer import MoELayers

MODEL = "m"
Outcomes = list[TokenEvent | ExpertMeshError]


def within(timeout_s: float, calls: Sequence[Call]) -> list[Call]:
    """Return the calls with this much time for each answer."""
    return [call._replace(timeout_s=timeout_s) for call in calls]


@dataclass
class Answered:
    """A pending that has its answers from the start."""

    outcomes: list[Outcome]
    took_s: ClassVar[float] = 0.0
    times_s: ClassVar[Mapping[int, float]] = MappingProxyType({})

    def wait(self, is_gone: IsGone = never_gone) -> list[Outcome]:
        """Return them."""
        return self.outcomes

    def drop(self) -> None:
        """There is nothing to wait for."""


@dataclass
class BankTransport:
    """A transport whose actors are expert banks in this process."""

    banks: dict[str, ExpertBank]
    fail: Callable[[Call, int], CallFailure | bytes | None] = lambda call, number: None
    frames: list[DispatchFrame] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    unready: set[str] = field(default_factory=set)

    def send(self, calls: Sequence[Call]) -> Answered:
        """Answer each call from its bank, unless ``fail`` says otherwise."""
        return Answered([self._answer(call) for call in calls])

    def renew(self, actor_id: str) -> None:
        """There is no connection to renew."""

    def is_ready(self, actor_id: str, generation: int) -> bool:
        """See :class:`Transport`; ``unready`` actors are not."""
        return actor_id not in self.unready

    def close(self) -> None:
        """There is nothing to close."""

    def _answer(self, call: Call) -> Outcome:
        frame = decode(b"".join(call.frame))
        assert isinstance(frame, DispatchFrame)
        self.frames.append(frame)
        failure = self.fail(call, len(self.frames))
        if failure is not None:
            return failure
        return b"".join(encode(self.banks[call.actor_id].compute([frame])[0]))


def load_banks(
    checkpoint: Checkpoint,
    shares: dict[str, list[ExpertKey]],
    dtype: str,
    emulation: Emulation | None = None,
    device: torch.device = CPU,
) -> dict[str, ExpertBank]:
    """Load each actor's share of the experts into a bank, on ``device``."""
    banks = {}
    for actor_id, keys in shares.items():
        own = None if device == CPU else ExpertDevice(device, actor_id, print)
        bank = ExpertBank(own)
        if own is not None:
            own.begin_load(dict.fromkeys(keys, checkpoint.expert_bytes(dtype)))
        for key in keys:
            bank.hold(key, _load(checkpoint, key, dtype, emulation, own))
        banks[actor_id] = bank
    return banks


def _load(
    checkpoint: Checkpoint,
    key: ExpertKey,
    dtype: str,
    emulation: Emulation | None,
    device: ExpertDevice | None,
) -> Expert:
    """Load an expert as an actor does."""
    if emulation is not None:
        row_shape = (checkpoint.shape.hidden_size,)
        return EmulatedExpert(emulation, row_shape, row_shape, dtype)
    weights = load_expert(checkpoint, key.layer_id, key.expert_id, dtype)
    if device is not None:
        return device.load(key, weights, checkpoint.shape.activation)
    return GatedFfnExpert(weights, checkpoint.shape.activation, torch.get_num_threads())


def _placed(
    experts: ModelExperts, num_actors: int, min_copies: int
) -> tuple[Placement, dict[str, list[ExpertKey]]]:
    """Return a placement of a model's experts on so many actors, and each actor's share."""
    shares = assign_experts([experts], [f"a{i}" for i in range(num_actors)], None, min_copies)
    placement = empty_placement(1, [experts])
    for actor_id, keys in shares.items():
        placement = placement.with_actor(actor_id, 1, keys)
    return placement, shares


class LocalCluster:
    """One engine over ``num_actors`` banks; ``generate`` runs requests to their end."""

    def __init__(
        self,
        folder: Path,
        num_actors: int = 2,
        limits: Limits | None = None,
        cache_tokens: int = 8192,
        dtype: str | None = None,
        threaded: bool = True,
        elsewhere: tuple[str, Transport, Placement] | None = None,
        min_copies: int = 1,
        emulation: Emulation | None = None,
        capacity: CapacityConfig | None = None,
        device: torch.device = CPU,
        experts_device: torch.device = CPU,
        identity: str = "",
        grammars: Grammars | None = None,
        prefix_cache: bool = True,
    ) -> None:
        """``elsewhere`` is a model's id with transport and placement, where its experts live.

        ``device`` is the router's. ``identity`` is the model's.
        """
        self.checkpoint = open_checkpoint(folder)
        dtype = dtype or self.checkpoint.dtype
        shape = self.checkpoint.shape
        self.view = PlacementView()
        self.transport = BankTransport({})
        model_id, transport = MODEL, cast(Transport, self.transport)
        if elsewhere is None:
            experts = ModelExperts(MODEL, shape.layers, shape.num_experts, 1)
            self.placement, shares = _placed(experts, num_actors, min_copies)
            given = self.checkpoint, shares, dtype, emulation, experts_device
            self.transport.banks = load_banks(*given)
        else:
            model_id, transport, self.placement = elsewhere
        self.view.publish(self.placement)
        self._version = 0
        self.suspected: list[tuple[str, int]] = []
        self.dispatcher = Dispatcher(
            model_id, self.view, transport, lambda a, g: self.suspected.append((a, g)), 5.0
        )
        limit = None if capacity is None else CapacityLimit(capacity, shape.num_experts)
        self.overflow = {} if limit is None else limit.overflow
        self.layers = MoELayers(self.dispatcher, WeightedSums(), limit)
        self.model = MoEModel(
            self.checkpoint, TORCH_DTYPES[dtype], cache_tokens, self.layers, device
        )
        is_independent = not why_dependent(self.model.is_independent, self.layers.has_limit)
        self.scheduler = Scheduler(
            limits or Limits(32, 64, 256),
            self.model.num_pages,
            self.model.attention.page_size,
            self.model.even_context,
            identity if prefix_cache and is_independent else None,
            is_independent,
        )
        self._outcomes: defaultdict[str, Outcomes] = defaultdict(list)
        self._changed = threading.Condition()
        self.engine = Engine(
            self.model,
            self.layers,
            self.scheduler,
            frozenset([self.checkpoint.config["eos_token_id"]]),
            self._on_emissions,
            is_exact=emulation is None,
            identity=identity,
            grammars=grammars,
        )
        if threaded:
            self.engine.start()

    def forward(self, packed: StepInput) -> torch.Tensor:
        """Run one packed step through the model and the experts; returns the logits."""
        hidden_states, [sample_rows] = self.model.decoder.forward(
            packed.token_ids,
            packed.positions,
            packed.pieces,
            context_of(packed),
            packed.sample_rows,
        )
        return self.model.decoder.logits(hidden_states, sample_rows)

    def _on_emissions(self, emissions: list[Emission]) -> None:
        with self._changed:
            for emission in emissions:
                self._outcomes[emission.request_id].append(emission.outcome)
            self._changed.notify_all()

    def wait(self, request_id: str, until: Callable[[Outcomes], bool]) -> Outcomes:
        """Wait (at most 60 s) until the request's outcomes satisfy ``until``."""
        with self._changed:
            assert self._changed.wait_for(lambda: until(self._outcomes[request_id]), 60)
            return list(self._outcomes[request_id])

    def result(self, request: GenerationRequest) -> list[TokenEvent]:
        """Return one event per choice of a submitted request; raises the error that ended it."""
        n = request.sampling.n

        def ended(outcomes: Outcomes) -> bool:
            errors = any(isinstance(o, ExpertMeshError) for o in outcomes)
            finished = sum(isinstance(o, TokenEvent) and bool(o.finish_reason) for o in outcomes)
            return errors or finished == n

        outcomes = self.wait(request.request_id, ended)
        for outcome in outcomes:
            if isinstance(outcome, ExpertMeshError):
                raise outcome
        return merge_events([o for o in outcomes if isinstance(o, TokenEvent)])

    def generate(self, *requests: GenerationRequest) -> list[list[TokenEvent]]:
        """Submit all requests at once and return their results in order."""
        for request in requests:
            self.engine.submit(request)
        return [self.result(request) for request in requests]

    def lose(self, experts: Iterable[tuple[int, int]]) -> None:
        """Publish a placement in which these (layer, expert) alone have no live copy."""
        self._version += 1
        lost = {ExpertKey(MODEL, *expert) for expert in experts}
        holders = {k: () if k in lost else a for k, a in self.placement.holders.items()}
        version = self.placement.version + self._version
        self.view.publish(replace(self.placement, version=version, holders=holders))

    def close(self) -> None:
        """End the engine's thread."""
        self.engine.close()


def greedy_request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int,
    timeout_s: float = 60,
    on_expert_loss: str = "strict",
    **sampling: object,
) -> GenerationRequest:
    """A greedy request that ignores the end-of-sequence token."""
    params = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerationRequest(
        request_id=request_id,
        model=MODEL,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        deadline_s=time.monotonic() + timeout_s,
        on_expert_loss=on_expert_loss,
    )
