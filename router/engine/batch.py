"""Packs a step's work into the tensors that the model takes: pure functions.

Dimension letters: T packed tokens, R rows to sample.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from router.engine.sequence import Sequence, Work
from router.model.attention import Attention, PagedBatch, Span
from router.moe.layer import StepContext
from router.observability.tracing import StepTrace


@dataclass(frozen=True, slots=True)
class StepInput:
    """One packed step, as :meth:`router.model.model.MoEModel.forward` takes it.

    ``sampled`` are the sequences of ``sample_rows``. ``works`` is the step's work in the order of
    its tokens.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    batch: PagedBatch
    sample_rows: torch.Tensor
    sampled: tuple[Sequence, ...]
    works: tuple[Work, ...]


def pack(work: list[Work], attention: Attention) -> StepInput:
    """Pack a step, without padding: decodes (works of a single token), then prefill chunks."""
    decodes = [w for w in work if w.end - w.start == 1]
    prefills = [w for w in work if w.end - w.start > 1]
    works = (*decodes, *prefills)
    ends = list(itertools.accumulate(w.end - w.start for w in works))
    is_sampled = [w.end == len(w.sequence.token_ids) for w in works]
    positions = [w.start for w in decodes] + [p for w in prefills for p in range(w.start, w.end)]
    return StepInput(
        token_ids=_tensor([t for w in works for t in w.sequence.token_ids[w.start : w.end]]),
        positions=_tensor(positions),
        batch=_batch_of(works, len(decodes), attention),
        sample_rows=_tensor([end - 1 for end in itertools.compress(ends, is_sampled)]),
        sampled=tuple(w.sequence for w in itertools.compress(works, is_sampled)),
        works=works,
    )


def context_of(packed: StepInput, trace: StepTrace | None = None) -> StepContext:
    """Return the context of the step's MoE layers; its deadline is its requests' earliest."""
    requests = [work.sequence.request for work in packed.works]
    return StepContext(
        min(request.deadline_s for request in requests),
        [work.end - work.start for work in packed.works],
        [request.on_expert_loss for request in requests],
        trace,
    )


def _tensor(numbers: list[int]) -> torch.Tensor:
    # numpy reads a list several times as fast as torch does.
    return torch.from_numpy(np.array(numbers, dtype=np.int64))


def _batch_of(works: tuple[Work, ...], num_decode: int, attention: Attention) -> PagedBatch:
    spans = [Span(work.sequence.slots[: work.end], work.start) for work in works]
    new_slots = np.concatenate([span.slots[span.start :] for span in spans])
    return PagedBatch(torch.from_numpy(new_slots), attention.view(spans, num_decode))
