"""Packs a step's work into the tensors that the model takes: pure functions.

Dimension letters: T packed tokens, B decoding sequences, L cached tokens, R rows to sample.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from router.engine.sequence import Sequence, Work
from router.model.kv_cache import Chunk, PagedBatch
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


def pack(work: list[Work], sliding_window: int | None, length_step: int = 1) -> StepInput:
    """Pack a step: decodes (works of a single token) first, then prefill chunks.

    Tokens are not padded. The table of slots [B, L] that decodes attend to is padded, to a length
    L that is a multiple of ``length_step``. ``sliding_window`` is the window, in tokens, of the
    layers that have a window.
    """
    decodes = [w for w in work if w.end - w.start == 1]
    prefills = [w for w in work if w.end - w.start > 1]
    works = (*decodes, *prefills)
    ends = list(itertools.accumulate(w.end - w.start for w in works))
    is_sampled = [w.end == len(w.sequence.token_ids) for w in works]
    positions = [w.start for w in decodes] + [p for w in prefills for p in range(w.start, w.end)]
    return StepInput(
        token_ids=_tensor([t for w in works for t in w.sequence.token_ids[w.start : w.end]]),
        positions=_tensor(positions),
        batch=_batch_of(decodes, prefills, ends, sliding_window, length_step),
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


def _batch_of(
    decodes: list[Work],
    prefills: list[Work],
    ends: list[int],
    sliding_window: int | None,
    length_step: int,
) -> PagedBatch:
    """Return the slots and masks of a step; ``ends`` are those of the works' tokens."""
    decode_slots = [w.sequence.slots[: w.end] for w in decodes]
    padded, mask, window_mask = _decode_part(decode_slots, sliding_window, length_step)
    new_slots = [slots[-1] for slots in decode_slots]
    chunks = []
    for work, end in zip(prefills, ends[len(decodes) :], strict=True):
        slots = work.sequence.slots[: work.end]
        new_slots.extend(slots[work.start :])
        chunks.append(_chunk(work, slots, end, sliding_window))
    return PagedBatch(
        new_slots=_tensor(new_slots),
        num_decode=len(decodes),
        decode_slots=padded,
        decode_mask=mask,
        decode_window_mask=window_mask,
        chunks=tuple(chunks),
    )


def _decode_part(
    slots: list[np.ndarray], sliding_window: int | None, length_step: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return slots [B, L], the mask of all sequences, and the mask within the sliding window.

    Masks are [B, 1, L]; ``None`` hides nothing.
    """
    if not slots:
        return torch.empty((0, 0), dtype=torch.int64), None, None
    lengths = np.array([len(s) for s in slots]).reshape(-1, 1)
    longest = int(lengths.max())
    longest += -longest % length_step
    exceeds_window = sliding_window is not None and longest > sliding_window
    is_even = longest == lengths.min()
    if not exceeds_window and is_even:
        return torch.from_numpy(np.stack(slots)), None, None
    column = np.arange(longest).reshape(1, -1)
    mask = column < lengths
    # Padding repeats the sequence's own first slot, since a masked value must still be finite.
    padded = np.repeat([[s[0]] for s in slots], longest, axis=1)
    padded[mask] = np.concatenate(slots)
    seen = None if is_even else torch.from_numpy(mask)[:, None, :]
    if not exceeds_window:
        return torch.from_numpy(padded), seen, seen
    within = mask & (column >= lengths - sliding_window)
    return torch.from_numpy(padded), seen, torch.from_numpy(within)[:, None, :]


def _chunk(work: Work, slots: np.ndarray, end: int, sliding_window: int | None) -> Chunk:
    size = work.end - work.start
    exceeds_window = sliding_window is not None and work.end > sliding_window
    mask = within = None
    if work.start > 0 or exceeds_window:
        query = np.arange(work.start, work.end).reshape(-1, 1)
        key = np.arange(work.end).reshape(1, -1)
        visible = key <= query
        mask = within = torch.from_numpy(visible) if work.start > 0 else None
        if sliding_window is not None and exceeds_window:
            within = torch.from_numpy(visible & (key > query - sliding_window))
    return Chunk(end - size, end, torch.from_numpy(slots), mask, within)
