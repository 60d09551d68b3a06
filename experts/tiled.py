"""A feed-forward expert of a few rows in one native call, on processors with AMX.

What torch needs for it is some ten operations, which in an actor that other processes have taken
the caches from cost as much as the products. Bits are the same: a tile of AMX sums the products of
one value after the other, as oneDNN has it do.

Dimension letters: P rows of one expert, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch

from cluster.frames import Buffer
from cluster.native import native
from cluster.tensors import to_bytes
from experts.weights import GatedFfnWeights

MAX_ROWS = 32
_SIZE_STEP = 32
_TRIED_ROWS = (2, 3, 8, 16, 17, 32)
_TRIED_SIDE = 128
# One row adds up as two rows do where H and I are multiples of the one and at most the other.
_ONE_ROW_STEP = 64
_ONE_ROW_MAX = 2048

Activation = Callable[[torch.Tensor], torch.Tensor]
GatedFfn = Callable[[torch.Tensor], torch.Tensor]
"""One expert: maps rows [P, H] to rows [P, H]."""
PlainFfn = Callable[[torch.Tensor, GatedFfnWeights, Activation], torch.Tensor]


def can_tile(weights: GatedFfnWeights) -> bool:
    """Say whether :class:`TiledFfn` can hold an expert; the processor has AMX."""
    hidden_size, intermediate_size = weights.down.shape
    return (
        native is not None
        and all(part.is_cpu and part.is_contiguous() for part in (weights.gate_up, weights.down))
        and weights.gate_up.dtype == weights.down.dtype == torch.bfloat16
        and hidden_size % _SIZE_STEP == 0 == intermediate_size % _SIZE_STEP
        and _may_tile()
    )


class TiledFfn:
    """One expert whose products of up to ``MAX_ROWS`` rows are native, from weights as they lie.

    More rows, and all where torch has several threads for them, are left to ``otherwise``.
    """

    def __init__(self, weights: GatedFfnWeights, act: Activation, otherwise: GatedFfn) -> None:
        """Compute what ``otherwise`` does; ``act`` maps every value by itself."""
        self.sizes = weights.down.shape
        self.row_bytes = self.sizes[0] * weights.down.itemsize
        self.weights = to_bytes(weights.gate_up), to_bytes(weights.down)
        self.activation = _activated(act)
        self._otherwise = otherwise
        self._min_rows = 1 if one_row_fits(weights) else 2

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [P, H] to rows [P, H]."""
        return self.compute(rows) if self.takes(len(rows)) else self._otherwise(rows)

    def takes(self, num_rows: int) -> bool:
        """Say whether so many rows are computed natively, where bits and speed are as good."""
        return self._min_rows <= num_rows <= MAX_ROWS and torch.get_num_threads() == 1

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        """Map 1 to ``MAX_ROWS`` rows [P, H] to rows [P, H] natively."""
        output = torch.empty_like(rows, memory_format=torch.contiguous_format)
        _compute((self,), (len(rows),), to_bytes(rows), to_bytes(output))
        return output


def compute_tiled(
    experts: Sequence[GatedFfn], counts: tuple[int, ...], rows: Buffer
) -> memoryview | None:
    """Compute several experts' rows, one after the other in ``rows``, at once.

    The first ``counts[0]`` are the first expert's, and so on. Returns the results in the same
    order, or ``None`` where an expert is not of this kind, or does not take so many rows, and all
    are to be computed one by one.
    """
    tiled = [expert for expert in experts if isinstance(expert, TiledFfn)]
    if len(tiled) < len(counts) or not all(map(TiledFfn.takes, tiled, counts)):
        return None
    first = tiled[0]
    if any(one.sizes != first.sizes or one.activation is not first.activation for one in tiled):
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


def one_row_fits(weights: GatedFfnWeights) -> bool:
    """Say whether oneDNN sums the products of a single row as it does those of two."""
    sizes = weights.down.shape
    return max(sizes) <= _ONE_ROW_MAX and not any(size % _ONE_ROW_STEP for size in sizes)


@cache
def _may_tile() -> bool:
    return native is not None and bool(native.may_tile())


@cache
def _activated(act: Activation) -> memoryview:
    """Return what an activation makes of each bfloat16, in the order of their bits."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return to_bytes(act(bits.view(torch.bfloat16)))


@torch.inference_mode()
def keeps_bits(weights: GatedFfnWeights, act: Activation, plain: PlainFfn) -> bool:
    """Say whether :class:`TiledFfn` computes an expert of this shape as ``plain`` does."""
    return all(
        _keeps_bits(hidden_size, intermediate_size, act, plain)
        for hidden_size, intermediate_size in (
            (weights.down.shape[0], _TRIED_SIDE),
            (_TRIED_SIDE, weights.down.shape[1]),
        )
    )


@cache
def _keeps_bits(hidden_size: int, intermediate_size: int, act: Activation, plain: PlainFfn) -> bool:
    """Try both on random experts. How many sums there are is no matter, only how long they are."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)

    weights = GatedFfnWeights(
        randn(2 * intermediate_size, hidden_size), randn(hidden_size, intermediate_size)
    )

    def expected(rows: torch.Tensor) -> torch.Tensor:
        return plain(rows, weights, act)

    tiled = TiledFfn(weights, act, expected)
    samples = [randn(num_rows, hidden_size) for num_rows in _TRIED_ROWS]
    return all(torch.equal(tiled.compute(rows), expected(rows)) for rows in samples)
