"""Sequences of several lengths, as recurrent networks and a gate take them while they are fitted.

Dimension letters: N rows, S steps of all rows together, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from workshop.estimators.sequences import Sequences


@dataclass(frozen=True)
class PackedRows:
    """Rows of several lengths, packed step by step: no network computes beyond a row's end."""

    sequences: Sequences

    def __len__(self) -> int:
        """Return N."""
        return len(self.sequences)

    def __getitem__(self, places: Tensor) -> PackedRows:
        """Return the rows at some places."""
        return PackedRows(self.sequences[places.numpy()])

    @cached_property
    def packed(self) -> PackedSequence:
        """The steps [S, F] by their place in the row, in each place the longest rows first."""
        lengths = self.sequences.lengths
        order = np.argsort(-lengths, kind="stable")
        ordered = self.sequences[order]
        steps = np.arange(lengths.sum()) - np.repeat(ordered.starts, ordered.lengths)
        return PackedSequence(
            torch.from_numpy(ordered.values[np.argsort(steps, kind="stable")]),
            torch.from_numpy(np.bincount(steps)),
            torch.from_numpy(order),
            torch.from_numpy(np.argsort(order, kind="stable")),
        )

    @cached_property
    def means(self) -> Tensor:
        """The mean [N, F] of each row's steps."""
        sums = np.add.reduceat(self.sequences.values, self.sequences.starts)
        return torch.from_numpy(sums / self.sequences.lengths[:, None])

    @cached_property
    def lasts(self) -> Tensor:
        """The last step [N, F] of each row."""
        ends = self.sequences.starts + self.sequences.lengths - 1
        return torch.from_numpy(self.sequences.values[ends])
