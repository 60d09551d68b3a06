"""A served folder's model, of which a layer's dense part and an expert are in memory, in float32.

transformers' classes are built without memory, as in :mod:`router.model.model` without experts. A
layer's tensors are read when it is asked for. Every family has the modules that serve it.

Dimension letters: T tokens, L tokens of a sequence, H hidden size, K experts of a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.device import CPU
from cluster.errors import CheckpointError
from cluster.wire.tensors import from_array
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.expert_weights import load_expert, read_tensor
from experts.compute.ffn import ACTIVATIONS, ffn
from router.model.attention.interface import PagedBatch, Span
from router.model.attention.latent import keep_latents
from router.model.attention.paged import GatheredAttention, PagedContext
from router.model.attention_choice import make_cache
from router.model.decoder import DecoderLayer, Map, Rotation
from router.model.model import attention_name, class_of, experts_replaced, layers_with_window
from router.model.own_values import own_value
from router.model.page_pool import pages_needed
from router.model.parts import (
    decoder_layer,
    modules_of_layers,
    norm_of,
    scaled_head,
    take_gates,
    torch_attention,
)
from router.moe.gate import Choice, ChooseAmong
from router.moe.layer import StepContext
from router.moe.missing import Tokens

_DTYPE = "float32"
Made = Callable[[torch.Tensor], torch.Tensor]
"""Maps a layer's inputs [T, H] to the sums [T, H] of new experts."""


class Observer:
    """Sees what passes one layer with experts; this one keeps nothing."""

    def chosen(self, normed: torch.Tensor, ids: np.ndarray, weights: torch.Tensor) -> None:
        """Take the layer's input [T, H] and the gate's choice and weights [T, K]."""

    def computed(self, expert_id: int, weights: torch.Tensor, outputs: torch.Tensor) -> None:
        """Take the outputs [R, H] of an expert for all tokens that chose it, and weights [R]."""

    def result(self, experts: LayerExperts) -> dict[str, np.ndarray]:
        """Return what was seen; the layer's experts may be computed for more.

        The layers behind are passed by what :meth:`LayerExperts.replace` was given.
        """
        return {}


class LayerExperts:
    """The experts of one layer, in place of :class:`router.moe.layer.MoELayers`."""

    def __init__(self, checkpoint: Checkpoint, layer_id: int, observer: Observer | None) -> None:
        self._checkpoint = checkpoint
        self._layer_id = layer_id
        self._observer = observer
        self._act = ACTIVATIONS[checkpoint.shape.activation]
        self._made: Made | None = None

    @property
    def is_replaced(self) -> bool:
        """Whether others take the experts' place."""
        return self._made is not None

    def replace(self, made: Made) -> None:
        """Give the layer other experts, which the observer does not see."""
        self._made = made

    @property
    def num_experts(self) -> int:
        """The experts of the layer."""
        return self._checkpoint.shape.num_experts

    def compute(self, expert_id: int, rows: torch.Tensor) -> torch.Tensor:
        """Apply one expert, which is read for this, to rows [R, H]; returns [R, H]."""
        weights = load_expert(self._checkpoint, self._layer_id, expert_id, _DTYPE)
        return ffn(rows, weights.map(from_array), self._act)

    def may_change(self, context: StepContext, layer_id: int, /) -> bool:
        """Return false: all experts are there."""
        return False

    def begin(
        self,
        context: StepContext,
        layer_id: int,
        rows: Any,
        choice: Choice,
        among: ChooseAmong,
        tokens: Tokens,
        /,
    ) -> torch.Tensor:
        """Return the sums [T, H] of hidden states; see :class:`router.model.decoder.ExpertLayers`.

        The experts are added in the order of their ids, as transformers does.
        """
        if self._made is not None:
            return self._made(rows)
        weights = choice.weights.float()
        if self._observer is not None:
            self._observer.chosen(rows, choice.ids, weights)
        sums = torch.zeros_like(rows)
        for expert_id in np.unique(choice.ids).tolist():
            token_ids, ranks = (torch.from_numpy(n) for n in np.nonzero(choice.ids == expert_id))
            outputs = self.compute(expert_id, rows[token_ids])
            shares = weights[token_ids, ranks]
            if self._observer is not None:
                self._observer.computed(expert_id, shares, outputs)
            sums.index_add_(0, token_ids, outputs * shares.unsqueeze(1))
        return sums

    def finish(self, begun: torch.Tensor, /) -> torch.Tensor:
        """See :class:`router.model.decoder.ExpertLayers`."""
        return begun

    def abandon(self, begun: torch.Tensor, /) -> None:
        """See :class:`router.model.decoder.ExpertLayers`; nothing is under way."""


