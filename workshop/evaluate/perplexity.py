"""What a scorer says of token ids; the perplexity of texts, and which experts their tokens use.

The experts of a token are those that the gate chose at the token before it, which predict it.

Dimension letters: N scored tokens, K experts per token, E experts of a layer.
"""

from __future__ import annotations

import math
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


@dataclass(frozen=True, slots=True)
class LayerUse:
    """The use of a layer's experts: each expert's share of the assignments, and its perplexity.

    The perplexity of an expert is that of the tokens that it took part in; ``None`` where there
    are none.
    """

    layer: int
    shares: list[float]
    perplexity: list[float | None]


@dataclass(frozen=True, slots=True)
class TextFigures:
    """The figures of a text; ``experts`` is empty where they are not known."""

    sequences: int
    tokens: int
    nats: float
    perplexity: float
    exact: bool
    experts: list[LayerUse]


@dataclass(slots=True)
class TextTally:
    """Adds up the scores of a text's sequences; ``num_experts`` is E."""

    num_experts: int
    _sequences: int = 0
    _tokens: int = 0
    _nats: float = 0.0
    _exact: bool = True
    _layers: dict[int, np.ndarray] = field(default_factory=dict)
    """By layer: the numbers of assignments, and the nats of their tokens, [2, E]."""

    def add(self, scored: Scored) -> None:
        """Add a sequence."""
        layers = {}
        for layer_id, ids in scored.experts.items():
            nats = np.repeat(-scored.logprobs, ids.shape[1])
            layers[layer_id] = np.stack(
                [np.bincount(ids.ravel(), of, self.num_experts) for of in (None, nats)]
            )
        total = -float(scored.logprobs.sum())
        self.merge(
            TextTally(self.num_experts, 1, len(scored.logprobs), total, scored.exact, layers)
        )

    def merge(self, other: TextTally) -> None:
        """Add all that another tally has."""
        self._sequences += other._sequences
        self._tokens += other._tokens
        self._nats += other._nats
        self._exact = self._exact and other._exact
        for layer_id, found in other._layers.items():
            self._layers[layer_id] = self._layers.get(layer_id, 0.0) + found

    def figures(self) -> TextFigures:
        """Return the figures of all sequences; there is at least one."""
        return TextFigures(
            self._sequences,
            self._tokens,
            self._nats,
            math.exp(self._nats / self._tokens),
            self._exact,
            [_use(layer_id, *found) for layer_id, found in sorted(self._layers.items())],
        )


def _use(layer_id: int, counts: np.ndarray, nats: np.ndarray) -> LayerUse:
    pairs = zip(nats.tolist(), counts.tolist(), strict=True)
    means = [math.exp(sum_nats / count) if count else None for sum_nats, count in pairs]
    return LayerUse(layer_id, (counts / counts.sum()).tolist(), means)


def together(tallies: Sequence[TextTally]) -> TextFigures:
    """Return the figures of all texts together."""
    whole = TextTally(tallies[0].num_experts)
    for one in tallies:
        whole.merge(one)
    return whole.figures()
