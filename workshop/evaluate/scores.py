"""What a scorer says of token ids: the log probability of each, and the experts that computed it.

Dimension letters: N scored tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Scored:
    """The natural log probabilities [N] of all ids of a prompt but the first.

    ``experts`` has, by layer, the experts [N, K] of the token before each, where they are known.
    ``exact`` is false where an expert was replaced or left out.
    """

    logprobs: np.ndarray
    experts: Mapping[int, np.ndarray] = field(default_factory=dict)
    exact: bool = True


class Scorer(Protocol):
    """A model that scores prompts."""

    def score(self, prompts: Iterable[Ids]) -> Iterator[Scored]:
        """Score prompts, each of at least one token, in their order; takes few of them ahead."""
        ...
