"""A served folder's model in this process: the router's own model and engine parts, without Ray.

Its numbers are those of a served model of the same dtype. Experts lie in one expert bank, to which
frames are handed as a transport would.

Dimension letters: S tokens of a step, K experts per token.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch

from cluster.errors import NotFiniteError
from cluster.placement.placement import empty_placement
from cluster.spec import ExpertKey, ModelExperts
from cluster.transport.base import Call, IsGone, Outcome, never_gone
from cluster.wire.frames import DispatchFrame, decode, encode
from cluster.wire.tensors import TORCH_DTYPES
from experts.bank import ExpertBank, GatedFfnExpert
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.expert_weights import load_expert
from router.control.placement_view import PlacementView
from router.engine.batch import context_of, pack
from router.engine.prompt_scores import read_scores, score
from router.engine.scheduling.scheduler import Limits, Scheduler
from router.engine.sequence import Sequence as EngineSequence
from router.messages.request import GenerationRequest, SamplingParams
from router.model.memory import PAGE_SIZE
from router.model.model import MoEModel
from router.moe.combine import WeightedSums
from router.moe.dispatch import Dispatcher
from router.moe.gate import Choice, ChooseAmong
from router.moe.layer import InFlightLayer, MoELayers, StepContext
from router.moe.missing import ALL_TOKENS, Tokens
from workshop.evaluate.scores import Ids, Scored

STEP_TOKENS = 1024
"""The tokens of a step, of one prompt or of several."""
MOST_PROMPTS = 32
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


class _ObservedLayers(MoELayers[torch.Tensor]):
    """Layers that keep the gate's choice of the latest step, ids [S, K] by layer."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__(dispatcher, WeightedSums())
        self.chosen: dict[int, np.ndarray] = {}

    def begin(
        self,
        context: StepContext,
        layer_id: int,
        rows: Any,
        gate_choice: Choice,
        reselect: ChooseAmong | None = None,
        tokens: Tokens = ALL_TOKENS,
    ) -> InFlightLayer:
        """See :class:`MoELayers`; a step has one piece."""
        self.chosen[layer_id] = gate_choice.ids.copy()
        return super().begin(context, layer_id, rows, gate_choice, reselect, tokens)


@dataclass(slots=True)
class _Prompt:
    """A prompt under way, its log probabilities so far, and its experts by layer."""

    sequence: EngineSequence
    logprobs: list[float] = field(default_factory=list)
    experts: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def scored(self) -> Scored:
        joined = {layer_id: np.concatenate(parts) for layer_id, parts in self.experts.items()}
        return Scored(np.array(self.logprobs), joined)