class LayeredModel:
    """A checkpoint's model: its embedding, each of its layers, and its output head."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Build the modules without memory; raises :class:`CheckpointError`."""
        self.checkpoint = checkpoint
        with experts_replaced(checkpoint.family), torch.device("meta"):
            model_class, config = class_of(checkpoint)
            model: Any = model_class._from_config(
                config, attn_implementation=attention_name(checkpoint.family)
            )
        self._model = model.eval().requires_grad_(False)
        self._one_layer = copy.copy(config)
        self._one_layer.num_hidden_layers = 1
        self._stored = _stored_names(checkpoint, self._model)
        base = self._model.base_model
        self._prefix_of_layers = next(
            f"{name}."
            for name, module in model.named_modules()
            if module is modules_of_layers(base)
        )
        self._windows = layers_with_window(config)
        self._attention = GatheredAttention(own_value(config, "sliding_window") or None)
        self.num_layers = len(modules_of_layers(base))
        # It has no parameters, and its tables must be computed.
        self._rotate = type(base.rotary_emb)(config)

    def rotation(self, num_sequences: int, length: int) -> Rotation:
        """Return the angles of the tokens of sequences in a row, [1, T, ...]."""
        positions = torch.arange(length).repeat(num_sequences).unsqueeze(0)
        rotation: Rotation = self._rotate(torch.empty(1, dtype=torch.float32), positions)
        return rotation

    def embedding(self) -> Map:
        """Load and return the token embedding."""
        embedding = self._model.base_model.get_input_embeddings()
        loaded: Map = self._loaded(embedding, self._name_of(embedding))
        return loaded

    def head(self) -> Map:
        """Load and return the last norm and the output head: hidden states [R, H] to logits."""
        model = self._model
        norm, head = norm_of(model.base_model), model.get_output_embeddings()
        head_name = self._name_of(head)
        if f"{head_name}weight" not in self._stored:  # it is tied
            head_name = self._name_of(model.base_model.get_input_embeddings())
        loaded_norm = self._loaded(norm, self._name_of(norm))
        product = scaled_head(self._loaded(head, head_name), model.config)
        return lambda hidden_states: product(loaded_norm(hidden_states))

    def layer(self, layer_id: int, observer: Observer | None = None) -> Layer:
        """Load and return a layer; the observer sees it where it has experts."""
        modules = modules_of_layers(self._model.base_model)
        module = self._loaded(modules[layer_id], f"{self._prefix_of_layers}{layer_id}.")
        keep_latents(module)
        has_experts = layer_id in self.checkpoint.shape.layers
        take_gates(module, self.checkpoint, (layer_id,) if has_experts else ())
        for part in module.modules():
            if hasattr(part, "layer_idx"):  # the cache has one layer
                part.layer_idx = 0
        experts = LayerExperts(self.checkpoint, layer_id, observer)
        whole = decoder_layer(module, torch_attention(module), experts, None)
        return Layer(whole, self, self._windows[layer_id], experts if has_experts else None)

    def context(self, num_sequences: int, length: int, has_window: bool) -> PagedContext:
        """Return a cache of one layer for sequences in a row, each of which attends to itself."""
        num_tokens = num_sequences * length
        num_pages = pages_needed(num_tokens, self._attention.page_size)
        family = self.checkpoint.family
        cache = make_cache(self._attention, family, self._one_layer, num_pages, torch.float32, CPU)
        slots = np.arange(num_tokens, dtype=np.int64).reshape(num_sequences, length)
        view = self._attention.view([Span(row, 0) for row in slots], 0)
        batch = PagedBatch(torch.from_numpy(slots.reshape(-1)), view)
        return PagedContext(cache, self._attention, batch, (has_window,))

    def _name_of(self, module: Any) -> str:
        return next(f"{n}." for n, found in self._model.named_modules() if found is module)

    def _loaded(self, module: Any, prefix: str) -> Any:
        """Return a copy of a module with its tensors, whose names begin with ``prefix``."""
        module = copy.deepcopy(module)
        for name, _ in (*module.named_parameters(), *module.named_buffers()):
            stored = self._stored.get(prefix + name)
            if stored is None:
                folder = str(self.checkpoint.folder)
                raise CheckpointError(f"lacks a tensor for {prefix}{name}", folder)
            tensor = from_array(read_tensor(self.checkpoint, stored, _DTYPE)).float()
            parent, _, leaf = name.rpartition(".")
            holder = module.get_submodule(parent)
            if leaf in holder._parameters:
                holder._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                holder._buffers[leaf] = tensor
        return module


def _stored_names(checkpoint: Checkpoint, model: Any) -> dict[str, str]:
    """Return the stored name of each of the model's tensors that is not an expert's."""
    # Imported here, after router.model has imported transformers without what it never calls.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    conversions = get_model_conversion_mapping(model)
    converters = [part for part in conversions if isinstance(part, WeightConverter)]
    renamings = [part for part in conversions if not isinstance(part, WeightConverter)]
    own_names = checkpoint.family.module_names(checkpoint.config)
    known = model.state_dict()
    names = {}
    for stored in checkpoint.family.dense_tensors(checkpoint.config):
        name = own_names.get(stored, stored)
        name, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        names[name] = stored
    return names


class Layer:
    """A layer in memory; ``experts`` is ``None`` where it has none."""

    def __init__(
        self,
        layer: DecoderLayer,
        model: LayeredModel,
        has_window: bool,
        experts: LayerExperts | None,
    ) -> None:
        self._layer = layer
        self._model = model
        self._has_window = has_window
        self.experts = experts

    def __call__(
        self, hidden_states: torch.Tensor, rotation: Rotation, length: int
    ) -> torch.Tensor:
        """Map the hidden states [T, H] of sequences of L tokens in a row to those after it."""
        paged = self._model.context(len(hidden_states) // length, length, self._has_window)
        residual = hidden_states.clone(memory_format=torch.contiguous_format)
        normed = self._layer.attend(residual, None, rotation, paged)
        half = self._layer.feed_forward
        tokens = slice(0, len(hidden_states))
        context = StepContext(0.0, (len(hidden_states),), ("strict",))
        return residual + self._layer.finish(half.begin(normed, context, tokens))
