"""The gated feed-forward expert: y = down(act(gate x) * up x)  (Shazeer 2020).

Dimension letters: P rows of one expert, H hidden size, I intermediate size.
"""

from __future__ import annotations

import os
from functools import partial

import torch
from torch.nn import functional

from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.amx_ffn import MAX_ROWS, Activation, GatedFfn, TiledFfn, can_tile
from experts.compute.ffn_trials import TILED_ROWS, TRIED_SIDE, keeps_bits
from experts.compute.native_ffn import NATIVE_ACTIVATIONS, NativeFfn, can_compute

# By ``hidden_act``; families.base.ACTIVATION_NAMES has the same names.
ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
_NAMES = {act: name for name, act in ACTIVATIONS.items()}

_CLAMP, _SWIGLU_ALPHA = 7.0, 1.702

# Activations with equal results of vector code and scalar code for every bfloat16 value, so that a
# result does not depend on the value's position in memory. Both gelus have unequal results.
_POSITION_FREE = frozenset((functional.silu, functional.relu))

# Variables that forbid oneDNN instruction sets of the processor.
_LIMITS = {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}
_HAS_AMX: bool = torch.cpu._is_amx_tile_supported() and not _LIMITS & os.environ.keys()
# oneDNN adds up these numbers of rows in one order.
_BLOCKED_ROWS = range(37, 353)
_BLOCK = 32
# torch itself computes products with at most so many weights, in an order of its own.
_MAX_TINY_SIZE = 4096

# One row has the bits of two where H and I are multiples of _ONE_ROW_STEP up to _ONE_ROW_MAX.
_ONE_ROW_STEP = 64
_ONE_ROW_MAX = 2048


def clamped_ffn(rows: torch.Tensor, weights: GatedFfnWeights) -> torch.Tensor:
    """Apply an expert of GPT-OSS to rows [P, H]; returns [P, H].

    With g = min(gate x, 7) and u = up x within 7 of 0: y = down(g sigmoid(1.702 g) (u + 1)).
    """
    inner = clamped_gate(functional.linear(rows, weights.gate_up, weights.gate_up_bias))
    return functional.linear(inner, weights.down, weights.down_bias)


def clamped_gate(joined: torch.Tensor) -> torch.Tensor:
    """Return GPT-OSS's inner values [P, I] of the products of gate and up, [P, 2I]."""
    gate, up = joined.chunk(2, dim=-1)  # [P, I] each
    gate, up = gate.clamp(max=_CLAMP), up.clamp(-_CLAMP, _CLAMP)
    return (up + 1) * (gate * torch.sigmoid(_SWIGLU_ALPHA * gate))


def gate_up_product(joined: torch.Tensor, act: Activation) -> torch.Tensor:
    """Return the inner values [P, I] of the products of gate and up, [P, 2I]."""
    gate, up = joined.chunk(2, dim=-1)  # [P, I] each
    return act(gate) * up


def ffn_of(weights: GatedFfnWeights, act: Activation) -> GatedFfn:
    """Return the fastest function for an expert.

    With AMX an expert in bf16 has the bits of :func:`gated_ffn`. Any other expert is computed
    natively (:class:`NativeFfn`), and by torch where there is no native code. An expert with biases
    is GPT-OSS's (:func:`clamped_ffn`), with its own activation. The function may hold a rearranged
    copy of the weights, so the caller should drop ``weights``.
    """
    is_clamped = weights.gate_up_bias is not None
    is_of_amx = _HAS_AMX and weights.down.dtype == torch.bfloat16
    name = NATIVE_ACTIVATIONS[0] if is_clamped else _NAMES.get(act)
    if name is not None and not is_of_amx and can_compute(weights):
        return NativeFfn(weights, name)
    if is_clamped:
        return partial(clamped_ffn, weights=weights)
    is_big = weights.down.numel() > _MAX_TINY_SIZE
    tiles = is_of_amx and is_big and act in _POSITION_FREE and can_tile(weights)
    hidden_size, intermediate_size = weights.down.shape
    # The order of a sum depends on its length, so a few sums of each length suffice.
    if tiles and all(
        keeps_bits(_tiled_product, gated_ffn, TILED_ROWS, sizes, act)
        for sizes in ((hidden_size, TRIED_SIDE), (TRIED_SIDE, intermediate_size))
    ):
        return _tiled(weights, act)
    return partial(gated_ffn, weights=weights, act=act)


def _tiled(weights: GatedFfnWeights, act: Activation) -> TiledFfn:
    fallback = partial(gated_ffn, weights=weights, act=act)
    return TiledFfn(weights, act, fallback, 1 if _one_row_fits(weights) else 2)


def _tiled_product(weights: GatedFfnWeights, act: Activation) -> GatedFfn:
    return _tiled(weights, act).compute


def gated_ffn(rows: torch.Tensor, weights: GatedFfnWeights, act: Activation) -> torch.Tensor:
    """Apply one expert to rows [P, H]; returns [P, H] in the rows' dtype.

    The result has the bits of two ``functional.linear`` over these rows alone.
    """
    num_rows = rows.shape[0]
    if _HAS_AMX and _is_position_free(rows, weights, act):
        if _fits_tiles(num_rows, weights):
            return _tiled_ffn(rows, weights, act)
        if num_rows in _BLOCKED_ROWS:
            # oneDNN compiles code for fewer numbers of rows, as in _tiled_ffn.
            return _plain_ffn(_padded(rows, -num_rows % _BLOCK), weights, act)[:num_rows]
    return _plain_ffn(rows, weights, act)


def _plain_ffn(rows: torch.Tensor, weights: GatedFfnWeights, act: Activation) -> torch.Tensor:
    inner = gate_up_product(functional.linear(rows, weights.gate_up), act)
    return functional.linear(inner, weights.down)


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    return functional.pad(rows, (0, 0, 0, count)) if count else rows


def _is_position_free(rows: torch.Tensor, weights: GatedFfnWeights, act: Activation) -> bool:
    """Return whether a row's result is the same in a product with more rows."""
    return (
        rows.dtype == torch.bfloat16
        and rows.is_cpu
        and weights.down.numel() > _MAX_TINY_SIZE
        and act in _POSITION_FREE
    )


def _fits_tiles(num_rows: int, weights: GatedFfnWeights) -> bool:
    # Beyond the rows of two AMX tiles oneDNN adds up in another order.
    return 0 < num_rows <= MAX_ROWS and (num_rows > 1 or _one_row_fits(weights))


def _one_row_fits(weights: GatedFfnWeights) -> bool:
    sizes = weights.down.shape
    return max(sizes) <= _ONE_ROW_MAX and not any(size % _ONE_ROW_STEP for size in sizes)


def _tiled_ffn(rows: torch.Tensor, weights: GatedFfnWeights, act: Activation) -> torch.Tensor:
    """Compute y^T = down (act(gate x^T) * up x^T), with the weights on the left.

    ``functional.linear`` has the weights on the right. There oneDNN rearranges them for AMX in
    every call, which takes half as long as the product; on the left it reads them in place. oneDNN
    compiles and keeps code for every number of rows (1.1 MB, 1 to 4 ms), so rows are padded to a
    power of two. The least number is two, because oneDNN has other, slower code for one row.
    """
    num_rows = rows.shape[0]
    rows = _padded(rows, max(2, 1 << (num_rows - 1).bit_length()) - num_rows)
    gate, up = torch.mm(weights.gate_up, rows.t()).chunk(2)  # [I, P] each
    return torch.mm(weights.down, act(gate) * up).t()[:num_rows]
