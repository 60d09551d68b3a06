"""Dispatch frames for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cluster.wire.frames import DispatchFrame, encode
from cluster.wire.tensors import dtype_name, to_bytes


def dispatch_frame(rows: torch.Tensor, counts: Mapping[int, int], **fields: Any) -> DispatchFrame:
    """Return a frame of rows in order, of which each expert gets its count; by default of layer 0.

    ``fields`` are other fields than usual.
    """
    frame = DispatchFrame(
        request_id=1,
        num_rows=len(rows),
        model="m",
        layer_id=0,
        row_shape=tuple(rows.shape[1:]),
        expert_ids=tuple(counts),
        num_tokens_per_expert=tuple(counts.values()),
        dtype=dtype_name(rows.dtype),
        time_left_s=60,
        rows=bytes(to_bytes(rows)),
    )
    return frame._replace(**fields)


def dispatch_bytes(rows: torch.Tensor, counts: Mapping[int, int], **fields: Any) -> bytes:
    """Return the bytes of :func:`dispatch_frame`."""
    return b"".join(encode(dispatch_frame(rows, counts, **fields)))
