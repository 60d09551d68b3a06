"""A step's inputs on the router's device."""

from __future__ import annotations

from dataclasses import replace

import torch

from cluster.staging import Staging
from router.model.kv_cache import Chunk, PagedBatch


def batch_to_device(
    staging: Staging, batch: PagedBatch, *others: torch.Tensor
) -> tuple[PagedBatch, list[torch.Tensor]]:
    """Return a step's batch and other tensors on the device, by one copy."""
    own = [batch.new_slots, batch.decode_slots, batch.decode_mask, batch.decode_window_mask]
    own += [tensor for c in batch.chunks for tensor in (c.slots, c.mask, c.window_mask)]
    # Layers with and without a window may share a mask.
    distinct = list({id(t): t for t in (*own, *others) if t is not None}.values())
    moved = dict(zip(map(id, distinct), staging.to_device(*distinct), strict=True))

    def masked(mask: torch.Tensor | None) -> torch.Tensor | None:
        return None if mask is None else moved[id(mask)]

    def moved_chunk(chunk: Chunk) -> Chunk:
        return replace(
            chunk,
            slots=moved[id(chunk.slots)],
            mask=masked(chunk.mask),
            window_mask=masked(chunk.window_mask),
        )

    staged = replace(
        batch,
        new_slots=moved[id(batch.new_slots)],
        decode_slots=moved[id(batch.decode_slots)],
        decode_mask=masked(batch.decode_mask),
        decode_window_mask=masked(batch.decode_window_mask),
        chunks=tuple(map(moved_chunk, batch.chunks)),
    )
    return staged, [moved[id(tensor)] for tensor in others]
