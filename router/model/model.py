"""The model that a router runs: transformers' class without its experts.

Embedding, attention, norms, the gate and the output head are loaded. The experts module is replaced
by a module without parameters, which hands hidden states to :class:`router.moe.layer.MoELayers`. So
a router never reads or holds an expert's weight. :class:`router.moe.gate.Gate` replaces the gate.

Dimension letters: T packed tokens, R rows to sample, K experts per token, H hidden size, V vocab.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cluster.device import CPU, check_room
from cluster.errors import CheckpointError
from cluster.staging import Staging
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.expert_weights import read_tensor
from experts.families.base import Family, GateSpec
from router.model.attention import PagedBatch
from router.model.attention_choice import choose_attention, head_size
from router.model.cpu.packed_linear import pack_linears, product_with
from router.model.cpu.rms_norm import replace_norms
from router.model.fused_attention import fuse_attention
from router.model.grok import register_grok
from router.model.kv_cache import LatentCache, PagedCache
from router.model.latent_attention import LATENT_ATTENTION_NAME, keep_latents, latent_attention
from router.model.memory import router_sizes
from router.model.page_pool import pages_needed
from router.model.paged_attention import (
    ATTENTION_NAME,
    PagedContext,
    paged_attention,
)
from router.model.staged_batch import batch_to_device
from router.moe.gate import Gate
from router.moe.layer import MoELayers, RemoteExperts, StepContext

_REPLACING = threading.Lock()


@contextmanager
def _experts_replaced(family: Family) -> Iterator[None]:
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


def load_dense(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Build transformers' model from everything in the checkpoint but the experts.

    Raises :class:`CheckpointError` when transformers cannot make a model of the configuration, and
    when the checkpoint lacks a tensor that the router needs.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
    ALL_ATTENTION_FUNCTIONS.register(LATENT_ATTENTION_NAME, latent_attention)
    has_latents = checkpoint.family.caches_latents
    with _experts_replaced(checkpoint.family):
        model_class, config = _class_of(checkpoint)
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=_weights(checkpoint, dtype),
            dtype=dtype,
            attn_implementation=LATENT_ATTENTION_NAME if has_latents else ATTENTION_NAME,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise CheckpointError(f"lacks tensors of the router: {missing}", str(checkpoint.folder))
    model.eval()
    model.requires_grad_(False)
    return model


def _class_of(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """Return transformers' class and configuration of a model."""
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
    state = {module_names.get(name, name): read_tensor(checkpoint, name, dtype) for name in names}
    if checkpoint.remote is not None:
        checkpoint.remote.release()
    return state


