"""The parts of transformers' models that a decoder calls, by the names that they have there.

Every family's layer has the same parts: norms, attention, and a mixture or a dense MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cluster.errors import CheckpointError
from cluster.staging import Staging
from experts.checkpoint.checkpoint import Checkpoint
from experts.families.base import GateSpec
from router.model.attention.latent import HeadsLinear, rotate_by_real_products
from router.model.cpu.last_half import attend_wanted
from router.model.cpu.llama_shape import has_llamas_shape
from router.model.cpu.native_layer import (
    NativeAttentionHalf,
    NativeGate,
    NativeRotation,
    NativeShare,
    can_choose,
)
from router.model.cpu.native_modules import (
    NativeLinear,
    NativeNorm,
    can_multiply,
    is_linear,
    replace_modules,
)
from router.model.decoder import (
    AttentionHalf,
    DecoderLayer,
    ExpertLayers,
    FeedForwardHalf,
    Map,
    MoEFeedForward,
)
from router.model.torch_attention import TorchAttention
from router.moe.gate import Gate
from router.moe.layer import StepContext
from router.moe.missing import Tokens

Rotate = Callable[[torch.Tensor, torch.Tensor], Any]
"""A rotary embedding; see :class:`router.model.decoder.Decoder`."""
_ATTENTION_PARTS: tuple[tuple[str, str, str | None, str], ...] = (
    ("input_layernorm", "self_attn", None, "post_attention_layernorm"),
    ("norm_attn_norm.norm_1", "norm_attn_norm.attn", None, "norm_attn_norm.norm_2"),
    ("pre_attn_norm", "attn", "post_attn_norm", "pre_moe_norm"),
)
"""The norm before attention, attention, the norm of its output, the norm before the feed-forward
half: of most families, of DBRX, of Grok-1."""
_FEED_FORWARD_PARTS = ("mlp", "ffn", "moe_block")
_OUTPUT_NORM = "post_moe_norm"
_SHARE = "shared_expert_gate"
"""What maps hidden states to the weight of Qwen2-MoE's shared expert, before a sigmoid."""


class RemoteExperts(nn.Module):
    """Marks the place of a family's experts in transformers' model; has no parameters.

    ``layer_id`` and ``gate`` are set by :func:`take_gates`.
    """

    # Without this mark transformers would initialise the module.
    _is_hf_initialized = True

    def __init__(self, config: Any) -> None:
        """``config`` is transformers' and unused."""
        super().__init__()
        self.layer_id = -1
        self.gate: Gate | None = None


def take_gates(
    model: nn.Module, checkpoint: Checkpoint, layer_ids: Sequence[int] | None = None
) -> None:
    """Number the layers with experts, and take their gates out of ``model``.

    ``layer_ids`` are those of the layers with experts in ``model``, by default all. Raises
    :class:`CheckpointError` where the model has another number of them than the checkpoint.
    """
    family, shape = checkpoint.family, checkpoint.shape
    layer_ids = shape.layers if layer_ids is None else layer_ids
    found = [
        (block, experts)
        for block in model.modules()
        for experts in block.children()
        if isinstance(experts, RemoteExperts)
    ]
    if len(found) != len(layer_ids):
        raise CheckpointError(
            f"{len(found)} expert modules were replaced, {len(layer_ids)} expected",
            str(checkpoint.folder),
        )
    spec = family.gate(checkpoint.config)
    for layer_id, (block, experts) in zip(layer_ids, found, strict=True):
        experts.layer_id = layer_id
        experts.gate = take_gate(block, family.gate_module, spec, shape.num_experts_per_tok)


def take_gate(block: nn.Module, path: str, spec: GateSpec, top_k: int) -> Gate:
    """Remove transformers' gate at ``path`` of ``block``; returns a gate with its weights."""
    parent, _, name = path.rpartition(".")
    taken: Any = block.get_submodule(path)
    weight, bias = taken.weight, getattr(taken, "bias", None)
    correction = getattr(taken, "e_score_correction_bias", None)
    delattr(block.get_submodule(parent), name)
    if can_choose(spec, weight):
        return NativeGate(spec, top_k, weight, bias, correction)
    # Widened once, not in each step as transformers does.
    weight = weight.float() if "logits" in spec.float32 else weight
    if can_multiply(weight):
        product = NativeLinear(weight, bias)
        return Gate(spec, top_k, product, correction, has_native_logits=True)
    return Gate(spec, top_k, partial(functional.linear, weight=weight, bias=bias), correction)


