"""A gated feed-forward expert on a CPU in native code: both products in one call, weights packed.

A row's result depends on the row, the weights and the class of the kernel (:func:`kernel_class`),
neither on other rows nor on the number of threads. Sums are float32 whatever the dtype, and a
result is rounded once, to the dtype of the rows. ``native/experts/experts.c`` has the layout of
packed weights, ``products.h`` and ``tiles.c`` beside it the order of sums.

Dimension letters: P rows of one expert, H hidden size, I intermediate size, O outputs of a matrix,
K length of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cluster.native import native
from cluster.wire.arrays import bytes_of
from cluster.wire.frames import Buffer
from experts.checkpoint.expert_weights import HostWeights, paged
from experts.compute.panels import (
    BYTES,
    FLOAT32,
    FORMATS,
    PANEL,
    SIDE,
    fill_panels,
    matrix_units,
)

GroupedFfn = Callable[[Sequence[Any], tuple[int, ...], Buffer], memoryview | None]
"""Computes the rows of several experts of one kind in one call, from bytes to bytes.

The first ``counts[0]`` rows are the first expert's, and so on. ``None`` means that the experts must
be computed one by one.
"""

NATIVE_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
"""Each ``hidden_act`` by its number in native code."""
_CLAMPED = len(NATIVE_ACTIVATIONS)

KERNELS: tuple[tuple[str, str, str], ...] = () if native is None else native.ffn_kernels()
"""Name, class, and class in bfloat16 of each kernel that this processor can run, the fastest
first."""


MAX_SIZE = 1 << 24
"""The largest hidden or intermediate size (``native/experts/kernels.h``)."""


def kernel_class(dtype: str, sizes: Sequence[int] = ()) -> str | None:
    """Return the class of the kernel that computes experts of a dtype and of these sizes.

    Kernels of one class give a row the same bits. "fused" rounds a product and its sum together,
    "unfused" one after the other; "paired" adds products of bfloat16 two by two, and takes what is
    between the two matrices in bfloat16. "tiled" does the same with AMX, and adds those products
    32 at a time. ``None`` means that there is no native code, or none for the dtype or a size.
    """
    if native is None or dtype not in FORMATS or any(size > MAX_SIZE for size in sizes):
        return None
    return KERNELS[0][2 if dtype == "bfloat16" else 1]


class NativeFfn:
    """One expert with native products of any number of rows, from a packed copy of its weights."""

    def __init__(self, weights: HostWeights, activation: str, threads: int) -> None:
        """Pack ``weights`` without keeping them.

        ``activation`` is a ``hidden_act``; an expert with biases is GPT-OSS's, with its own.
        At most ``threads`` threads share a product.
        """
        hidden_size, intermediate_size = weights.down.shape
        self.dtype = weights.down.dtype.name
        self.row_bytes = hidden_size * weights.down.itemsize
        self.threads = threads
        has_biases = weights.gate_up_bias is not None
        number = _CLAMPED if has_biases else NATIVE_ACTIVATIONS.index(activation)
        own = FORMATS[self.dtype]
        self.shape = hidden_size, intermediate_size, own, own, number
        self.packed = pack(weights).data

    @property
    def num_bytes(self) -> int:
        """Resident bytes of the packed weights."""
        return self.packed.nbytes

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Map rows [P, H] to rows [P, H]; raises ``ValueError`` for rows of another kind."""
        if rows.dtype.name != self.dtype or rows.shape[1:] != (self.shape[0],):
            raise ValueError(
                f"rows must be {self.dtype} of {self.shape[0]} "
                f"(given: {rows.dtype.name} {list(rows.shape)})"
            )
        output = np.empty(rows.shape, rows.dtype)
        _compute((self,), (len(rows),), bytes_of(rows), bytes_of(output))
        return output


def compute_native(
    experts: Sequence[NativeFfn], counts: tuple[int, ...], rows: Buffer
) -> memoryview | None:
    """Compute the rows of several experts in one native call; see :data:`GroupedFfn`.

    Returns ``None`` if the experts are not of one shape.
    """
    for expert in experts:  # as in the bank
        if expert.shape != experts[0].shape:
            return None
    output = np.empty(sum(counts) * experts[0].row_bytes, np.uint8).data
    _compute(experts, counts, rows, output)
    return output


def _compute(
    experts: Sequence[NativeFfn], counts: tuple[int, ...], rows: Buffer, output: Buffer
) -> None:
    assert native is not None
    packed = tuple([expert.packed for expert in experts])
    native.ffn(rows, counts, packed, output, experts[0].shape, experts[0].threads, None)


def pack(weights: HostWeights) -> np.ndarray:
    """Return one expert's weights as native code reads them, in bytes."""
    hidden_size, intermediate_size = weights.down.shape
    gate, up = np.split(matrix_units(weights.gate_up), 2)  # [I, K] each
    down = matrix_units(weights.down)  # [H, K]
    num_inner, num_outer = -(-intermediate_size // SIDE), -(-hidden_size // PANEL)
    parts = [
        (num_inner, gate.shape[1], PANEL, gate.dtype),
        (num_outer, down.shape[1], PANEL, down.dtype),
    ]
    if weights.gate_up_bias is not None:
        parts += [(num_inner, 1, PANEL, FLOAT32), (num_outer, 1, PANEL, FLOAT32)]
    sizes = [panels * length * side * dtype.itemsize for panels, length, side, dtype in parts]
    packed = paged((sum(sizes),), BYTES)
    pieces = np.split(packed, np.cumsum(sizes)[:-1])
    places = [
        piece.view(dtype).reshape(panels, length, side)
        for piece, (panels, length, side, dtype) in zip(pieces, parts, strict=True)
    ]
    _pack_pair(gate, up, places[0])
    fill_panels(down, places[1])
    if weights.gate_up_bias is not None:
        assert weights.down_bias is not None
        gate_bias, up_bias = np.split(weights.gate_up_bias.astype(FLOAT32)[:, None], 2)
        _pack_pair(gate_bias, up_bias, places[2])
        fill_panels(weights.down_bias.astype(FLOAT32)[:, None], places[3])
    return packed


def _pack_pair(gate: np.ndarray, up: np.ndarray, panels: np.ndarray) -> None:
    """Write both matrices [I, K] into the halves of panels [I / SIDE, K, PANEL]."""
    halves = panels.reshape(*panels.shape[:2], 2, SIDE)
    for half, matrix in enumerate((gate, up)):
        fill_panels(matrix, halves[:, :, half])
