"""A feed-forward expert for a few rows in one native call, on processors with AMX.

torch needs about ten operations for an expert. In an actor whose caches other processes have
replaced, these operations take as long as the matrix products. The result has the same bits: an AMX
tile adds up the products of one value in sequence, as in oneDNN.

Dimension letters: P rows of one expert, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch

from cluster.native.built import native
from cluster.wire.frames import Buffer
from cluster.wire.tensors import to_bytes
from experts.checkpoint.expert_weights import GatedFfnWeights

MAX_ROWS = 32
_SIZE_STEP = 32

Activation = Callable[[torch.Tensor], torch.Tensor]
GatedFfn = Callable[[torch.Tensor], torch.Tensor]
"""One expert: maps rows [P, H] to rows [P, H]."""


def can_tile(weights: GatedFfnWeights) -> bool:
    """Return whether :class:`TiledFfn` can compute an expert, on a processor with AMX."""
    hidden_size, intermediate_size = weights.down.shape
    return (
        native is not None
        and all(part.is_cpu and part.is_contiguous() for part in (weights.gate_up, weights.down))
        and weights.gate_up.dtype == weights.down.dtype == torch.bfloat16
        and hidden_size % _SIZE_STEP == 0 == intermediate_size % _SIZE_STEP
        and _may_tile()
    )


class TiledFfn:
    """One expert with native products of up to ``MAX_ROWS`` rows, from weights in torch's layout.

    ``fallback`` computes more rows, and all rows where torch has several threads.
    """

    def __init__(
        self, weights: GatedFfnWeights, act: Activation, fallback: GatedFfn, min_rows: int
    ) -> None:
        """Compute ``min_rows`` rows or more as ``fallback`` does; ``act`` maps single values."""
        self.sizes = weights.down.shape
        self.row_bytes = self.sizes[0] * weights.down.itemsize
        self.weights = to_bytes(weights.gate_up), to_bytes(weights.down)
        self.activation = _activated(act)
        self._fallback = fallback
        self._min_rows = min_rows

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [P, H] to rows [P, H]."""
        fits = rows.is_cpu and rows.dtype == torch.bfloat16 and rows.shape[1] == self.sizes[0]
        is_native = fits and self.takes(len(rows))
        return self.compute(rows) if is_native else self._fallback(rows)

    def takes(self, num_rows: int) -> bool:
        """Return whether this number of rows is computed natively, with equal bits and no loss."""
        return self._min_rows <= num_rows <= MAX_ROWS and torch.get_num_threads() == 1

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        """Map 1 to ``MAX_ROWS`` rows [P, H] to rows [P, H] natively."""
        output = torch.empty_like(rows, memory_format=torch.contiguous_format)
        _compute((self,), (len(rows),), to_bytes(rows), to_bytes(output))
        return output


def compute_tiled(
    experts: Sequence[GatedFfn], counts: tuple[int, ...], rows: Buffer
) -> memoryview | None:
    """Compute the rows of several experts in one native call.

    The first ``counts[0]`` of ``rows`` are the first expert's, and so on. Returns the results in
    the same order. ``None`` means that the experts must be computed one by one: an expert is of
    another kind, or does not take its number of rows natively.
    """
    tiled = [expert for expert in experts if isinstance(expert, TiledFfn)]
    if len(tiled) < len(counts) or not all(map(TiledFfn.takes, tiled, counts)):
        return None
    first = tiled[0]
    if any(ffn.sizes != first.sizes or ffn.activation is not first.activation for ffn in tiled):
        return None
    output = np.empty(sum(counts) * first.row_bytes, np.uint8).data
    _compute(tiled, counts, rows, output)
    return output


def _compute(
    experts: Sequence[TiledFfn], counts: tuple[int, ...], rows: Buffer, output: Buffer
) -> None:
    assert native is not None
    first = experts[0]
    weights = tuple([expert.weights for expert in experts])
    native.tiled_ffns(rows, counts, weights, first.activation, output, *first.sizes)


@cache
def _may_tile() -> bool:
    return native is not None and bool(native.may_tile())


@cache
def _activated(act: Activation) -> memoryview:
    """Return the activation of every bfloat16 value, in the order of the bits."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return to_bytes(act(bits.view(torch.bfloat16)))
