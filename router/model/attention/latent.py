"""Latent attention over the paged cache (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache holds one latent and one rotary key of a token, in place of keys and values of all heads.
A head's keys and values are linear functions of the latent. So queries are projected into the space
of the latents instead (a score is q (U c) = (q U) c), and outputs back from it. The attention then
has a single head of keys and values. transformers' module computes everything else, and calls
:func:`latent_attention`.

Dimension letters: T packed tokens, Q heads, L latent size, N size of a head's unrotated part, R
size of its rotated part, V size of a head's values.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from router.model.attention.paged import PagedContext, paged_attention

LATENT_ATTENTION_NAME = "expertmesh_latent"


class HeadsLinear(nn.Module):
    """A linear layer of each head."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Keep a view of ``weight`` [Q, O, K]."""
        super().__init__()
        self.weight = weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map [1, Q, T, K] to [1, Q, T, O]."""
        return rows @ self.weight.transpose(1, 2)


def keep_latents(model: nn.Module) -> None:
    """Make every attention module of ``model`` cache latents in place of keys and values.

    The projection from latents to keys and values is split for :func:`latent_attention`.
    """
    for module in list(model.modules()):
        if not hasattr(module, "expand_kv"):
            continue
        attention: Any = module
        size = attention.qk_nope_head_dim
        weight = attention.kv_b_proj.weight
        up = weight.view(attention.num_heads, -1, weight.shape[-1])  # [Q, N + V, L]
        attention.key_up = HeadsLinear(up[:, :size].transpose(1, 2))  # [Q, L, N]
        attention.value_up = HeadsLinear(up[:, size:])  # [Q, V, L]
        attention.expand_kv = _as_latents
        del attention.kv_b_proj


def rotate_by_real_products(model: nn.Module) -> None:
    """Make transformers' DeepSeek-V2 rotate by :func:`rotated_pairs`, in the whole process.

    torch's product of complex numbers has other bits where a thread's share ends amid a vector, so
    they would depend on the number of tokens and threads. Its product of real numbers has not.
    """
    for module in model.modules():
        code: Any = sys.modules[type(module).__module__]
        if hasattr(module, "expand_kv") and hasattr(code, "apply_rotary_emb"):
            code.apply_rotary_emb = rotated_pairs


def rotated_pairs(
    query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys [1, Q, T, R] times complex ``angles`` [1, T, R / 2].

    Two neighbours (x, y) become (x cos - y sin, x sin + y cos), in float32, rounded once.
    """
    cosines, sines = angles.unsqueeze(1).real, angles.unsqueeze(1).imag

    def rotated(vectors: torch.Tensor) -> torch.Tensor:
        x, y = vectors.float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((x * cosines - y * sines, x * sines + y * cosines), dim=-1)
        return pairs.flatten(-2).type_as(vectors)

    return rotated(query), rotated(key)


def _as_latents(
    latents: torch.Tensor, rotary_keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cached keys [1, 1, T, L + R] and values [1, 1, T, L]."""
    return torch.cat((latents, rotary_keys), dim=-1), latents


def latent_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paged: PagedContext,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend queries [1, Q, T, N + R] to cached latents; returns [1, T, Q, V]."""
    attention: Any = module
    plain, rotary = query.split([attention.qk_nope_head_dim, attention.qk_rope_head_dim], dim=-1)
    projected = torch.cat((attention.key_up(plain), rotary), dim=-1)  # [1, Q, T, L + R]
    latents = paged_attention(
        module, projected, key, value, attention_mask, scaling=scaling, paged=paged
    )[0]
    return attention.value_up(latents.transpose(1, 2)).transpose(1, 2), None
