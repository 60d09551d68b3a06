"""A served folder's model in this process: the router's own model and engine, without Ray.

Its numbers are those of a served model of the same dtype. Experts lie in one expert bank, to which
frames are handed as a transport would.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch

from cluster.errors import ExpertMeshError
from cluster.placement.placement import empty_placement
from cluster.spec import ExpertKey, ModelExperts
from cluster.transport.base import Call, IsGone, Outcome, never_gone
from cluster.wire.frames import DispatchFrame, decode, encode
from cluster.wire.tensors import TORCH_DTYPES
from experts.bank import ExpertBank, GatedFfnExpert
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.expert_weights import load_expert
from router.control.placement_view import PlacementView
from router.engine.emission import Emission
from router.engine.engine import Engine
from router.engine.scheduling.scheduler import Limits, Scheduler
from router.messages.request import GenerationRequest, SamplingParams, TokenEvent
from router.messages.routed import LITTLE_ENDIAN, RoutedExperts
from router.model.memory import PAGE_SIZE
from router.model.model import MoEModel
from router.moe.combine import WeightedSums
from router.moe.dispatch import Dispatcher
from router.moe.layer import MoELayers
from workshop.evaluate.perplexity import Ids, Scored

STEP_TOKENS = 1024
"""The tokens of a step, of one prompt or of several."""
MAX_PROMPTS = 32
_MODEL, _ACTOR = "folder", "folder"
_TIMEOUT_S = 86_400.0
"""No step waits for anything; a deadline must be somewhere."""
_SCORE = SamplingParams(max_tokens=0, prompt_logprobs=0)
"""Asks for the log probabilities of a prompt."""


@dataclass
class _Answered:
    """Calls that have their answers from the start."""

    outcomes: list[Outcome]
    took_s: ClassVar[float] = 0.0
    times_s: ClassVar[Mapping[int, float]] = MappingProxyType({})

    def wait(self, is_gone: IsGone = never_gone) -> list[Outcome]:
        """See :class:`cluster.transport.base.PendingCalls`."""
        return self.outcomes

    def drop(self) -> None:
        """See :class:`cluster.transport.base.PendingCalls`."""


@dataclass
class _BankTransport:
    """A transport to an expert bank of this process; see :class:`cluster.transport.base`."""

    bank: ExpertBank
    calls: Counter[str] = field(default_factory=Counter)

    def send(self, calls: Sequence[Call]) -> _Answered:
        """Compute all calls."""
        return _Answered([self._answer(call) for call in calls])

    def _answer(self, call: Call) -> Outcome:
        frame = decode(b"".join(call.frame))
        assert isinstance(frame, DispatchFrame)
        return b"".join(encode(self.bank.compute([frame])[0]))

    def renew(self, actor_id: str) -> None:
        """There is no connection to renew."""

    def is_ready(self, actor_id: str, generation: int) -> bool:
        """Return true: the bank is always there."""
        return True

    def close(self) -> None:
        """There is nothing to close."""


class FolderModel:
    """A checkpoint as a :class:`workshop.evaluate.perplexity.Scorer`, whole in memory."""

    def __init__(self, checkpoint: Checkpoint, longest: int) -> None:
        """Load everything, in the checkpoint's dtype, for prompts of at most ``longest`` tokens."""
        shape, dtype = checkpoint.shape, checkpoint.dtype
        experts = ModelExperts(_MODEL, shape.layers, shape.num_experts, 1)
        view = PlacementView()
        keys = experts.expert_keys()
        view.publish(empty_placement(1, [experts]).with_actor(_ACTOR, 1, keys))
        transport = _BankTransport(_loaded(checkpoint, keys, dtype))
        dispatcher = Dispatcher(_MODEL, view, transport, lambda *actor: None, _TIMEOUT_S)
        self._layers: MoELayers[torch.Tensor] = MoELayers(dispatcher, WeightedSums())
        cache_tokens = max(longest, STEP_TOKENS) + MAX_PROMPTS * PAGE_SIZE
        self._model = MoEModel(checkpoint, TORCH_DTYPES[dtype], cache_tokens, self._layers)
        self._scheduler = Scheduler(
            Limits(MAX_PROMPTS, STEP_TOKENS, MAX_PROMPTS, MAX_PROMPTS * longest),
            self._model.num_pages,
            self._model.attention.page_size,
        )
        layers = len(shape.layers), shape.num_experts_per_tok
        self._layer_ids = shape.layers
        self._routed = RoutedExperts(layers, shape.num_experts, returned=True)

    def score(self, prompts: Iterable[Ids]) -> Iterator[Scored]:
        """See :class:`Scorer`; some prompts are computed together.

        Raises :class:`NotFiniteError` for logits that are NaN.
        """
        remaining = iter(prompts)
        while some := list(itertools.islice(remaining, MAX_PROMPTS)):
            yield from map(self._scored, self._run(some, _SCORE))

    def greedy(self, prompt: Ids, max_tokens: int) -> tuple[list[int], list[float]]:
        """Return the likeliest tokens after a prompt, and the seconds on a clock when each came.

        Raises :class:`NotFiniteError` for logits that are NaN or infinite.
        """
        [events] = self._run([prompt], SamplingParams(max_tokens, temperature=0.0))
        tokens = [(token_id, at_s) for at_s, event in events for token_id in event.token_ids]
        return [token_id for token_id, _ in tokens], [at_s for _, at_s in tokens]

    def _run(
        self, prompts: Sequence[Ids], sampling: SamplingParams
    ) -> list[list[tuple[float, TokenEvent]]]:
        """Compute requests in this thread; returns the events of each, with their instants."""
        found: list[list[tuple[float, TokenEvent]]] = [[] for _ in prompts]
        under_way = set(range(len(prompts)))
        errors: list[ExpertMeshError] = []

        def emit(emissions: list[Emission]) -> None:
            for emission in emissions:
                number, outcome = int(emission.request_id), emission.outcome
                if isinstance(outcome, ExpertMeshError):
                    errors.append(outcome)
                else:
                    found[number].append((time.perf_counter(), outcome))
                if isinstance(outcome, ExpertMeshError) or outcome.finish_reason is not None:
                    under_way.discard(number)
            if not under_way:
                engine.close()

        engine = Engine(self._model, self._layers, self._scheduler, frozenset(), emit)
        for number, ids in enumerate(prompts):
            engine.submit(
                GenerationRequest(
                    request_id=str(number),
                    model=_MODEL,
                    prompt_token_ids=tuple(ids),
                    sampling=sampling,
                    deadline_s=time.monotonic() + _TIMEOUT_S,
                    routed=self._routed if sampling is _SCORE else None,
                )
            )
        engine.run()
        if errors:
            raise errors[0]
        return found

    def _scored(self, events: list[tuple[float, TokenEvent]]) -> Scored:
        logprobs = [row.logprob for _, event in events for row in event.prompt_logprobs]
        packed = b"".join(event.routed for _, event in events)
        rows = np.frombuffer(packed, LITTLE_ENDIAN[self._routed.dtype]).astype(np.int64)
        of_layers = rows.reshape(-1, *self._routed.shape)[: len(logprobs)].swapaxes(0, 1)
        return Scored(np.array(logprobs), dict(zip(self._layer_ids, of_layers, strict=True)))


def _loaded(checkpoint: Checkpoint, keys: Sequence[ExpertKey], dtype: str) -> ExpertBank:
    bank, threads = ExpertBank(), torch.get_num_threads()
    for key in keys:
        weights = load_expert(checkpoint, key.layer_id, key.expert_id, dtype)
        bank.hold(key, GatedFfnExpert(weights, checkpoint.shape.activation, threads))
    return bank
