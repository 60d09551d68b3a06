"""Caches of every layout keep what is stored, and attention is chosen with the cache it reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import native as built
from experts.families.base import Family
from router.model.attention.paged import GatheredAttention
from router.model.attention_choice import choose_attention, make_cache
from router.model.cpu import native_attention
from router.model.cpu.native_attention import NativeAttention, NativeCache
from router.model.kv_cache import LatentCache, PagedCache
from tests.emulated_device import emulated_device

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE = built.native is not None
KINDS = ["paged", "latent", *(["native"] if NATIVE else [])]


def cache_of(kind: str, heads: int, size: int, dtype: torch.dtype) -> PagedCache:
    """Return two layers of two pages, of sevens."""
    if kind == "native":
        cache: PagedCache = NativeCache(2, 2, heads, size, dtype)
    elif kind == "latent":
        cache = LatentCache(2, (2, 16), size - size // 3, size // 3, dtype, CPU)
    else:
        cache = PagedCache(2, (2, 16), heads, size, dtype, CPU)
    for stored in (*cache.keys, *cache.values):
        stored.fill_(7)
    return cache


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    num_heads=st.integers(1, 4),
    num_tokens=st.integers(1, 32),
    size=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_new_keys_and_values_come_to_their_slots_and_nowhere_else(
    kind: str, seed: int, num_heads: int, num_tokens: int, size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_heads = 1 if kind == "latent" else num_heads
    both = torch.randn(num_tokens, 2 * num_heads + 1, size, generator=generator).to(dtype)
    key = both[:, :num_heads].transpose(0, 1)
    value = both[:, num_heads + 1 :].transpose(0, 1)
    cache = cache_of(kind, num_heads, size, dtype)
    if kind == "latent":
        value = key[..., : size - size // 3]
    slots = torch.randperm(32, generator=generator)[:num_tokens]
    cache.store(1, slots, key, value)
    everywhere = torch.arange(32).view(2, 16)
    for layer_id, is_stored in ((0, False), (1, True)):
        for gathered, rows in zip(cache.gather(layer_id, everywhere), (key, value), strict=True):
            expected = torch.full((len(rows), 32, rows.shape[2]), 7, dtype=dtype)
            if is_stored:
                expected[:, slots] = rows
            assert torch.equal(gathered.reshape(expected.shape), expected)
    before = [stored.clone() for stored in (*cache.keys, *cache.values)]
    cache.store(1, slots[:0], key[:, :0], value[:, :0])
    assert all(map(torch.equal, before, (*cache.keys, *cache.values)))


@pytest.mark.parametrize("kind", ["paged", *(["native"] if NATIVE else [])])
@pytest.mark.parametrize(
    ("key_dtype", "key_shape"),
    [
        (torch.float16, (2, 3, 8)),
        (torch.bfloat16, (2, 3, 9)),
        (torch.bfloat16, (1, 3, 8)),
        (torch.bfloat16, (2, 4, 8)),
    ],
    ids=["another dtype", "other sizes", "fewer heads", "more tokens than slots"],
)
def test_what_does_not_fit_the_cache_is_refused(
    kind: str, key_dtype: torch.dtype, key_shape: tuple[int, ...]
) -> None:
    cache = cache_of(kind, 2, 8, torch.bfloat16)
    wrong = torch.ones(key_shape, dtype=key_dtype)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        cache.store(0, torch.arange(3), wrong, wrong)
    assert (cache.keys[0] == 7).all()


def test_memory_for_gathered_rows_grows_seldom_and_is_there_once() -> None:
    with emulated_device() as emulated:
        cache = PagedCache(1, (64, 16), 2, 8, torch.float32, emulated.device)
        held_bytes, sizes = torch.accelerator.memory_allocated(), set()
        for length in range(1, 1025):  # a token more in each step
            slots = torch.arange(length, device=emulated.device).view(1, -1)
            keys, values = cache.gather(0, slots)
            assert keys.shape == values.shape == (2, 1, length, 8)
            gathered: Any = keys
            sizes.add(gathered.inner.untyped_storage().nbytes())
        del keys, values, slots, gathered
        assert len(sizes) < 25
        row_bytes = 2 * 2 * 8 * 4
        peak_bytes = torch.accelerator.max_memory_allocated() - held_bytes
        assert peak_bytes <= 1.5 * 1024 * row_bytes + 8 * 8 * 1024


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_takes_as_many_bytes_as_its_values(kind: str, dtype: torch.dtype) -> None:
    heads, parts = (1, 1) if kind == "latent" else (3, 2)
    cache = cache_of(kind, heads, 40, dtype)
    assert cache.num_bytes == 2 * 32 * heads * 40 * parts * dtype.itemsize


@pytest.mark.parametrize("caches_latents", [True, False])
@pytest.mark.parametrize("has_native", [True, False] if NATIVE else [False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_processor_attends_natively_what_native_code_takes(
    dtype: torch.dtype, has_native: bool, caches_latents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_native:
        monkeypatch.setattr(native_attention, "native", None)
    family: Family = SimpleNamespace(caches_latents=caches_latents, caps_scores=True)
    config = SimpleNamespace(
        num_hidden_layers=2, num_key_value_heads=2, hidden_size=32, num_attention_heads=4,
        kv_lora_rank=5, qk_rope_head_dim=3,
    )  # fmt: skip
    attention = choose_attention(family, config, 4, dtype, CPU)
    cache = make_cache(attention, family, config, 3, dtype, CPU)
    is_native = has_native and dtype != torch.float64
    assert type(attention) is (NativeAttention if is_native else GatheredAttention)
    kinds = LatentCache if caches_latents else NativeCache if is_native else PagedCache
    assert type(cache) is kinds
