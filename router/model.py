"""The model that a router runs: transformers' class without its experts.

Embedding, attention, norms, the gate (transformers' own router module, so ``topk_ids`` and
``topk_weights`` are its) and the output head are loaded; the experts module is replaced by a
parameter-free one that hands the tokens to an :class:`ExpertExchange`. A router therefore never
reads or holds an expert's weight.

Dimension letters: T packed tokens, R rows to sample, K experts per token, H hidden size, V vocab.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cluster.errors import CheckpointError
from experts.checkpoint import Checkpoint
from experts.families import Family
from experts.weights import read_tensor
from router.attention import fuse_attention
from router.cache import (
    ATTENTION_NAME,
    PagedBatch,
    PagedCache,
    PagedContext,
    length_step,
    paged_attention,
)
from router.gate import ChooseAmong, Gate, chooser
from router.packing import pack_linears

_REPLACING = threading.Lock()


class ExpertExchange(Protocol):
    """Where a layer's tokens go to meet their experts."""

    def __call__(
        self,
        layer_id: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        choose_among: ChooseAmong | None = None,
    ) -> torch.Tensor:
        """Map hidden states [T, H], ids and weights [T, K] to the combined output [T, H].

        ``choose_among`` is the layer's gate, for tokens that must do without an expert.
        """
        ...


class RemoteExperts(nn.Module):
    """Takes the place of a family's experts module; has no parameters."""

    # transformers initialises what is not marked; there is nothing to initialise here.
    _is_hf_initialized = True

    def __init__(self, config: Any) -> None:
        """``config`` is transformers'; layer and exchange are set after the model is built."""
        super().__init__()
        self.layer_id = -1
        self.exchange: ExpertExchange | None = None
        self.choose_among: ChooseAmong | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the combined output of the chosen experts, shaped as ``hidden_states`` are.

        Those are [T, H], or [1, T, H] in families whose block leaves them so.
        """
        if self.exchange is None:
            raise RuntimeError(f"layer {self.layer_id} has no exchange")
        rows = hidden_states.flatten(0, -2)
        combined = self.exchange(self.layer_id, rows, top_k_index, top_k_weights, self.choose_among)
        return combined.view(hidden_states.shape)


@contextmanager
def _experts_replaced(family: Family) -> Iterator[None]:
    """Make transformers build ``RemoteExperts`` where the family's block asks for its experts."""
    module = importlib.import_module(family.experts_module)
    with _REPLACING:
        original = getattr(module, family.experts_class)
        setattr(module, family.experts_class, RemoteExperts)
        try:
            yield
        finally:
            setattr(module, family.experts_class, original)


def load_dense(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Build transformers' model from everything in the checkpoint but the experts.

    Raises :class:`CheckpointError` when a tensor that the router needs did not arrive.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
    with _experts_replaced(checkpoint.family):
        auto, weights = _weights(checkpoint)
        model, info = auto.from_pretrained(
            **weights,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise CheckpointError(f"did not give the router {missing}", str(checkpoint.folder))
    model.eval()
    model.requires_grad_(False)
    return model


def _weights(checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
    """Return transformers' class, and what it loads: the folder, or tensors from another node."""
    family = checkpoint.family
    config = transformers.AutoConfig.for_model(**family.transformers_config(checkpoint.config))
    if checkpoint.remote is None:
        return transformers.AutoModelForCausalLM, {
            "pretrained_model_name_or_path": checkpoint.folder,
            "config": config,
        }
    names = family.dense_tensors(checkpoint.config)
    state = {name: read_tensor(checkpoint, name) for name in names}
    checkpoint.remote.release()
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], {
        "pretrained_model_name_or_path": None,
        "config": config,
        "state_dict": state,
    }


class MoEModel:
    """A model whose experts are elsewhere, run over packed steps."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, cache_slots: int, exchange: ExpertExchange
    ) -> None:
        """Load the dense part and make a cache of ``cache_slots`` tokens."""
        self._model = load_dense(checkpoint, dtype)
        fuse_attention(self._model)
        pack_linears(self._model)
        config = self._model.config
        # Some families say 0 where others say nothing.
        self.sliding_window: int | None = getattr(config, "sliding_window", None) or None
        self._windowed = _windowed_layers(config)
        self.length_step = length_step(dtype, self._model.device)
        self._cache = PagedCache(
            num_layers=config.num_hidden_layers,
            num_slots=cache_slots,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            dtype=dtype,
            device=self._model.device,
        )
        for layer_id, (module, gate) in enumerate(_remote_experts(self._model, checkpoint)):
            module.layer_id = checkpoint.shape.layers[layer_id]
            module.exchange = exchange
            module.choose_among = chooser(gate, checkpoint.family.weights_of_all(checkpoint.config))
        self._base, self._head = self._model.base_model, self._model.get_output_embeddings()

    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: PagedBatch,
        sample_rows: torch.Tensor,
    ) -> torch.Tensor:
        """Run one packed step; returns fp32 logits [R, V] of the rows to sample.

        ``token_ids`` and ``positions`` are [T], ``sample_rows`` [R] indexes into them.
        """
        output = self._base(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            output_router_logits=False,
            paged=PagedContext(self._cache, batch, self._windowed),
        )
        hidden_states = output.last_hidden_state[0].index_select(0, sample_rows)  # [R, H]
        return self._head(hidden_states).float()  # type: ignore[no-any-return]


def _windowed_layers(config: Any) -> tuple[bool, ...]:
    """Return of each layer whether it has a sliding window; layers may differ."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return tuple(kind == "sliding_attention" for kind in kinds)
    return (bool(getattr(config, "sliding_window", None)),) * config.num_hidden_layers


def _remote_experts(model: nn.Module, checkpoint: Checkpoint) -> list[tuple[RemoteExperts, Gate]]:
    """Return each layer's experts, and the gate that stands beside them."""
    found = [
        (module, checkpoint.family.gate_of(block))
        for block in model.modules()
        for module in block.children()
        if isinstance(module, RemoteExperts)
    ]
    if len(found) != len(checkpoint.shape.layers):
        raise CheckpointError(
            f"{len(found)} expert modules were replaced, {len(checkpoint.shape.layers)} expected",
            str(checkpoint.folder),
        )
    return found
