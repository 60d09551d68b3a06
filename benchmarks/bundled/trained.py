"""What the training of a bundled mixture gives, and the rows that no training sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.local_mixture import LocalMixture
from experts.checkpoint.mixture import Mixture

HELD_OUT_EVERY = 4
MAX_ITERATIONS = 1000
Begin = Callable[[str], None]
"""Called with the name of each step of a training as it begins."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A mixture's content and files, and its card, whose figures are those of the loaded mixture.

    ``files`` are the bytes of each file that ``spec`` names.
    """

    spec: Mapping[str, Any]
    files: Mapping[str, bytes]
    card: Callable[[Mixture, LocalMixture], str]


def is_held_out(num_rows: int) -> np.ndarray:
    """Return which of a data set's rows are held out, bool [rows]: every fourth."""
    return np.arange(num_rows) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def minimize(loss: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
    """Minimise a smooth loss by L-BFGS until it no longer falls."""
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
