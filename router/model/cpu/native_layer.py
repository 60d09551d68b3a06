"""One layer in native calls: attention between two norms, and the gate.

One call is the attention of a layer of Llama's shape. A layer has this shape if its attention
has one product each for queries, keys and values, or one for all of them, rotates whole heads (Su
et al. 2021), and adds its output to the residual stream. Heads may have biases, norms, a clip and
sinks. Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DBRX and GPT-OSS have it. The latent attention of
DeepSeek and Grok's layer with four norms have not.

Dimension letters: T tokens, H hidden size, Q query heads, G key/value heads, D head size, E
experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.native import native
from cluster.wire.tensors import MicrobatchBuffers, to_bytes
from experts.families.base import GateSpec
from router.model.attention.interface import Attention, PagedBatch, Scoring
from router.model.attention.paged import PagedContext
from router.model.cpu.formats import FORMATS
from router.model.cpu.llama_shape import clip_of, head_norms_of, inputs_of, output_of
from router.model.cpu.native_attention import COLUMNS, ROWS, NativeAttention, NativeCache
from router.model.cpu.native_modules import (
    NativeLinear,
    NativeNorm,
)
from router.model.kv_cache import PagedCache
from router.moe.gate import Choice, Gate

MIN_POSITIONS = 1024
"""The least size of the table of a rotary embedding."""
_SCORES = {"softmax": 0, "sigmoid": 1, "softmax_of_chosen": 2}


@dataclass(frozen=True, slots=True, eq=False)
class AttentionWorkspace:
    """What the attention halves of a piece share: arguments, and memory for ``normed`` [T, H].

    ``before`` and ``after`` are arguments of native code, of which the layer's own lie between.
    """

    residual: torch.Tensor
    rotation: torch.Tensor
    normed: torch.Tensor
    dtype: torch.dtype
    before: tuple[memoryview, ...]
    after: int

    @classmethod
    def of(
        cls, residual: torch.Tensor, rotation: torch.Tensor, batch: PagedBatch
    ) -> AttentionWorkspace:
        """Return the room of a piece; raises ``ValueError`` where the residual is in parts."""
        if not residual.is_contiguous():  # what is added would go to a copy
            raise ValueError("the residual stream must be contiguous")
        normed, view = torch.empty_like(residual), batch.view
        tensors = map(to_bytes, (residual, rotation, batch.new_slots))
        before = *tensors, view.spans, view.pages, to_bytes(normed)
        return cls(residual, rotation, normed, residual.dtype, before, view.threads)


class NativeAttentionHalf:
    """Norm, attention, residual and the next norm of one layer, from packed copies of weights."""

    def __init__(self, norm: nn.Module, attention: Any, next_norm: nn.Module) -> None:
        """Pack the weights of transformers' modules, which are not kept."""
        self._layer_id: int = attention.layer_idx
        self._scaling: float = attention.scaling
        size = self.head_size = int(attention.head_dim)
        self._norm, self._next_norm = NativeNorm(norm), NativeNorm(next_norm)
        weight, bias = inputs_of(attention)
        output = output_of(attention)
        self._num_q = output.weight.shape[1] // size
        self._num_kv = (len(weight) // size - self._num_q) // 2
        self._inputs = NativeLinear(weight, bias)
        self._output = NativeLinear(output.weight, output.bias)
        self._sinks: torch.Tensor | None = getattr(attention, "sinks", None)
        self._head_weights, self._head_norms, head_epsilon = head_norms_of(attention)
        clip = clip_of(attention)
        self._factors = self._norm.epsilon, head_epsilon, math.inf if clip is None else clip
        self._cache: PagedCache | None = None
        self._attention: Attention | None = None

    def __call__(
        self,
        residual: torch.Tensor,
        output: torch.Tensor | None,
        rotation: torch.Tensor | tuple[torch.Tensor, ...],
        paged: PagedContext,
    ) -> torch.Tensor:
        """See :class:`router.model.decoder.AttentionHalf`.

        ``rotation`` are the angles of :class:`NativeRotation`. ``paged`` has native attention and
        its cache. The returned rows last until the piece's next layer. Raises ``ValueError`` for
        rows of another dtype than the cache's or that are not contiguous, and for a slot or a page
        beyond it.
        """
        assert native is not None
        assert isinstance(rotation, torch.Tensor)
        parts = self.parts_for(paged)
        room = paged.room
        if room is None or room.residual is not residual or room.rotation is not rotation:
            room = paged.room = AttentionWorkspace.of(residual, rotation, paged.batch)
        if room.dtype != self._dtype:
            raise ValueError(f"rows are {room.dtype}, the cache is {self._dtype}")
        added = None if output is None else to_bytes(output)
        before = room.before
        native.attention_half(before[0], added, *before[1:], parts, room.after)
        return room.normed

    def parts_for(self, paged: PagedContext) -> tuple[Any, ...]:
        """Return what native code takes of the layer, in the order of ``half.c``."""
        if paged.cache is not self._cache or paged.attention is not self._attention:
            self._bind(paged)
        return self._parts

    def _bind(self, paged: PagedContext) -> None:
        """Make the arguments that are the same in every step, for a cache and its attention."""
        cache, attention = paged.cache, paged.attention
        assert isinstance(cache, NativeCache)
        assert isinstance(attention, NativeAttention)
        num_q, num_kv, size = self._num_q, self._num_kv, self.head_size
        keys, values = cache.keys[self._layer_id], cache.values[self._layer_id]
        scoring = Scoring(self._scaling, None, self._sinks, paged.has_window[self._layer_id])
        inputs, output, norm, next_norm = self._inputs, self._output, self._norm, self._next_norm
        row_format, num_pages = FORMATS[keys.dtype], len(keys)
        input_formats = inputs.format, row_format, inputs.has_bias, norm.kind
        output_formats = output.format, row_format, output.has_bias, next_norm.kind
        strides = (num_q + 2 * num_kv) * size, size
        self._cache, self._attention, self._dtype = cache, attention, keys.dtype
        self._parts = (
            norm.weight,
            inputs.packed,
            self._head_weights,
            (inputs.in_features, num_q, num_kv, size, *input_formats, *self._head_norms),
            self._factors,
            to_bytes(keys),
            to_bytes(values),
            (row_format, COLUMNS, num_pages, num_kv, size, *strides),
            (row_format, ROWS, num_pages, num_kv, size, *strides),
            (row_format, keys.itemsize, num_pages, num_kv, num_q, size),
            attention.numbers_of(scoring),
            None if self._sinks is None else to_bytes(self._sinks.float()),
            attention.kernel,
            output.packed,
            next_norm.weight,
            (output.in_features, output.out_features, *output_formats),
            next_norm.epsilon,
        )


class NativeRotation:
    """The rotary embedding of a model whose attention is native, a table by position.

    The angles of a position are the same in every step. They are float32. The table grows to the
    positions that occur.
    """

    def __init__(
        self, rotary_embedding: Callable[[torch.Tensor, torch.Tensor], Any], head_size: int
    ) -> None:
        """``rotary_embedding`` returns cosines and sines [1, T, D] or [1, T, D / 2]."""
        self._rotary_embedding = rotary_embedding
        self._half = head_size // 2
        self._extend(MIN_POSITIONS)

    def __call__(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the cosines and then the sines, [1, T, D], of positions [1, T]."""
        try:
            return torch.embedding(self._table, positions)
        except IndexError:  # a position beyond the table
            self._extend(int(positions.max()) + 1)
        return torch.embedding(self._table, positions)

    def _extend(self, num_positions: int) -> None:
        """Make a table of at least so many positions, a power of two."""
        size = 1 << (num_positions - 1).bit_length()
        float32 = torch.empty(0)  # its dtype is that of the angles
        cosines, sines = self._rotary_embedding(float32, torch.arange(size).unsqueeze(0))
        self._table = torch.cat((cosines[0, :, : self._half], sines[0, :, : self._half]), dim=1)


class NativeGate(Gate):
    """The gate of a family on a CPU; of equal scores that of the lower id comes first.

    Logits and scores are float32, also where transformers rounds them to the model's dtype. Only
    the weights have the dtype that they have there.
    """

    def __init__(
        self,
        spec: GateSpec,
        top_k: int,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        correction: torch.Tensor | None = None,
    ) -> None:
        """Pack copies of ``weight`` [E, H] and ``bias`` [E]; ``correction`` [E] as in `Gate`."""
        product = NativeLinear(weight, bias)
        super().__init__(spec, top_k, product, correction, has_native_logits=True)
        self._product = product
        norm = spec.norm_exponent is not None
        self._spec_numbers = (
            _SCORES[spec.score],
            int(spec.weights_are_of_all),
            int(spec.renormalises),
            int(norm),
            spec.num_groups,
            spec.topk_groups,
            spec.best_of_group,
        )
        self._factors = spec.scaling_factor, self._below_all()
        self._numbers: dict[torch.dtype, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._correction_bytes = None if self._correction is None else to_bytes(self._correction)

    def choose(
        self,
        hidden_states: torch.Tensor,
        allowed: torch.Tensor | None = None,
        forced: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`router.moe.gate.Gate.choose`."""
        ids = None if forced is None else forced.numpy()
        choice = self.choice(hidden_states, ids, allowed)
        return torch.from_numpy(choice.ids), choice.weights

    def choice(
        self,
        hidden_states: torch.Tensor,
        forced: np.ndarray | None = None,
        allowed: torch.Tensor | None = None,
        *,
        room: MicrobatchBuffers | None = None,
    ) -> Choice:
        """See :meth:`router.moe.gate.Gate.choice`; ``allowed`` as in :meth:`choose`.

        Raises ``ValueError`` for a forced id that the layer does not have.
        """
        assert native is not None
        dtype = hidden_states.dtype
        if dtype not in self._numbers:
            self._numbers[dtype] = self._numbers_for(dtype)
        weights_dtype, sizes = self._numbers[dtype]
        room = room or MicrobatchBuffers()
        shape = hidden_states.shape[0], self._top_k  # `len` of a tensor is Python
        ids, weights = room.choice(shape, weights_dtype)
        native.choose(
            room.bytes_of("rows", hidden_states),
            self._product.packed,
            self._correction_bytes,
            None if allowed is None else to_bytes(allowed),
            ids,
            room.bytes_of("weights", weights),
            sizes,
            self._factors,
            torch.get_num_threads(),
            None,
            forced,
        )
        return Choice(ids, weights)

    def _numbers_for(self, hidden_dtype: torch.dtype) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return the dtype of the weights and native code's sizes for a dtype of hidden states."""
        product, dtype = self._product, self._weights_dtype(hidden_dtype)
        formats = product.format, FORMATS[hidden_dtype], FORMATS[dtype], product.has_bias
        sizes = product.in_features, product.out_features, self._top_k
        return dtype, (*sizes, *formats, *self._spec_numbers)

    def _weights_dtype(self, hidden_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the weights for hidden states of ``hidden_dtype``."""
        spec = self._spec
        are_wide = "logits" in spec.float32 or (
            "scores" in spec.float32 and spec.score == "softmax"
        )
        return torch.float32 if are_wide and not self._rounds_weights else hidden_dtype


class NativeShare(nn.Module):
    """The weight of a shared expert (Qwen2-MoE): a sigmoid, the same in any company."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Pack a copy of ``weight`` [1, H]."""
        super().__init__()
        self._gate = NativeGate(GateSpec(score="sigmoid"), 1, weight, None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map hidden states [T, H] to weights [T, 1]."""
        return self._gate.choose(hidden_states)[1]


MAX_EXPERTS = 1 << 16
"""The most experts of a layer (``native/experts/gate.c``)."""


def can_choose(spec: GateSpec, weight: torch.Tensor) -> bool:
    """Return whether :class:`NativeGate` computes a gate; a norm must be that of exponent 1."""
    return (
        native is not None
        and weight.is_cpu
        and weight.dtype in FORMATS
        and len(weight) <= MAX_EXPERTS
        and spec.norm_exponent in (None, 1, 1.0)
        and math.isfinite(spec.scaling_factor)
    )