def is_wholly_native(model: nn.Module, halves: Sequence[AttentionHalf]) -> bool:
    """Return whether native code computes all of a model, after :func:`take_native`.

    ``halves`` are the attention halves that it gave.
    """
    return bool(halves) and all(isinstance(gate, NativeGate) for gate in _gates(model))


def has_torch_products(model: nn.Module) -> bool:
    """Return whether torch multiplies rows by weights in a model, after :func:`take_native`.

    The bits of such a product depend on the number of rows.
    """
    layers = nn.Linear, HeadsLinear
    are_torch = any(isinstance(module, layers) for module in model.modules())
    return are_torch or not all(gate.has_native_logits for gate in _gates(model))


def _gates(model: nn.Module) -> list[Gate]:
    experts = [module for module in model.modules() if isinstance(module, RemoteExperts)]
    return [module.gate for module in experts if module.gate is not None]


def embedding_of(base: Any) -> Map:
    """Return the token embedding of transformers' base model."""
    embedding: Any = base.get_input_embeddings()
    if type(embedding) is nn.Embedding:
        return partial(torch.embedding, embedding.weight.detach())
    module: Map = embedding
    return module


def norm_of(base: Any) -> Map:
    """Return the norm after the last layer."""
    norm: Any = base.norm_f if hasattr(base, "norm_f") else base.norm
    module: Map = norm.forward if isinstance(norm, NativeNorm) else norm  # it has no hooks
    return module


def head_of(model: Any) -> Map:
    """Return the output head, which maps hidden states [R, H] to logits [R, V].

    Grok-1 scales them.
    """
    return scaled_head(model.get_output_embeddings(), model.config)


def scaled_head(head: Any, config: Any) -> Map:
    """Return an output head with the scale that a configuration of transformers says."""
    product: Map = head
    if isinstance(head, NativeLinear):
        product = partial(head.product, dtype=torch.float32)
    scale: float = getattr(config, "output_multiplier_scale", 1.0)
    return product if scale == 1.0 else lambda hidden_states: product(hidden_states) * scale


def take_native(model: Any, activation: str) -> tuple[list[AttentionHalf], Rotate]:
    """Make native code compute whatever it can of a model on a CPU.

    Linear layers, norms and dense MLPs with ``activation`` are replaced in ``model``. Returns the
    attention halves and the rotary embedding where every layer is native; the modules are taken out
    of ``model``. Returns no halves and the model's own rotary embedding elsewhere.
    """
    base: Any = model.base_model
    halves: list[AttentionHalf] = []
    rotate: Rotate = base.rotary_emb
    found = [(layer, _attention_parts(layer)) for layer in modules_of_layers(base)]
    if all(
        parts[2] is None and has_llamas_shape(*_modules(layer, parts)) for layer, parts in found
    ):
        for layer, parts in found:
            half = NativeAttentionHalf(*_modules(layer, parts))
            halves.append(half)
            for path in filter(None, parts):
                parent, _, name = path.rpartition(".")
                delattr(layer.get_submodule(parent), name)
        rotate = NativeRotation(rotate, half.head_size)
    # Only the parents: a list of all modules would keep each replaced weight until the last one.
    for module in [parent for parent in model.modules() if any(True for _ in parent.children())]:
        for name, child in list(module.named_children()):
            if isinstance(child, HeadsLinear) and can_multiply(child.weight):
                setattr(module, name, NativeLinear(child.weight))
            elif name == _SHARE and is_linear(child):
                setattr(module, name, NativeShare(child.weight))
    rotate_by_real_products(model)
    replace_modules(model, activation)
    return halves, rotate


