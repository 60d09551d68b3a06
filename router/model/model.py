"""Loads the model that a router runs: transformers' class without its experts.

Embedding, attention, norms, the gate and the output head are loaded. A module without parameters
stands where the experts were, so a router never reads or holds an expert's weight. Of the modules
:class:`router.model.decoder.Decoder` is made, which runs them.
"""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cluster.device import CPU, check_room, room_told
from cluster.errors import CheckpointError
from cluster.heap import give_back_freed
from cluster.staging import Staging
from cluster.wire.tensors import dtype_name, from_array
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.expert_weights import read_tensor
from experts.families.base import Family
from router.model.attention.latent import LATENT_ATTENTION_NAME, keep_latents, latent_attention
from router.model.attention.paged import ATTENTION_NAME, paged_attention
from router.model.attention_choice import choose_attention, head_size, make_cache
from router.model.decoder import AttentionHalf, Decoder
from router.model.grok import register_grok
from router.model.lean_transformers import ALL_ATTENTION_FUNCTIONS, transformers
from router.model.memory import router_sizes
from router.model.own_values import own_value
from router.model.page_pool import pages_needed
from router.model.parts import (
    RemoteExperts,
    embedding_of,
    has_torch_products,
    head_of,
    is_wholly_native,
    layers_of,
    norm_of,
    take_gates,
    take_native,
)
from router.model.routed import routed_layers
from router.moe.device_rows import copy_bytes
from router.moe.layer import MoELayers

_REPLACING = threading.Lock()
_FIELD = "args.router.cache_tokens"


@contextmanager
def experts_replaced(family: Family) -> Iterator[None]:
    """Make transformers build ``RemoteExperts`` where the family's block asks for its experts."""
    if family.experts_class is None:
        yield
        return
    name = family.model_type  # transformers names a module by it
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    with _REPLACING:
        original = getattr(module, family.experts_class)
        setattr(module, family.experts_class, RemoteExperts)
        try:
            yield
        finally:
            setattr(module, family.experts_class, original)


def attention_name(family: Family) -> str:
    """Return the name under which transformers finds a family's attention, and register it."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
    ALL_ATTENTION_FUNCTIONS.register(LATENT_ATTENTION_NAME, latent_attention)
    return LATENT_ATTENTION_NAME if family.caches_latents else ATTENTION_NAME


def load_dense(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Build transformers' model from everything in the checkpoint but the experts.

    Raises :class:`CheckpointError` when transformers cannot make a model of the configuration, and
    when the checkpoint lacks a tensor that the router needs.
    """
    with experts_replaced(checkpoint.family):
        model_class, config = class_of(checkpoint)
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=_weights(checkpoint, dtype),
            dtype=dtype,
            attn_implementation=attention_name(checkpoint.family),
            output_loading_info=True,
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise CheckpointError(f"lacks tensors of the router: {missing}", str(checkpoint.folder))
    model.eval()
    model.requires_grad_(False)
    return model


def class_of(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """Return transformers' class and configuration of a model; raises :class:`CheckpointError`."""
    register_grok()
    try:
        values = dict(checkpoint.family.transformers_config(checkpoint.config))
        values.pop("quantization_config", None)  # the router dequantises weights at loading
        config = transformers.AutoConfig.for_model(**values)
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config
    except Exception as error:  # transformers raises many kinds for a value of a wrong kind
        file = checkpoint.folder / "config.json"
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"transformers refuses it ({reason})", str(file)) from error


