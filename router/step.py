"""From a step's work to the tensors that the model takes: pure functions.

Dimension letters: T packed tokens, B decoding sequences, L cached tokens, R rows to sample.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
import torch

from router.cache import Chunk, PagedBatch
from router.scheduler import Sequence, Work


@dataclass(frozen=True, slots=True)
class StepInput:
    """What :meth:`router.model.MoEModel.forward` takes; ``sampled`` are the rows' sequences."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    batch: PagedBatch
    sample_rows: torch.Tensor
    sampled: tuple[Sequence, ...]


def pack(work: List[Work], sliding_window: int | None) -> StepInput:
    """Pack a step: single-token work first (as decodes), then chunks, without padding."""
    decodes = [w for w in work if w.end - w.start == 1]
    prefills = [w for w in work if w.end - w.start > 1]
    ordered = [*decodes, *prefills]
    slots = [w.sequence.slots[: w.end] for w in ordered]
    decode_slots, decode_mask = _decode_part(slots[: len(decodes)], sliding_window)
    ends = np.cumsum([w.end - w.start for w in ordered])
    chunks = tuple(
        _chunk(w, slots[len(decodes) + i], int(ends[len(decodes) + i]), sliding_window)
        for i, w in enumerate(prefills)
    )
    rows = [int(end) - 1 for end, w in zip(ends, ordered, strict=True) if w.samples]
    token_ids = [t for w in ordered for t in w.sequence.token_ids[w.start : w.end]]
    positions = np.concatenate([np.arange(w.start, w.end) for w in ordered])
    new_slots = np.concatenate([s[w.start :] for s, w in zip(slots, ordered, strict=True)])
    return StepInput(
        token_ids=torch.tensor(token_ids),
        positions=torch.from_numpy(positions),
        batch=PagedBatch(
            new_slots=torch.from_numpy(new_slots),
            num_decode=len(decodes),
            decode_slots=decode_slots,
            decode_mask=decode_mask,
            chunks=chunks,
        ),
        sample_rows=torch.tensor(rows, dtype=torch.int64),
        sampled=tuple(w.sequence for w in ordered if w.samples),
    )


def _decode_part(
    slots: List[np.ndarray], sliding_window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max((len(s) for s in slots), default=0)
    lengths = np.array([len(s) for s in slots], dtype=np.int64).reshape(-1, 1)
    # Padding repeats the sequence's own first slot: what is masked must still be a finite number.
    padded = np.empty((len(slots), longest), dtype=np.int64)
    for row, own in enumerate(slots):
        padded[row, : len(own)] = own
        padded[row, len(own) :] = own[0]
    column = np.arange(longest).reshape(1, -1)
    mask = column < lengths
    if sliding_window is not None:
        mask &= column >= lengths - sliding_window
    return torch.from_numpy(padded), torch.from_numpy(mask)[:, None, None, :]


def _chunk(work: Work, slots: np.ndarray, end: int, sliding_window: int | None) -> Chunk:
    size = work.end - work.start
    mask = None
    if work.start > 0 or (sliding_window is not None and work.end > sliding_window):
        query = np.arange(work.start, work.end).reshape(-1, 1)
        key = np.arange(work.end).reshape(1, -1)
        visible = key <= query
        if sliding_window is not None:
            visible &= key > query - sliding_window
        mask = torch.from_numpy(visible)
    return Chunk(end - size, end, torch.from_numpy(slots), mask)
