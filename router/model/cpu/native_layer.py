"""The attention of a Llama-shaped layer in three native calls, between two norms.

A layer has this shape if its attention has one product each for queries, keys and values, or one
for all of them, rotates whole heads (Su et al. 2021), and adds its output to the residual stream.
Heads may have biases, norms, a clip and sinks. Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DBRX and
GPT-OSS have it. The latent attention of DeepSeek and Grok's layer with four norms have not.

Dimension letters: T tokens, H hidden size, Q query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cluster.native.built import native
from cluster.wire.tensors import to_bytes
from experts.compute.panels import FORMATS
from router.model.attention import Scoring
from router.model.cpu.native_linear import NativeLinear, is_linear
from router.model.cpu.native_norm import NativeNorm, is_norm
from router.model.paged_attention import PagedContext


class NativeAttentionHalf:
    """Norm, attention, residual and the next norm of one layer, from packed copies of weights."""

    def __init__(self, norm: nn.Module, attention: Any, next_norm: nn.Module) -> None:
        """Pack the weights of transformers' modules, which are not kept."""
        self._layer_id: int = attention.layer_idx
        self._scaling: float = attention.scaling
        size = self.head_size = int(attention.head_dim)
        self._norm, self._next_norm = NativeNorm(norm), NativeNorm(next_norm)
        weight, bias = _inputs_of(attention)
        output = _output_of(attention)
        self._num_q = output.weight.shape[1] // size
        self._num_kv = (len(weight) // size - self._num_q) // 2
        self._inputs = NativeLinear(weight, bias)
        self._output = NativeLinear(output.weight, output.bias)
        self._sinks: torch.Tensor | None = getattr(attention, "sinks", None)
        self._head_weights, self._head_norms, head_epsilon = _head_norms_of(attention)
        clip = _clip_of(attention)
        self._factors = self._norm.epsilon, head_epsilon, math.inf if clip is None else clip

    def __call__(
        self,
        hidden_states: torch.Tensor,
        rotation: torch.Tensor | tuple[torch.Tensor, ...],
        paged: PagedContext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`router.model.decoder.AttentionHalf`.

        ``rotation`` are the angles of :class:`NativeRotation`.
        """
        num_q, num_kv = self._num_q, self._num_kv
        assert isinstance(rotation, torch.Tensor)
        heads = self._project(hidden_states, rotation).transpose(0, 1)  # [Q + 2 G, T, D]
        paged.cache.store(
            self._layer_id,
            paged.batch.new_slots,
            heads.narrow(0, num_q, num_kv),
            heads.narrow(0, num_q + num_kv, num_kv),
        )
        has_window = paged.has_window[self._layer_id]
        scoring = Scoring(self._scaling, None, self._sinks, has_window)
        query = heads.narrow(0, 0, num_q).unsqueeze(0)
        attended = paged.attention.attend(
            query, paged.cache, self._layer_id, paged.batch.view, scoring
        )
        return self._finish(attended, hidden_states)

    def _project(self, hidden_states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Return the rotated queries and keys, and the values, [T, Q + 2 G, D]."""
        assert native is not None
        num_q, num_kv, size = self._num_q, self._num_kv, self.head_size
        heads = hidden_states.new_empty(len(hidden_states), num_q + 2 * num_kv, size)
        inputs, row_format = self._inputs, FORMATS[hidden_states.dtype]
        formats = inputs.format, row_format, inputs.has_bias, self._norm.kind
        native.attention_inputs(
            to_bytes(hidden_states),
            self._norm.weight,
            inputs.packed,
            to_bytes(angles),
            self._head_weights,
            to_bytes(heads),
            (inputs.in_features, num_q, num_kv, size, *formats, *self._head_norms),
            self._factors,
            torch.get_num_threads(),
            None,
        )
        return heads

    def _finish(
        self, attended: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output's product of [1, T, Q, D] plus ``residual`` [T, H], and its norm."""
        assert native is not None
        output, norm = self._output, self._next_norm
        sums, normed = torch.empty_like(residual), torch.empty_like(residual)
        formats = output.format, FORMATS[residual.dtype], output.has_bias, norm.kind
        native.attention_outputs(
            to_bytes(attended),
            output.packed,
            to_bytes(residual),
            norm.weight,
            to_bytes(sums),
            to_bytes(normed),
            (output.in_features, output.out_features, *formats),
            norm.epsilon,
            torch.get_num_threads(),
            None,
        )
        return sums, normed


class NativeRotation:
    """The rotary embedding of a model whose attention is native; its angles are float32."""

    def __init__(
        self, rotary_embedding: Callable[[torch.Tensor, torch.Tensor], Any], head_size: int
    ) -> None:
        """``rotary_embedding`` returns cosines and sines [1, T, D] or [1, T, D / 2]."""
        self._rotary_embedding = rotary_embedding
        self._half = head_size // 2
        self._dtype = torch.empty(0)

    def __call__(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return cosines and sines [1, T, 2, D / 2] of positions [1, T], for native code."""
        cosines, sines = self._rotary_embedding(self._dtype, positions)
        return torch.stack((cosines[..., : self._half], sines[..., : self._half]), dim=2)


def has_llamas_shape(norm: nn.Module, attention: Any, next_norm: nn.Module) -> bool:
    """Return whether :class:`NativeAttentionHalf` can take the place of these modules."""
    names = {name for name, _ in attention.named_children()}
    products = names - {"q_norm", "k_norm"}
    return (
        native is not None
        and is_norm(norm)
        and is_norm(next_norm)
        and products in ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"Wqkv", "out_proj"})
        and all(is_linear(getattr(attention, name)) for name in products)
        and all(is_norm(getattr(attention, name)) for name in names - products)
        and {name for name, _ in attention.named_parameters(recurse=False)} <= {"sinks"}
        and all(hasattr(attention, name) for name in ("layer_idx", "scaling", "head_dim"))
    )


def _inputs_of(attention: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the joint weight and bias of queries, keys and values."""
    if hasattr(attention, "Wqkv"):
        return attention.Wqkv.weight, attention.Wqkv.bias
    parts = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    has_bias = parts[0].bias is not None
    bias = torch.cat([part.bias for part in parts]) if has_bias else None
    return torch.cat([part.weight for part in parts]), bias


def _output_of(attention: Any) -> Any:
    return attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj


def _head_norms_of(attention: Any) -> tuple[memoryview | None, tuple[int, int], float]:
    """Return the weights of the heads' norms, how many values each takes, and their epsilon."""
    if not hasattr(attention, "q_norm"):
        return None, (0, 0), 0.0
    norms = [NativeNorm(getattr(attention, name)) for name in ("q_norm", "k_norm")]
    weights = torch.cat([norm._weight for norm in norms])
    return to_bytes(weights), (norms[0].size, norms[1].size), norms[0].epsilon


def _clip_of(attention: Any) -> float | None:
    """Return the bound of queries, keys and values, which DBRX and OLMoE may have."""
    own: float | None = getattr(attention, "clip_qkv", None)
    return own if own is not None else getattr(attention.config, "clip_qkv", None)
