"""What stands in a router's model where the experts were.

Dimension letters: T packed tokens, K experts per token, H hidden size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from router.moe.gate import ChooseAmong


class ExpertExchange(Protocol):
    """Where a layer's tokens go to meet their experts."""

    def __call__(
        self,
        layer_id: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        choose_among: ChooseAmong | None = None,
    ) -> torch.Tensor:
        """Map hidden states [T, H], ids and weights [T, K] to the combined output [T, H].

        ``choose_among`` is the layer's gate, for tokens that must do without an expert.
        """
        ...


class RemoteExperts(nn.Module):
    """Takes the place of a family's experts module; has no parameters."""

    # transformers initialises what is not marked; there is nothing to initialise here.
    _is_hf_initialized = True

    def __init__(self, config: Any) -> None:
        """``config`` is transformers'; layer and exchange are set after the model is built."""
        super().__init__()
        self.layer_id = -1
        self.exchange: ExpertExchange | None = None
        self.choose_among: ChooseAmong | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the combined output of the chosen experts, shaped as ``hidden_states`` are.

        Those are [T, H], or [1, T, H] in families whose block leaves them so.
        """
        if self.exchange is None:
            raise RuntimeError(f"layer {self.layer_id} has no exchange")
        rows = hidden_states.flatten(0, -2)
        combined = self.exchange(self.layer_id, rows, top_k_index, top_k_weights, self.choose_among)
        return combined.view(hidden_states.shape)