def layers_of(
    base: Any,
    halves: Sequence[AttentionHalf],
    layers: ExpertLayers,
    staging: Staging | None,
) -> list[DecoderLayer]:
    """Return the decoder's layers, made of the modules of transformers' base model.

    ``halves`` are the attention halves; where there are none, torch's are made.
    """
    return [
        decoder_layer(layer, halves[index] if halves else torch_attention(layer), layers, staging)
        for index, layer in enumerate(modules_of_layers(base))
    ]


def decoder_layer(
    layer: nn.Module, half: AttentionHalf, layers: ExpertLayers, staging: Staging | None
) -> DecoderLayer:
    """Return a layer of an attention half and of the other modules of transformers' layer."""
    is_native = isinstance(half, NativeAttentionHalf)
    return DecoderLayer(
        half,
        feed_forward_half(layer, layers, staging),
        getattr(layer, _OUTPUT_NORM, None),
        partial(attend_wanted, half) if is_native else None,  # type: ignore[arg-type]
    )


def torch_attention(layer: nn.Module) -> TorchAttention:
    """Return the attention half of a layer, by its modules."""
    norm, attention, output_norm, normed = _attention_parts(layer)
    return TorchAttention(
        layer.get_submodule(norm),
        layer.get_submodule(attention),
        None if output_norm is None else layer.get_submodule(output_norm),
        layer.get_submodule(normed),
    )


def modules_of_layers(base: Any) -> nn.ModuleList:
    """Return the layers of transformers' base model."""
    found: nn.ModuleList = base.blocks if hasattr(base, "blocks") else base.layers
    return found


def _attention_parts(layer: nn.Module) -> tuple[str, str, str | None, str]:
    """Return the names of the parts of a layer's attention half."""
    paths = {path for path, _ in layer.named_modules()}
    for names in _ATTENTION_PARTS:
        if paths.issuperset(name for name in names if name is not None):
            return names
    raise CheckpointError(f"a layer of class {type(layer).__name__} has unknown parts")


def _modules(
    layer: nn.Module, parts: tuple[str, str, str | None, str]
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return the norm, the attention and the norm of the feed-forward half of a layer."""
    norm, attention, _, normed = parts
    return layer.get_submodule(norm), layer.get_submodule(attention), layer.get_submodule(normed)


def feed_forward_half(
    layer: nn.Module, layers: ExpertLayers, staging: Staging | None
) -> FeedForwardHalf:
    """Return the feed-forward half of a layer, with experts or without."""
    parts: Iterator[Any] = (getattr(layer, name, None) for name in _FEED_FORWARD_PARTS)
    block: Any = next(part for part in parts if part is not None)
    experts = getattr(block, "experts", None)
    if experts is None:
        return DenseFeedForward(block)
    return MoEFeedForward(experts.layer_id, experts.gate, layers, _shared(block), staging)


def _shared(block: Any) -> Map | None:
    """Return the shared expert of a mixture's module; ``None`` where it has none."""
    if hasattr(block, "shared_experts"):  # DeepSeek's
        shared: Map = block.shared_experts
        return shared
    if hasattr(block, "shared_expert"):  # Qwen2-MoE's
        gate: Any = getattr(block, _SHARE)
        share = (
            gate if isinstance(gate, NativeShare) else lambda rows: functional.sigmoid(gate(rows))
        )
        return _GatedExpert(block.shared_expert, share)
    return None


class _GatedExpert:
    """A shared expert whose output each token weights."""

    def __init__(self, expert: Map, share: Map) -> None:
        self._expert = expert
        self._share = share

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self._expert(hidden_states)
        return self._share(hidden_states) * output


class DenseFeedForward:
    """The feed-forward half of a layer without experts."""

    def __init__(self, mlp: Map) -> None:
        """``mlp`` computes the output."""
        self._mlp = mlp

    def begin(self, normed: torch.Tensor, context: StepContext, tokens: Tokens) -> torch.Tensor:
        """See :class:`FeedForwardHalf`; computes the output."""
        return self._mlp(normed)

    def finish(self, begun: torch.Tensor) -> torch.Tensor:
        """See :class:`FeedForwardHalf`."""
        return begun

    def abandon(self, begun: torch.Tensor) -> None:
        """See :class:`FeedForwardHalf`; nothing is under way."""
