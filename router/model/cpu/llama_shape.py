"""The modules of a layer of Llama's shape, which native code may take the place of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cluster.native import native
from cluster.wire.tensors import to_bytes
from experts.compute.native_ffn import MAX_SIZE
from router.model.cpu.native_attention import takes_heads
from router.model.cpu.native_modules import ROOT_MEAN_SQUARE, NativeNorm, is_linear, is_norm
from router.model.own_values import own_value


def has_llamas_shape(norm: nn.Module, attention: Any, next_norm: nn.Module) -> bool:
    """Return whether :class:`NativeAttentionHalf` can take the place of these modules."""
    names = {name for name, _ in attention.named_children()}
    head_norms = names & {"q_norm", "k_norm"}
    products = names - head_norms
    inputs = products - {"o_proj", "out_proj"}
    return (
        native is not None
        and is_norm(norm)
        and is_norm(next_norm)
        and products in ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"Wqkv", "out_proj"})
        and all(is_linear(getattr(attention, name)) for name in products)
        and len({getattr(attention, name).bias is None for name in inputs}) == 1
        and sum(getattr(attention, name).out_features for name in inputs) <= MAX_SIZE
        and _can_norm_heads([getattr(attention, name) for name in sorted(head_norms)])
        and {name for name, _ in attention.named_parameters(recurse=False)} <= {"sinks"}
        and not list(attention.buffers(recurse=False))
        and all(hasattr(attention, name) for name in ("layer_idx", "scaling", "head_dim"))
        and attention.head_dim % 2 == 0
        and takes_heads(output_of(attention).in_features // attention.head_dim, attention.head_dim)
    )


def _can_norm_heads(norms: list[Any]) -> bool:
    """Return whether the heads have no norms, or equal root mean square norms of both kinds."""
    if not norms:
        return True
    if len(norms) == 1 or not all(map(is_norm, norms)):
        return False
    kinds = {(NativeNorm(norm).kind, NativeNorm(norm).epsilon) for norm in norms}
    return len(kinds) == 1 and kinds.pop()[0] == ROOT_MEAN_SQUARE


def inputs_of(attention: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the joint weight and bias of queries, keys and values."""
    if hasattr(attention, "Wqkv"):
        return attention.Wqkv.weight, attention.Wqkv.bias
    parts = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    has_bias = parts[0].bias is not None
    bias = torch.cat([part.bias for part in parts]) if has_bias else None
    return torch.cat([part.weight for part in parts]), bias


def output_of(attention: Any) -> Any:
    """Return the product after attention."""
    return attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj


def head_norms_of(attention: Any) -> tuple[memoryview | None, tuple[int, int], float]:
    """Return the weights of the heads' norms, how many values each takes, and their epsilon."""
    if not hasattr(attention, "q_norm"):
        return None, (0, 0), 0.0
    norms = [NativeNorm(getattr(attention, name)) for name in ("q_norm", "k_norm")]
    weights = torch.cat([norm._weight for norm in norms])
    return to_bytes(weights), (norms[0].size, norms[1].size), norms[0].epsilon


def clip_of(attention: Any) -> float | None:
    """Return the bound of queries, keys and values, which DBRX and OLMoE may have."""
    own: float | None = getattr(attention, "clip_qkv", None)
    return own if own is not None else own_value(attention.config, "clip_qkv")
