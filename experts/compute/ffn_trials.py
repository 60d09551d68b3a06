"""Trials at loading: whether an expert by AMX tiles has the bits of a plain one on this processor.

Bits depend on the shape and the processor, not on the values, so a random expert of the shape is
tried.

Dimension letters: P rows of one expert, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.amx_ffn import Activation, GatedFfn

# One tile, and two tiles. Only two numbers, because oneDNN keeps compiled code for each.
TILED_ROWS = (3, 17)
"""The numbers of rows of the trials."""
TRIED_SIDE = 128


@cache
@torch.inference_mode()
def keeps_bits(
    faster: Callable[[GatedFfnWeights, Activation], GatedFfn],
    plain: Callable[[torch.Tensor, GatedFfnWeights, Activation], torch.Tensor],
    counts: tuple[int, ...],
    sizes: tuple[int, int],
    act: Activation,
) -> bool:
    """Return whether both give equal bits for a random expert of ``sizes`` (H, I).

    They are compared on ``counts`` rows each.
    """
    weights, samples = _random_expert(*sizes, counts)
    fast = faster(weights, act)
    return all(torch.equal(fast(rows), plain(rows, weights, act)) for rows in samples)


def _random_expert(
    hidden_size: int, intermediate_size: int, counts: Sequence[int]
) -> tuple[GatedFfnWeights, list[torch.Tensor]]:
    """Return a random expert, and random rows for it, in a tensor of each of ``counts``."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)

    gate_up, down = randn(2 * intermediate_size, hidden_size), randn(hidden_size, intermediate_size)
    return GatedFfnWeights(gate_up, down), [randn(count, hidden_size) for count in counts]
