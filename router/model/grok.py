"""Grok-1 without its experts, for which transformers has no class.

As in github.com/xai-org/grok-1 (model.py): norms stand before and after attention and mixture,
scores are capped, embeddings and logits are scaled, and both share one table.

Dimension letters: T packed tokens, H hidden size, D head size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from router.model.attention.paged import PagedContext, paged_attention
from router.model.lean_transformers import PreTrainedModel, transformers
from router.model.parts import RemoteExperts


class GrokConfig(transformers.PreTrainedConfig):  # type: ignore[misc]
    """The configuration, as completed by :mod:`experts.families.grok`."""

    model_type = "grok-1"


class GrokNamesConfig(GrokConfig):
    """The configuration of a checkpoint with the names of xAI's own code."""

    model_type = "grok"


class GrokNorm(nn.Module):
    """Root mean square norm in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        """Build the norm of rows of ``size`` values."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map [..., H] to [..., H]."""
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.scale.float()).to(hidden_states.dtype)


class GrokAttention(nn.Module):
    """Grouped-query attention whose scores are capped."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        """Build the attention of one layer."""
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = _head_dim(config)
        self._scaling = config.attn_output_multiplier
        self._cap = config.max_attn_value
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(config.hidden_size, heads * self._head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self._head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self._head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self._head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        *,
        paged: PagedContext,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Map [1, T, H] to [1, T, H]; ``position_embeddings`` are cosines and sines [1, T, D]."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self._head_dim)).transpose(1, 2)
            for projection in projections
        )
        output = paged_attention(
            self,
            _rotated(query, *position_embeddings),
            _rotated(key, *position_embeddings),
            value,
            None,
            scaling=self._scaling,
            paged=paged,
            softcap=self._cap,
        )[0]
        return self.o_proj(output.flatten(2)), None


class GrokMixture(nn.Module):
    """Gate and experts of a layer."""

    def __init__(self, config: Any) -> None:
        """Build a layer for the gate's weight, of which a :class:`router.moe.gate.Gate` is made."""
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = RemoteExperts(config)


class GrokLayer(nn.Module):
    """Attention and mixture, each between two norms; :mod:`router.model.decoder` runs them."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        """Build one layer."""
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.attn = GrokAttention(config, layer_idx)
        self.moe_block = GrokMixture(config)
        self.pre_attn_norm = GrokNorm(size, eps)
        self.post_attn_norm = GrokNorm(size, eps)
        self.pre_moe_norm = GrokNorm(size, eps)
        self.post_moe_norm = GrokNorm(size, eps)


class GrokEmbedding(nn.Embedding):
    """The token embedding, which scales the hidden states."""

    def __init__(self, config: Any) -> None:
        """Build the table over the vocabulary."""
        super().__init__(config.vocab_size, config.hidden_size)
        self._multiplier = config.embedding_multiplier_scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ids [T] to hidden states [T, H]."""
        return super().forward(input) * self._multiplier


class GrokRotaryEmbedding(nn.Module):
    """The angles of the tokens' positions; has no parameters."""

    def __init__(self, config: Any) -> None:
        """Take the size of a head and the base from ``config``."""
        super().__init__()
        self._head_dim = _head_dim(config)
        self._theta = config.rope_theta

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines [1, T, D] of positions [1, T], in the hidden states' dtype."""
        size, dtype = self._head_dim, hidden_states.dtype
        exponents = torch.arange(0, size, 2, device=position_ids.device).float() / size
        angles = position_ids[..., None].float() / self._theta**exponents  # [1, T, D/2]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class GrokPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """The class attributes by which transformers loads Grok-1."""

    config_class = GrokConfig
    base_model_prefix = "model"
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, since every parameter is loaded."""


class GrokModel(GrokPreTrainedModel):
    """The model without its output head."""

    def __init__(self, config: Any) -> None:
        """Build the layers."""
        super().__init__(config)
        self.embed_tokens = GrokEmbedding(config)
        self.rotary_emb = GrokRotaryEmbedding(config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(GrokLayer(config, index) for index in layers)
        self.norm = GrokNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()


class GrokForCausalLM(GrokPreTrainedModel):
    """The model and its output head; :func:`router.model.parts.head_of` scales the logits."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Any) -> None:
        """Build model and head."""
        super().__init__(config)
        self.model = GrokModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class GrokNamesForCausalLM(GrokForCausalLM):
    """The model of a checkpoint with the names of xAI's own code."""

    config_class = GrokNamesConfig


def register_grok() -> None:
    """Register Grok-1's classes with transformers."""
    for config, model in (
        (GrokConfig, GrokForCausalLM),
        (GrokNamesConfig, GrokNamesForCausalLM),
    ):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config, model, exist_ok=True)


def _head_dim(config: Any) -> int:
    head_dim: int | None = getattr(config, "head_dim", None)
    return head_dim or config.hidden_size // config.num_attention_heads


def _rotated(vectors: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate the first half of each head against its second half (Su et al. 2021)."""
    first, second = vectors.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return vectors * cosines.unsqueeze(1) + turned * sines.unsqueeze(1)
