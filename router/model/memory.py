"""The memory of a router's model, from its configuration alone: pure functions.

A model on a device holds its weights and its cache, and computes a step in memory that it frees
again. :class:`router.model.model.MoEModel` checks its device by these sizes before it loads
anything, and ``expertmesh plan`` shows them.

Dimension letters: T packed tokens, B decoding sequences, L cached tokens of the longest sequence,
Q query heads, G key/value heads, D size of a head's key and value together, H hidden size, K
experts per token, R rows to sample, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from experts.families.base import Config, Family, head_sizes, size
from router.model.page_pool import pages_needed

if TYPE_CHECKING:
    from router.config.deployment import RouterConfig

FLOAT32_BYTES, HALF_BYTES, INDEX_BYTES = 4, 2, 8
PAGE_SIZE, VARLEN_PAGE_SIZE = 16, 256
VARLEN_HEAD_STEP, VARLEN_MAX_HEAD = 8, 256
"""What :mod:`router.model.attention.varlen` and :mod:`router.model.attention.paged` demand, without
an import of torch."""
_HIDDEN_COPIES, _HIDDEN_FLOAT32_COPIES = 6, 3
"""Hidden states [T, H] of a layer at one time: residual, normed, the experts' rows on their way to
the host and back; and the float32 values of a norm."""
_PROJECTION_COPIES = 4
"""Queries, keys and values [T, (Q + G) D] at one time: plain, rotated, and a rotation's parts."""
_INNER_COPIES = 4
"""Values [T, I] of a dense or shared gated feed-forward layer of inner size I at one time."""
_SCORE_COPIES = 3
"""Float32 scores of an attention at one time: plain, with sinks, after the softmax."""
_SAMPLING_BYTES = 48
"""Bytes for each logit while tokens are drawn: six values of 8 bytes
(:mod:`router.engine.sampling`)."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step of a router: B sequences that decode, T tokens, L cached tokens of one."""

    max_batch_size: int
    max_batch_tokens: int
    longest: int

    @classmethod
    def of(cls, router: RouterConfig, max_model_len: int) -> StepLimits:
        """Return the largest step of a configured router of a model."""
        longest = min(max_model_len, router.cache_tokens_for(max_model_len))
        return cls(router.max_batch_size, router.max_batch_tokens, longest)


