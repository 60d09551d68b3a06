"""The feed-forward expert of Mixtral and its kin: y = down(act(gate x) * up x)  (Shazeer 2020).

Dimension letters: P rows of one expert, H hidden size, I intermediate size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from experts.weights import GatedFfnWeights

Activation = Callable[[torch.Tensor], torch.Tensor]

# By hidden_act; families.base.ACTIVATION_NAMES are the same ones.
ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


# Activations whose code for whole vectors and for single values agrees on every bfloat16 value,
# so that a result does not depend on where in memory its value lay. Both gelus' do not.
_PLACELESS = frozenset((functional.silu, functional.relu))

# oneDNN can be told not to use what the processor has.
_LIMITS = {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}
_HAS_AMX: bool = torch.cpu._is_amx_tile_supported() and not _LIMITS & os.environ.keys()
# With more rows than two AMX tiles have oneDNN adds up in another order.
_MAX_TILED_ROWS = 32
# From the first to the second number of rows it adds up in one and the same order again.
_BLOCKED_ROWS = range(37, 353)
_BLOCK = 32
# Products with no more weights than this are torch's own, which add up in another order yet.
_MAX_TINY_SIZE = 4096
# One row adds up as two rows do where H and I are multiples of the one and at most the other.
_ONE_ROW_STEP = 64
_ONE_ROW_MAX = 2048


def gated_ffn(rows: torch.Tensor, weights: GatedFfnWeights, act: Activation) -> torch.Tensor:
    """Apply one expert to rows [P, H]; returns [P, H] in the rows' dtype.

    Bit for bit what two ``functional.linear`` make of just these rows.
    """
    num_rows = rows.shape[0]
    if _HAS_AMX and _is_placeless(rows, weights, act):
        if _fits_tiles(num_rows, weights):
            return _tiled_ffn(rows, weights, act)
        if num_rows in _BLOCKED_ROWS:
            # For the fewer numbers of rows that there is code for, as in _tiled_ffn.
            return _plain_ffn(_padded(rows, -num_rows % _BLOCK), weights, act)[:num_rows]
    return _plain_ffn(rows, weights, act)


def _plain_ffn(rows: torch.Tensor, weights: GatedFfnWeights, act: Activation) -> torch.Tensor:
    gate, up = functional.linear(rows, weights.gate_up).chunk(2, dim=-1)  # [P, I] each
    return functional.linear(act(gate) * up, weights.down)


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    return functional.pad(rows, (0, 0, 0, count)) if count else rows


def _is_placeless(rows: torch.Tensor, weights: GatedFfnWeights, act: Activation) -> bool:
    """Say whether a row's result is the same in a product with some more rows."""
    return (
        rows.dtype == torch.bfloat16
        and rows.is_cpu
        and weights.down.numel() > _MAX_TINY_SIZE
        and act in _PLACELESS
    )


def _fits_tiles(num_rows: int, weights: GatedFfnWeights) -> bool:
    sizes = weights.down.shape
    if num_rows == 1 and (max(sizes) > _ONE_ROW_MAX or any(n % _ONE_ROW_STEP for n in sizes)):
        return False
    return 0 < num_rows <= _MAX_TILED_ROWS


def _tiled_ffn(rows: torch.Tensor, weights: GatedFfnWeights, act: Activation) -> torch.Tensor:
    """Compute y^T = down (act(gate x^T) * up x^T): weights on the left are read as they lie.

    ``functional.linear`` has them on the right, where oneDNN rearranges them for AMX in every
    call, which takes half as long again as the product. And oneDNN compiles and keeps code for
    every number of rows (1.1 MB, 1 to 4 ms), so that only powers of two are computed, from two
    on: one row is a product of another kind, and slower.
    """
    num_rows = rows.shape[0]
    rows = _padded(rows, max(2, 1 << (num_rows - 1).bit_length()) - num_rows)
    gate, up = torch.mm(weights.gate_up, rows.t()).chunk(2)  # [I, P] each
    return torch.mm(weights.down, act(gate) * up).t()[:num_rows]
