"""The layers of a model for steps of which requests ask for the experts of tokens, or force them.

They are the decoder's own, each MoE layer wrapped. A step without such requests runs none of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from router.model.decoder import DecoderLayer, MoEFeedForward
from router.moe.gate import ForcedGate
from router.moe.layer import StepContext
from router.moe.missing import Tokens


class RoutedFeedForward:
    """The feed-forward half of an MoE layer that records its tokens' experts in the step's record.

    Tokens whose experts are forced go to these.
    """

    def __init__(self, half: MoEFeedForward, layer: int) -> None:
        """``layer`` counts only MoE layers, from 0."""
        self._half = half
        self._layer = layer

    def begin(self, normed: torch.Tensor, context: StepContext, tokens: Tokens) -> Any:
        """See :class:`router.model.decoder.FeedForwardHalf`."""
        assert context.routed is not None
        assert isinstance(tokens, slice)  # of such steps all rows are computed
        half, forced = self._half, context.routed.forced_of(self._layer, tokens)
        if forced is not None:
            half = half.with_gate(partial(ForcedGate, forced=forced))
        return half.begin(normed, context, tokens)

    def finish(self, begun: Any) -> torch.Tensor:
        """See :class:`router.model.decoder.FeedForwardHalf`; records the experts."""
        output = self._half.finish(begun)
        layer, _ = begun
        layer.context.routed.note(self._layer, layer.tokens, layer.choice)
        return output

    def abandon(self, begun: Any) -> None:
        """See :class:`router.model.decoder.FeedForwardHalf`."""
        self._half.abandon(begun)


def routed_layers(layers: Sequence[DecoderLayer]) -> list[DecoderLayer]:
    """Return the layers of a decoder, those with experts wrapped by :class:`RoutedFeedForward`."""
    wrapped: list[DecoderLayer] = []
    num_moe = 0
    for layer in layers:
        half = layer.feed_forward
        if isinstance(half, MoEFeedForward):
            layer = replace(layer, feed_forward=RoutedFeedForward(half, num_moe))
            num_moe += 1
        wrapped.append(layer)
    return wrapped
