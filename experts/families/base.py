"""The description of a model family: its checkpoints, its experts and its gate.

Dimension letters: H hidden size, I intermediate size of one expert, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Config = dict[str, Any]
"""A checkpoint's ``config.json``."""
Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by their names in the checkpoint."""

ACTIVATION_NAMES = ("gelu", "gelu_pytorch_tanh", "relu", "silu")
"""The values of ``hidden_act`` that experts compute, natively and by torch."""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The sizes of one model's experts; every layer in ``layers`` has experts of these sizes.

    ``has_biases`` is true for GPT-OSS: each of the three matrices has a bias, and the values
    between the matrices are clamped (:func:`experts.compute.ffn.clamped_ffn`).
    """

    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    activation: str
    has_biases: bool = False

    @property
    def expert_parameters(self) -> int:
        """Number of parameters of one expert."""
        biases = 2 * self.intermediate_size + self.hidden_size if self.has_biases else 0
        return 3 * self.hidden_size * self.intermediate_size + biases


@dataclass(frozen=True, slots=True)
class Part:
    """The place of one matrix or bias of an expert in the tensor ``name`` of ``shape``.

    The steps to the matrix follow in this order. ``rows`` (begin, end) selects rows of the first
    axis. ``stacked`` removes that axis: the tensor is a stack of all experts, and the selection has
    one. ``transposed`` swaps input and output. ``every`` (first, step) selects some of the rows.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    stacked: bool = False
    transposed: bool = False
    every: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """The places of one gated expert's matrices and biases.

    ``gate`` and ``up`` are [I, H], ``down`` is [H, I]: y = down(act(gate x) * up x). ``biases`` is
    empty or has the biases of the three matrices in this order.
    """

    gate: Part
    up: Part
    down: Part
    biases: tuple[Part, ...] = ()

    def parts(self) -> tuple[Part, ...]:
        """Return all matrices and biases."""
        return self.gate, self.up, self.down, *self.biases


@dataclass(frozen=True, slots=True)
class GateSpec:
    """The choice of K of E experts by their logits, and the weights of the chosen experts.

    ``score`` maps logits to scores: "softmax" over all experts, or "sigmoid" of each. The experts
    with the K largest scores are chosen, and the scores are the weights. With "softmax_of_chosen"
    the logits are the scores, and the weights are the softmax over the chosen K. ``renormalises``
    divides the weights by their sum, ``norm_exponent`` by their norm of that exponent.
    ``scaling_factor`` multiplies them.

    The experts form ``num_groups`` equal groups. Only experts of the ``topk_groups`` best groups
    are chosen, by the sum of a group's ``best_of_group`` largest scores. The results named in
    ``float32`` have that dtype also in a model of half precision. ``sorts`` puts the best expert
    first.
    """

    score: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    renormalises: bool = False
    norm_exponent: float | None = None
    scaling_factor: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    best_of_group: int = 1
    float32: tuple[Literal["logits", "scores", "weights"], ...] = ("scores",)
    sorts: bool = True

    @property
    def weights_are_of_all(self) -> bool:
        """Whether the weight of an expert does not depend on the other chosen experts."""
        is_divided = self.renormalises or self.norm_exponent is not None
        return self.score == "softmax" and not is_divided


def size(config: Config, key: str, default: int | None = None) -> int:
    """Return a size in a configuration, or ``default`` where it is missing.

    Raises ``KeyError`` without a default, and ``ValueError`` with the key for any value but a
    positive integer.
    """
    value = config.get(key)
    if value is None:
        if default is None:
            raise KeyError(key)
        return default
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} must be a positive integer (given: {value!r:.40})")
    return value


def head_sizes(config: Config) -> tuple[int, int, int]:
    """Return the numbers of query heads and key/value heads, and the size of a head."""
    heads = size(config, "num_attention_heads")
    kv_heads = size(config, "num_key_value_heads", heads)
    return heads, kv_heads, size(config, "head_dim", max(1, config["hidden_size"] // heads))


def _keys_and_values(config: Config) -> int:
    _, kv_heads, head_size = head_sizes(config)
    return 2 * kv_heads * head_size


@dataclass(frozen=True, slots=True)
class Family:
    """One family's checkpoints, and the place of its experts in transformers' class.

    ``experts_class`` names the class of transformers that the router replaces by a class without
    parameters. It is ``None`` for a model class of ExpertMesh, which has that class. ``gate``
    describes the gate, whose parameters are those of ``gate_module`` in the same block.

    ``dense_tensors`` returns the name and shape of every tensor that a router needs, and
    ``expert_tensors`` those of one expert of a layer. Together they are the whole checkpoint.
    ``stacks_experts`` is true where a layer's experts share their tensors.

    ``usual`` renames the keys of a configuration to those of the other families, and all other
    functions take its result. ``transformers_config`` returns the arguments of transformers'
    configuration. ``options`` has the served values of keys that also have other values.
    ``cache_values`` returns how many numbers a layer's attention keeps of a token.
    ``caches_latents`` is true where these are latents, from which keys and values are computed
    (:mod:`router.model.attention.latent`). ``caps_scores`` is true where attention's scores are
    capped or its heads have sinks. Tensors with a suffix in ``in_float32`` may be float32
    beside others of half precision. Tensors with a prefix of ``ignored`` are allowed and not read.
    ``module_names`` maps a checkpoint's names to the model's names where these differ.
    ``count_keys`` are the keys of ``config.json`` for the number of a layer's experts, and
    ``top_k_keys`` those for the number of a token's; a dot leads into a part.
    """

    model_type: str
    architectures: tuple[str, ...]
    experts_class: str | None
    expert_shape: Callable[[Config], ExpertShape]
    expert_tensors: Callable[[Config, int, int], ExpertTensors]
    dense_tensors: Callable[[Config], Shapes]
    gate: Callable[[Config], GateSpec]
    gate_module: str = "gate"
    stacks_experts: bool = False
    usual: Callable[[Config], Config] = lambda config: config
    transformers_config: Callable[[Config], Config] = lambda config: config
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    cache_values: Callable[[Config], int] = _keys_and_values
    caches_latents: bool = False
    caps_scores: bool = False
    in_float32: tuple[str, ...] = ()
    ignored: Callable[[Config], tuple[str, ...]] = lambda config: ()
    module_names: Callable[[Config], dict[str, str]] = lambda config: {}
    count_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok", "experts_per_token")

    def expert_parts(self, config: Config, shape: ExpertShape) -> Iterator[Part]:
        """Yield the parts of all experts, or of each layer's first where experts share tensors."""
        for layer_id in shape.layers:
            for expert_id in range(1 if self.stacks_experts else shape.num_experts):
                yield from self.expert_tensors(config, layer_id, expert_id).parts()
