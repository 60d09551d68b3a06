"""The first half of a layer by torch's modules, where native code does not take it.

Dimension letters: T tokens of a piece, H hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from router.model.attention.paged import PagedContext
from router.model.decoder import Map, Rotation


class TorchAttention:
    """The attention half by transformers' modules, or modules that take their place."""

    def __init__(
        self, input_norm: Map, attention: nn.Module, output_norm: Map | None, normed: Map
    ) -> None:
        """``output_norm`` maps attention's output before it is added to the residual stream.

        ``normed`` maps the residual stream to the input of the feed-forward half.
        """
        self._input_norm = input_norm
        self._attention = attention
        self._output_norm = output_norm
        self._normed = normed

    def __call__(
        self,
        residual: torch.Tensor,
        output: torch.Tensor | None,
        rotation: Rotation,
        paged: PagedContext,
    ) -> torch.Tensor:
        """See :class:`router.model.decoder.AttentionHalf`."""
        if output is not None:
            residual += output
        attended = self._attention(
            hidden_states=self._input_norm(residual).unsqueeze(0),
            position_embeddings=rotation,
            attention_mask=None,
            paged=paged,
        )[0].squeeze(0)
        if self._output_norm is not None:
            attended = self._output_norm(attended)
        residual += attended
        return self._normed(residual)
