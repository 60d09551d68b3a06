"""Which implementation of attention and which cache a model has on its device."""

from __future__ import annotations

import logging
from typing import Any

import torch

from cluster.device import CPU
from experts.families.base import Family
from router.model.attention.interface import Attention
from router.model.attention.paged import GatheredAttention
from router.model.attention.varlen import VarlenAttention, why_not_varlen
from router.model.cpu.formats import FORMATS
from router.model.cpu.native_attention import NativeAttention, NativeCache, takes_heads
from router.model.kv_cache import LatentCache, PagedCache

logger = logging.getLogger("expertmesh.router")


def choose_attention(
    family: Family,
    config: Any,
    sliding_window: int | None,
    dtype: torch.dtype,
    device: torch.device,
    prefill_threads: int = 1,
) -> Attention:
    """Return the implementation for a model of transformers' ``config`` on ``device``.

    ``prefill_threads`` are those of :class:`NativeAttention`.
    """
    if device == CPU:
        size = head_size(config)
        if family.caches_latents:
            size = config.kv_lora_rank + config.qk_rope_head_dim
        if takes_heads(config.num_attention_heads, size) and dtype in FORMATS:
            return NativeAttention(sliding_window, prefill_threads=prefill_threads)
        return GatheredAttention(sliding_window)
    if family.caches_latents:
        reason = "keys and values of latents have other sizes"
    elif family.caps_scores:
        reason = "it has neither capped scores nor sinks"
    else:
        heads = config.num_attention_heads, config.num_key_value_heads
        reason = why_not_varlen(device, dtype, heads, head_size(config))
    if reason:
        logger.warning("attention on %s gathers the cache's pages: %s", device, reason)
        return GatheredAttention(sliding_window, masks_all=True)
    return VarlenAttention(sliding_window)


def make_cache(
    attention: Attention,
    family: Family,
    config: Any,
    num_pages: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PagedCache:
    """Return a cache of ``num_pages`` pages in the layout that ``attention`` reads."""
    layers, pages = config.num_hidden_layers, (num_pages, attention.page_size)
    if family.caches_latents:
        latent, rotary = config.kv_lora_rank, config.qk_rope_head_dim
        return LatentCache(layers, pages, latent, rotary, dtype, device)
    heads = config.num_key_value_heads, head_size(config)
    if isinstance(attention, NativeAttention):
        return NativeCache(layers, num_pages, *heads, dtype)
    return PagedCache(layers, pages, *heads, dtype, device)


def head_size(config: Any) -> int:
    """Return the size of a head by transformers' ``config``."""
    size: int | None = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads
