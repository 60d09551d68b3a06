"""The perplexity of texts, and which experts their tokens use.

The experts of a token are those that the gate chose at the token before it, which predict it.

Dimension letters: E experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from router.workshop.evaluate.scores import Scored


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
class _Layer:
    """Numbers of assignments and nats of their tokens, [E] each."""

    counts: np.ndarray
    nats: np.ndarray

    def use(self, layer_id: int) -> LayerUse:
        means = [
            math.exp(nats / count) if count else None
            for nats, count in zip(self.nats.tolist(), self.counts.tolist(), strict=True)
        ]
        return LayerUse(layer_id, (self.counts / self.counts.sum()).tolist(), means)


@dataclass(slots=True)
class TextTally:
    """Adds up the scores of a text's sequences; ``num_experts`` is E."""

    num_experts: int
    _sequences: int = 0
    _tokens: int = 0
    _nats: float = 0.0
    _exact: bool = True
    _layers: dict[int, _Layer] = field(default_factory=dict)

    def add(self, scored: Scored) -> None:
        """Add a sequence."""
        self._sequences += 1
        self._tokens += len(scored.logprobs)
        self._nats -= float(scored.logprobs.sum())
        self._exact = self._exact and scored.exact
        for layer_id, ids in scored.experts.items():
            layer = self._layers.setdefault(
                layer_id, _Layer(np.zeros(self.num_experts, np.int64), np.zeros(self.num_experts))
            )
            layer.counts += np.bincount(ids.ravel(), minlength=self.num_experts)
            nats = np.repeat(-scored.logprobs, ids.shape[1])
            layer.nats += np.bincount(ids.ravel(), nats, self.num_experts)

    def add_tally(self, other: TextTally) -> None:
        """Add all sequences of another text."""
        self._sequences += other._sequences
        self._tokens += other._tokens
        self._nats += other._nats
        self._exact = self._exact and other._exact
        for layer_id, layer in other._layers.items():
            own = self._layers.setdefault(
                layer_id, _Layer(np.zeros(self.num_experts, np.int64), np.zeros(self.num_experts))
            )
            own.counts += layer.counts
            own.nats += layer.nats

    def figures(self) -> TextFigures:
        """Return the figures of all sequences; there is at least one."""
        return TextFigures(
            self._sequences,
            self._tokens,
            self._nats,
            math.exp(self._nats / self._tokens),
            self._exact,
            [layer.use(layer_id) for layer_id, layer in sorted(self._layers.items())],
        )


def together(tallies: Iterable[TextTally], num_experts: int) -> TextFigures:
    """Return the figures of all texts together."""
    whole = TextTally(num_experts)
    for tally in tallies:
        whole.add_tally(tally)
    return whole.figures()
