"""Llama's attention over the paged cache: one product for query, key and value, one rotation.

transformers' modules make three products and rotate twice, which takes most of a step's time when
tokens are few. A module is replaced only where a trial at loading gives equal results bit for bit.
A family with another attention keeps its own module.

Dimension letters: T packed tokens, G key/value heads, Q query heads, D head size, H hidden size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.native.built import native
from cluster.wire.tensors import to_bytes
from router.model.attention import PagedBatch, Span
from router.model.cpu.native_attention import NativeAttention
from router.model.cpu.packed_linear import PackedLinear, is_packable
from router.model.kv_cache import PagedCache
from router.model.paged_attention import PagedContext, paged_attention

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_TRIED_TOKENS = (2, 48)


class FusedAttention(nn.Module):
    """The module that takes the place of transformers' attention; runs on packed weights."""

    def __init__(self, replaced: Any) -> None:
        """Rearrange copies of the weights of ``replaced``."""
        super().__init__()
        self.layer_idx: int = replaced.layer_idx
        self._scaling: float = replaced.scaling
        self._head_dim: int = replaced.head_dim
        inputs = [getattr(replaced, name).weight for name in _PROJECTIONS[:3]]
        self._num_q = inputs[0].shape[0] // self._head_dim
        self._num_kv = inputs[1].shape[0] // self._head_dim
        self.qkv_proj = PackedLinear(torch.cat(inputs))
        self.o_proj = PackedLinear(replaced.o_proj.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        *,
        paged: PagedContext,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Map [1, T, H] to [1, T, H]; ``position_embeddings`` are cosines and sines [1, T, D]."""
        # narrow and view, since chunk, split and unflatten run Python code in every layer.
        num_q, num_kv, size = self._num_q, self._num_kv, self._head_dim
        num_qk = num_q + num_kv
        qkv = self.qkv_proj(hidden_states).view(1, -1, num_qk + num_kv, size)  # [1, T, Q+2G, D]
        rotated = _rotate_in_place(qkv, num_qk, *position_embeddings)  # [1, T, Q+G, D]
        rotated = rotated.transpose(1, 2)
        output = paged_attention(
            self,
            rotated.narrow(1, 0, num_q),
            rotated.narrow(1, num_q, num_kv),
            qkv.narrow(2, num_qk, num_kv).transpose(1, 2),
            None,
            scaling=self._scaling,
            paged=paged,
        )[0]
        return self.o_proj(output.flatten(2)), None


def _rotate_in_place(
    heads: torch.Tensor, count: int, cosines: torch.Tensor, sines: torch.Tensor
) -> torch.Tensor:
    """Return the first ``count`` heads of [1, T, N, D], rotated by angles [1, T, D].

    Native code rotates in place, torch into new memory; the caller uses the returned heads alone.
    Every product and every sum is rounded, as in transformers.
    """
    num_tokens, size = heads.shape[1], heads.shape[3]
    rotated = heads.narrow(2, 0, count)
    is_bf16 = heads.dtype == cosines.dtype == sines.dtype == torch.bfloat16
    if native is not None and is_bf16 and heads.is_cpu and heads.is_contiguous():
        angles = to_bytes(cosines), to_bytes(sines)
        native.rotate(to_bytes(heads), *angles, num_tokens, size, count)
        return rotated
    first, second = rotated.narrow(3, 0, size // 2), rotated.narrow(3, size // 2, size // 2)
    turned = torch.cat((second.neg(), first), dim=3).mul_(sines.unsqueeze(2))
    return (rotated * cosines.unsqueeze(2)).add_(turned)


def fuse_attention(model: nn.Module) -> None:
    """Replace every attention module of ``model`` whose results :class:`FusedAttention` gives."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if _is_llamas(child):
                fused = FusedAttention(child)
                if _same_bits(child, fused):
                    setattr(parent, name, fused)


def _is_llamas(module: nn.Module) -> bool:
    """Return whether a module has exactly the parts of Llama's attention."""
    parts = dict(module.named_children())
    return (
        parts.keys() == set(_PROJECTIONS)
        and all(is_packable(part) for part in parts.values())
        and not list(module.parameters(recurse=False))
        and all(hasattr(module, name) for name in ("layer_idx", "scaling", "head_dim"))
    )


@torch.inference_mode()
def _same_bits(replaced: Any, fused: FusedAttention) -> bool:
    """Compare both on random prompts; a module that cannot take them is another attention."""
    generator = torch.Generator().manual_seed(0)
    num_kv, head_dim = fused._num_kv, fused._head_dim
    dtype, device = torch.bfloat16, torch.device("cpu")
    attention = NativeAttention(None)
    for num in _TRIED_TOKENS:
        hidden_size = replaced.q_proj.in_features
        rows = torch.randn(1, num, hidden_size, generator=generator).to(dtype)
        angles = torch.randn(2, 1, num, head_dim, generator=generator).to(dtype)
        slots = np.arange(num)
        batch = PagedBatch(torch.from_numpy(slots), attention.view([Span(slots, 0)], 0))
        cache = PagedCache(fused.layer_idx + 1, (1, num), num_kv, head_dim, dtype, device)
        arguments = {
            "hidden_states": rows,
            "position_embeddings": (angles[0], angles[1]),
            "attention_mask": None,
            "paged": PagedContext(cache, attention, batch, [False] * (fused.layer_idx + 1)),
        }
        try:
            expected = replaced(**arguments)[0]
        except (RuntimeError, TypeError, ValueError):
            return False
        if not torch.equal(expected, fused(**arguments)[0]):
            return False
    return True