@dataclass(frozen=True, slots=True)
class RouterSizes:
    """The sizes of a model's dense part.

    ``float32_parameters`` of the ``parameters`` are float32 whatever the model's dtype is: a gate
    that computes its logits in float32, and its corrections. ``cached_head_values`` is G times the
    size of a cached key and value together; a latent counts once. ``head_values`` is the size of a
    key and a value as the attention computes with them. ``inner_size`` is that of the widest dense
    or shared feed-forward layer. ``caches_latents`` and ``caps_scores`` are those of the family.
    """

    parameters: int
    float32_parameters: int
    num_layers: int
    cached_head_values: int
    head_values: int
    query_heads: int
    hidden_size: int
    inner_size: int
    num_experts: int
    num_experts_per_tok: int
    vocab_size: int
    caches_latents: bool
    caps_scores: bool

    def reads_pages(self, value_bytes: int) -> bool:
        """Return whether attention on a device reads the cache in place, and gathers nothing.

        So it is by :func:`router.model.attention_choice.choose_attention`, where torch has such an
        attention for the device.
        """
        head_size = self.head_values // 2
        fits = head_size % VARLEN_HEAD_STEP == 0 and head_size <= VARLEN_MAX_HEAD
        return fits and value_bytes == HALF_BYTES and not (self.caches_latents or self.caps_scores)

    def cache_slots(self, num_tokens: int, value_bytes: int) -> int:
        """Return the slots of the whole pages of a device's cache of ``num_tokens`` tokens."""
        page_size = VARLEN_PAGE_SIZE if self.reads_pages(value_bytes) else PAGE_SIZE
        return pages_needed(num_tokens, page_size) * page_size

    def weight_bytes(self, value_bytes: int) -> int:
        """Return the bytes of the weights; tables of a rotation (a kilobyte) are left out."""
        plain = self.parameters - self.float32_parameters
        return plain * value_bytes + self.float32_parameters * FLOAT32_BYTES

    def cache_bytes(self, num_tokens: int, value_bytes: int) -> int:
        """Return the bytes of a key/value cache of ``num_tokens`` tokens."""
        return num_tokens * self.num_layers * self.cached_head_values * value_bytes

    def held_bytes(self, num_tokens: int, value_bytes: int) -> int:
        """Return the bytes that a router holds from its start to its end: weights and cache."""
        return self.weight_bytes(value_bytes) + self.cache_bytes(num_tokens, value_bytes)

    def step_bytes(
        self, limits: StepLimits, value_bytes: int, reads_pages: bool | None = None
    ) -> int:
        """Return the most bytes that a step takes beside the weights and the cache.

        ``reads_pages`` says whether its attention does; by default it is :meth:`reads_pages`. The
        gathered keys and values stay between steps. Of the rest, one part is computed at a
        time: the attention, the feed-forward layers, or the logits and their sampling.
        """
        if reads_pages is None:
            reads_pages = self.reads_pages(value_bytes)
        num_tokens = limits.max_batch_tokens
        hidden = num_tokens * self.hidden_size
        hidden_bytes = hidden * (
            _HIDDEN_COPIES * value_bytes + _HIDDEN_FLOAT32_COPIES * FLOAT32_BYTES
        )
        inner_bytes = num_tokens * self.inner_size * _INNER_COPIES * value_bytes
        gate_bytes = (
            num_tokens
            * (4 * self.num_experts + 6 * self.num_experts_per_tok)
            * (FLOAT32_BYTES + INDEX_BYTES)
        )
        return (
            self._gathered_bytes(limits, value_bytes, reads_pages)
            + hidden_bytes
            + max(
                self._attention_bytes(limits, value_bytes, reads_pages),
                inner_bytes + gate_bytes,
                self._sampling_bytes(limits, value_bytes),
            )
        )

    def _gathered_bytes(self, limits: StepLimits, value_bytes: int, reads_pages: bool) -> int:
        """Return the bytes of a layer's gathered keys and values [B, L, G D], or of page tables.

        All sequences are padded to the longest. The memory grows by half
        (:class:`router.model.kv_cache.PagedCache`). Each slot is an index, with masks for layers
        with and without a window.
        """
        slots = limits.max_batch_size * limits.longest
        if reads_pages:
            return slots // VARLEN_PAGE_SIZE * INDEX_BYTES
        return slots * (self.cached_head_values * value_bytes * 3 // 2 + INDEX_BYTES + 2)

    def _attention_bytes(self, limits: StepLimits, value_bytes: int, reads_pages: bool) -> int:
        """Return the bytes of an attention's projections, outputs and masks, and of its scores.

        Only :mod:`router.model.attention.capped` has all scores [Q, T, L] at once.
        """
        num_tokens, longest = limits.max_batch_tokens, limits.longest
        projected = num_tokens * self.query_heads * self.head_values
        num_bytes = projected * _PROJECTION_COPIES * value_bytes
        if not reads_pages:
            num_bytes += num_tokens * longest * (2 + value_bytes)  # masks, and one to add to scores
        if self.caps_scores:
            scores = self.query_heads * num_tokens * longest
            num_bytes += scores * _SCORE_COPIES * FLOAT32_BYTES
        return num_bytes

    def _sampling_bytes(self, limits: StepLimits, value_bytes: int) -> int:
        """Return the bytes of the logits [R, V] in the model's dtype and in float32, and more."""
        logits = limits.max_batch_size * self.vocab_size
        return logits * (value_bytes + FLOAT32_BYTES + _SAMPLING_BYTES)


def router_sizes(family: Family, config: Config) -> RouterSizes:
    """Return the sizes of a model's dense part, of a checked configuration with usual keys.

    Raises ``KeyError``, ``ValueError`` or ``TypeError`` for a size of a wrong kind.
    """
    dense = family.dense_tensors(config)
    shape = family.expert_shape(config)
    widens_gate = "logits" in family.gate(config).float32
    in_float32 = family.in_float32 if widens_gate else ()
    heads, _, head_size = head_sizes(config)
    cached, head_values = family.cache_values(config), 2 * head_size
    if family.caches_latents:  # queries are projected to latents; a value is a part of its key
        head_values = cached + size(config, "kv_lora_rank")
    return RouterSizes(
        parameters=sum(map(prod, dense.values())),
        float32_parameters=sum(
            prod(dense[name]) for name in dense if in_float32 and name.endswith(in_float32)
        ),
        num_layers=config["num_hidden_layers"],
        cached_head_values=cached,
        head_values=head_values,
        query_heads=heads,
        hidden_size=shape.hidden_size,
        inner_size=max((s[0] for name, s in dense.items() if ".mlp." in name), default=0),
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_tok,
        vocab_size=config["vocab_size"],
        caches_latents=family.caches_latents,
        caps_scores=family.caps_scores,
    )