class FolderModel:
    """A checkpoint as a :class:`workshop.evaluate.scores.Scorer`, whole in memory."""

    def __init__(self, checkpoint: Checkpoint, longest: int) -> None:
        """Load everything, in the checkpoint's dtype, for prompts of at most ``longest`` tokens."""
        self._vocab_size = checkpoint.vocab_size
        shape, dtype = checkpoint.shape, checkpoint.dtype
        experts = ModelExperts(_MODEL, shape.layers, shape.num_experts, 1)
        view = PlacementView()
        keys = experts.expert_keys()
        view.publish(empty_placement(1, [experts]).with_actor(_ACTOR, 1, keys))
        transport = _BankTransport(_loaded(checkpoint, keys, dtype))
        dispatcher = Dispatcher(_MODEL, view, transport, lambda *actor: None, _TIMEOUT_S)
        self._layers = _ObservedLayers(dispatcher)
        cache_tokens = max(longest, STEP_TOKENS) + MOST_PROMPTS * PAGE_SIZE
        self._model = MoEModel(checkpoint, TORCH_DTYPES[dtype], cache_tokens, self._layers)
        self._scheduler = Scheduler(
            Limits(MOST_PROMPTS, STEP_TOKENS, MOST_PROMPTS),
            self._model.num_pages,
            self._model.attention.page_size,
        )
        self._numbers = itertools.count()

    def score(self, prompts: Iterable[Ids]) -> Iterator[Scored]:
        """See :class:`Scorer`; a step has several short prompts.

        Raises :class:`NotFiniteError` for logits that are NaN.
        """
        waiting: list[Ids] = []
        for ids in prompts:
            num_tokens = sum(map(len, waiting)) + len(ids)
            if waiting and (num_tokens > STEP_TOKENS or len(waiting) == MOST_PROMPTS):
                yield from self._score_together(waiting)
                waiting = []
            waiting.append(ids)
        yield from self._score_together(waiting)

    @torch.inference_mode()
    def _score_together(self, prompts: list[Ids]) -> list[Scored]:
        added = [_Prompt(self._added(ids)) for ids in prompts]
        by_sequence = {id(prompt.sequence): prompt for prompt in added}
        while chunks := self._scheduler.schedule():
            packed = pack(chunks, self._model.attention, most_pieces=1)
            context = context_of(packed)
            decoder = self._model.decoder
            hidden_states, targets = decoder.forward(
                packed.token_ids,
                packed.positions,
                packed.pieces,
                context,
                *[part.targets for part in packed.scored],
            )
            found = score(hidden_states, packed.scored, targets, decoder.logits, self._vocab_size)
            for part, rows in zip(packed.scored, read_scores(found, packed.scored), strict=True):
                if rows is None or context.not_finite:
                    raise NotFiniteError("the model's output is not finite (NaN or infinity)")
                prompt = by_sequence[id(part.chunk.sequence)]
                prompt.logprobs += [row.logprob for row in rows]
                for layer_id, chosen in self._layers.chosen.items():
                    prompt.experts.setdefault(layer_id, []).append(chosen[part.rows])
            for work in chunks:
                work.sequence.num_computed = work.end
                if work.end == len(work.sequence.token_ids):
                    self._scheduler.finish(work.sequence)
        return [prompt.scored() for prompt in added]

    @torch.inference_mode()
    def greedy(self, prompt: Ids, max_tokens: int) -> Iterator[int]:
        """Yield the likeliest tokens after a prompt, each as soon as it is known.

        Nothing else may be asked of the model before the last one. Raises :class:`NotFiniteError`
        for logits that are NaN or infinite.
        """
        sequence = self._added(prompt, SamplingParams(max_tokens, temperature=0.0))
        decoder = self._model.decoder
        while sequence.num_generated < max_tokens:
            packed = pack(self._scheduler.schedule(), self._model.attention, most_pieces=1)
            hidden_states, [rows] = decoder.forward(
                packed.token_ids,
                packed.positions,
                packed.pieces,
                context_of(packed),
                packed.sample_rows,
            )
            [work] = packed.chunks
            sequence.num_computed = work.end
            for logits in decoder.logits(hidden_states, rows) if len(rows) else ():
                if not logits.isfinite().all():
                    raise NotFiniteError("the model's output is not finite (NaN or infinity)")
                sequence.token_ids.append(int(logits.argmax()))
                yield sequence.token_ids[-1]
        self._scheduler.finish(sequence)

    def _added(self, ids: Ids, sampling: SamplingParams = _SCORE) -> EngineSequence:
        request = GenerationRequest(
            request_id=str(next(self._numbers)),
            model=_MODEL,
            prompt_token_ids=tuple(ids),
            sampling=sampling,
            deadline_s=time.monotonic() + _TIMEOUT_S,
        )
        [sequence] = self._scheduler.add(request)
        return sequence


def _loaded(checkpoint: Checkpoint, keys: Sequence[ExpertKey], dtype: str) -> ExpertBank:
    bank, threads = ExpertBank(), torch.get_num_threads()
    for key in keys:
        weights = load_expert(checkpoint, key.layer_id, key.expert_id, dtype)
        bank.hold(key, GatedFfnExpert(weights, checkpoint.shape.activation, threads))
    return bank
