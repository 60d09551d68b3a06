"""The rows of a layer's experts, row by row, for a mixture's combination.

Dimension letters: T rows, K most experts of a row, W the shape of an expert's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from cluster.wire.frames import Shape
from cluster.wire.tensors import to_raw
from experts.mixture.spec import MixtureSpec
from router.moe.combine import ExpertRows
from router.moe.gate import Choice


class GatheredRows(NamedTuple):
    """Experts' outputs [T, K, *W], the choice [T, K] behind them, and the received pairs."""

    rows: torch.Tensor
    choice: Choice
    is_present: np.ndarray
    """Whether a pair was computed, bool [T, K]."""


class _Plan(NamedTuple):
    choice: Choice
    like: torch.Tensor


class GatherRows:
    """Implements :class:`router.moe.layer.Combination`: the rows as they are, pair by pair."""

    def __init__(self, answer_shape: Callable[[Shape], Shape]) -> None:
        """``answer_shape`` returns W for the shape of a sent row."""
        self._answer_shape = answer_shape

    def prepare(self, choice: Choice, rows: torch.Tensor) -> _Plan:
        """Return the plan of :meth:`combine`."""
        return _Plan(choice, rows)

    def combine(self, received: list[ExpertRows], plan: _Plan) -> tuple[GatheredRows, bool]:
        """Return the rows, and whether they are finite; absent rows are 0."""
        choice, like = plan
        num_rows, k = choice.ids.shape
        shape = self._answer_shape(tuple(like.shape[1:]))
        rows = torch.zeros(num_rows * k, *shape, dtype=like.dtype)
        is_present = np.zeros(num_rows * k, dtype=bool)
        raw = to_raw(rows)
        for piece in received:
            data = np.frombuffer(piece.rows, raw.dtype)
            raw[piece.pairs] = data.reshape(len(piece.pairs), *shape)
            is_present[piece.pairs] = True
        result = GatheredRows(
            rows.view(num_rows, k, *shape), choice, is_present.reshape(num_rows, k)
        )
        return result, bool(rows.isfinite().all())

    def finite_rows(self, result: GatheredRows) -> np.ndarray:
        """Return whether the outputs for each row are finite, bool [T]."""
        is_finite: np.ndarray = result.rows.isfinite().flatten(1).all(dim=1).numpy()
        return is_finite


def answer_shape_of(spec: MixtureSpec, row_shape: Shape) -> Shape:
    """Return the shape of an expert's output for a row of this shape."""
    shape = spec.combine.shape
    return (row_shape[0], *shape[1:]) if shape[0] == -1 else shape