def _weights(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the dense tensors, from the files that were checked when the checkpoint was opened.

    Given a folder, transformers would choose files by its own rules: a single file before an index,
    and any file that ``config.json`` names as ``transformers_weights``, which may be a pickle.
    """
    names = checkpoint.family.dense_tensors(checkpoint.config)
    module_names = checkpoint.family.module_names(checkpoint.config)
    state = {
        module_names.get(name, name): from_array(read_tensor(checkpoint, name, dtype_name(dtype)))
        for name in names
    }
    if checkpoint.remote is not None:
        checkpoint.remote.release()
    return state


class MoEModel:
    """A model without its experts: its ``decoder``, with a cache of ``num_pages`` pages.

    ``attention`` makes the views of the steps that ``decoder`` runs. ``is_native`` is true where
    native code computes all of it. ``is_independent`` says that a token's bits depend on no other
    request of its steps, and not on where chunks end. ``even_context`` is the number of earlier
    tokens that cost a token as much to attend to as all of its products with weights do.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        cache_tokens: int,
        layers: MoELayers[torch.Tensor],
        device: torch.device = CPU,
        prefill_threads: int = 1,
    ) -> None:
        """Load the dense part to ``device``, and make a cache of ``cache_tokens`` there.

        On a CPU ``prefill_threads`` compute the attention of prefills. The cache has whole pages,
        of the size that its attention reads. Raises
        :class:`UnavailableError` where an accelerator has too little memory for both.
        """
        needed_bytes = 0
        if device != CPU:
            sizes = router_sizes(checkpoint.family, checkpoint.config)
            num_slots = sizes.cache_slots(cache_tokens, dtype.itemsize)
            needed_bytes = sizes.held_bytes(num_slots, dtype.itemsize)
            check_room(device, needed_bytes, _FIELD)
        model = load_dense(checkpoint, dtype)
        with room_told(device, needed_bytes, _FIELD):
            self._place(model, checkpoint, dtype, cache_tokens, layers, device, prefill_threads)
        give_back_freed()

    def _place(
        self,
        model: Any,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        cache_tokens: int,
        layers: MoELayers[torch.Tensor],
        device: torch.device,
        prefill_threads: int,
    ) -> None:
        """Move the modules of ``model`` to the device, and make a decoder and a cache there."""
        family = checkpoint.family
        self._shape, self._dtype = checkpoint.shape, dtype
        config = model.config
        # Some families write 0 for no window, others leave the key out.
        window: int | None = own_value(config, "sliding_window") or None
        self.attention = choose_attention(family, config, window, dtype, device, prefill_threads)
        self.num_pages = pages_needed(cache_tokens, self.attention.page_size)
        self.even_context = _even_context(model, checkpoint)
        model.to(device)
        self._staging = staging = None if device == CPU else Staging(device)
        take_gates(model, checkpoint)
        keep_latents(model)
        base = model.base_model
        halves: list[AttentionHalf] = []
        rotate = base.rotary_emb
        if staging is None:
            halves, rotate = take_native(model, getattr(config, "hidden_act", ""))
        self.is_native = is_wholly_native(model, halves)
        self.is_independent = self.attention.is_independent and not has_torch_products(model)
        decoder_layers = layers_of(base, halves, layers, staging)
        self.decoder = Decoder(
            embedding_of(base),
            rotate,
            decoder_layers,
            norm_of(base),
            head_of(model),
            make_cache(self.attention, family, config, self.num_pages, dtype, device),
            self.attention,
            layers_with_window(config),
            staging,
            routed_layers(decoder_layers),
        )

    def reserve(self, max_batch_tokens: int) -> None:
        """Pin the host's memory for a layer's copies of so many tokens, where on a device.

        What long prompts need beyond, of indices and masks of gathered pages, is pinned later.
        """
        if self._staging is not None:
            shape = self._shape
            row_bytes = shape.hidden_size * self._dtype.itemsize
            sizes = max_batch_tokens, row_bytes, shape.num_experts, shape.num_experts_per_tok
            self._staging.reserve(copy_bytes(*sizes), max_batch_tokens * row_bytes)


def _even_context(model: Any, checkpoint: Checkpoint) -> float:
    """Return :attr:`MoEModel.even_context`, counted in multiplications."""
    config, shape = model.config, checkpoint.shape
    base = model.base_model
    num_weights = sum(weight.numel() for weight in base.parameters())
    num_weights -= base.get_input_embeddings().weight.numel()
    num_weights += len(shape.layers) * shape.num_experts_per_tok * shape.expert_parameters
    if checkpoint.family.caches_latents:
        pair_size = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    else:
        pair_size = 2 * head_size(config)
    num_layers = config.num_hidden_layers
    if any(windows := layers_with_window(config)):
        num_layers = len(windows) - sum(windows)
    per_token = num_layers * config.num_attention_heads * pair_size
    return num_weights / per_token if per_token else math.inf


def layers_with_window(config: Any) -> tuple[bool, ...]:
    """Return for each layer whether it has a sliding window; layers may differ."""
    kinds = own_value(config, "layer_types")
    if kinds is not None:
        return tuple(kind == "sliding_attention" for kind in kinds)
    return (bool(own_value(config, "sliding_window")),) * config.num_hidden_layers
