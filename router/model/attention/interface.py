"""How packed tokens attend to the paged cache: the interface of its implementations.

The tokens of one engine step are packed into a single row without padding: first the tokens of
decoding sequences, one each, then the prefill chunks. The decoder runs over that row and calls
:func:`router.model.attention.paged.paged_attention` in every layer.

Dimension letters: T packed tokens, Q query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from router.model.kv_cache import PagedCache


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one sequence in a step: those from ``start`` to the end of ``slots``.

    ``slots`` are the cache slots of all the sequence's tokens so far, these included. A span of
    several tokens is a prefill chunk.
    """

    slots: np.ndarray
    start: int


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """A packed step in the cache.

    ``new_slots`` [T] take each token's key and value. ``view`` is what its attention has made of
    the step's spans; its tensors are on the host until the model moves them to its device.
    """

    new_slots: torch.Tensor
    view: Any


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer turns products of queries and keys into shares.

    ``softcap`` c turns a score s into c tanh(s / c). ``sinks`` [Q] are scores that take a share and
    add no value. ``has_window`` hides keys before the model's sliding window.
    """

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    has_window: bool = False


class Attention(Protocol):
    """One implementation of attention over the paged cache."""

    name: str
    """The implementation, in kernel classes."""
    page_size: int
    """The slots of a page that it can read."""
    is_independent: bool
    """Whether a token's result has the same bits, whatever other sequences its step has, in
    whatever order, and wherever chunks end."""

    def view(self, spans: Sequence[Span], num_decode: int) -> Any:
        """Return a step's tensors on the host; the first ``num_decode`` spans have one token."""
        ...

    def attend(
        self, query: torch.Tensor, cache: PagedCache, layer_id: int, view: Any, scoring: Scoring
    ) -> torch.Tensor:
        """Attend queries [1, Q, T, D] to a layer of the cache, where their keys are stored already.

        Returns [1, T, Q, D] with the D of the values.
        """
        ...