class MoEModel:
    """A model without its experts, run over packed steps."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        cache_tokens: int,
        layers: MoELayers[torch.Tensor],
        device: torch.device = CPU,
    ) -> None:
        """Load the dense part to ``device``, and make a cache of ``cache_tokens`` there.

        The cache has whole pages, of the size that its attention reads. Raises
        :class:`UnavailableError` where an accelerator has too little memory for both.
        """
        family = checkpoint.family
        if device != CPU:
            sizes = router_sizes(family, checkpoint.config)
            num_slots = sizes.cache_slots(cache_tokens, dtype.itemsize)
            needed_bytes = sizes.held_bytes(num_slots, dtype.itemsize)
            check_room(device, needed_bytes, "args.router.cache_tokens")
        model = load_dense(checkpoint, dtype)
        config = model.config
        # Some families write 0 for no window, others leave the key out.
        window: int | None = getattr(config, "sliding_window", None) or None
        self.attention = choose_attention(family, config, window, dtype, device)
        self.num_pages = pages_needed(cache_tokens, self.attention.page_size)
        self._model = model.to(device)
        self._staging = None if device == CPU else Staging(device)
        _connect(self._model, checkpoint, layers, self._staging)
        keep_latents(self._model)
        if self._staging is None:
            fuse_attention(self._model)
            pack_linears(self._model)
            replace_norms(self._model)
        self._layers = layers
        self._has_window = _layers_with_window(config)
        pages = self.num_pages, self.attention.page_size
        self._cache = _cache_of(config, family, pages, dtype, device)
        self._base, self._head = self._model.base_model, self._model.get_output_embeddings()

    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: PagedBatch,
        sample_rows: torch.Tensor,
        context: StepContext,
        *sampling: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run one packed step; returns fp32 logits [R, V] of the rows to sample, and ``sampling``.

        ``token_ids`` and ``positions`` are [T]; ``sample_rows`` [R] are indices into them. All
        inputs are on the host. Every MoE layer gets ``context``. The logits stay on the model's
        device. ``sampling`` are the tensors that sampling needs there; they come in the same copy.
        """
        others = list(sampling)
        self._layers.context = context
        if self._staging is not None:
            batch, [token_ids, positions, sample_rows, *others] = batch_to_device(
                self._staging, batch, token_ids, positions, sample_rows, *sampling
            )
        # transformers' layers come back to us by paged_attention, Gate.forward and
        # RemoteExperts.forward.
        output = self._base(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            output_router_logits=False,
            paged=PagedContext(self._cache, self.attention, batch, self._has_window),
        )
        hidden_states = output.last_hidden_state[0].index_select(0, sample_rows)  # [R, H]
        return self._head(hidden_states).float(), others

    def to_host(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return tensors of the model's device on the host, by one copy.

        They last until the next step.
        """
        return tensors if self._staging is None else self._staging.to_host(*tensors)


def _cache_of(
    config: Any, family: Family, pages: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> PagedCache:
    layers = config.num_hidden_layers
    if family.caches_latents:
        latent, rotary = config.kv_lora_rank, config.qk_rope_head_dim
        return LatentCache(layers, pages, latent, rotary, dtype, device)
    num_kv_heads = config.num_key_value_heads
    return PagedCache(layers, pages, num_kv_heads, head_size(config), dtype, device)


def _layers_with_window(config: Any) -> tuple[bool, ...]:
    """Return for each layer whether it has a sliding window; layers may differ."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return tuple(kind == "sliding_attention" for kind in kinds)
    return (bool(getattr(config, "sliding_window", None)),) * config.num_hidden_layers


def _connect(
    model: nn.Module,
    checkpoint: Checkpoint,
    layers: MoELayers[torch.Tensor],
    staging: Staging | None,
) -> None:
    """Replace each MoE layer's gate, and set the attributes of its ``RemoteExperts``."""
    family, shape = checkpoint.family, checkpoint.shape
    found = [
        (block, experts)
        for block in model.modules()
        for experts in block.children()
        if isinstance(experts, RemoteExperts)
    ]
    if len(found) != len(shape.layers):
        raise CheckpointError(
            f"{len(found)} expert modules were replaced, {len(shape.layers)} expected",
            str(checkpoint.folder),
        )
    spec = family.gate(checkpoint.config)
    for layer_id, (block, experts) in zip(shape.layers, found, strict=True):
        gate = replace_gate(block, family.gate_module, spec, shape.num_experts_per_tok)
        experts.layer_id, experts.layers = layer_id, layers
        experts.gate, experts.staging = gate, staging


def replace_gate(block: Any, path: str, spec: GateSpec, top_k: int) -> Gate:
    """Replace transformers' gate at ``path`` of ``block``; the :class:`Gate` has its weights."""
    replaced = block.get_submodule(path)
    # Widened once, not in each step as transformers does.
    weight = replaced.weight.float() if "logits" in spec.float32 else replaced.weight
    logits_of = product_with(weight, getattr(replaced, "bias", None))
    gate = Gate(spec, top_k, logits_of, getattr(replaced, "e_score_correction_bias", None))
    block.set_submodule(path, gate)
    if hasattr(block, "route_tokens_to_experts"):
        # DBRX's gate returns logits, from which its block computes weights and ids.
        block.route_tokens_to_experts = itemgetter(1, 2)
    return gate
