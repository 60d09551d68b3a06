"""What a model family tells the rest of the system about its checkpoints.

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
"""The values of ``hidden_act`` that :mod:`experts.compute.ffn` computes; here, so that a checkpoint
can be checked without importing torch."""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Sizes of the mixture of one model; every layer listed in ``layers`` has the same experts.

    ``has_biases`` says that they are GPT-OSS's: each of the three matrices comes with a bias, and
    what is between them is clamped (:func:`experts.compute.ffn.clamped_ffn`).
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
        """Parameters of one expert."""
        biases = 2 * self.intermediate_size + self.hidden_size if self.has_biases else 0
        return 3 * self.hidden_size * self.intermediate_size + biases


@dataclass(frozen=True, slots=True)
class Part:
    """Where one matrix or bias of an expert lies: in a tensor, ``name``, of ``shape`` in all.

    ``rows`` (from, to) are those of the first axis that are the expert's; of a stack of all experts
    (``stacked``) that is one, and the axis goes. ``transposed`` matrices have input and output
    swapped. Of what is left, ``every`` (first, step) takes some of the rows.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    stacked: bool = False
    transposed: bool = False
    every: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """Where one gated expert's matrices lie, and its biases if it has any.

    ``gate`` and ``up`` are [I, H], ``down`` is [H, I]: y = down(act(gate x) * up x). ``biases`` are
    of the three in this order, or none.
    """

    gate: Part
    up: Part
    down: Part
    biases: tuple[Part, ...] = ()

    def parts(self) -> tuple[Part, ...]:
        """Return all that the expert is made of."""
        return self.gate, self.up, self.down, *self.biases


@dataclass(frozen=True, slots=True)
class GateSpec:
    """How a family's gate chooses K of E experts by their logits, and weights them.

    ``score`` makes scores of logits: "softmax" over all experts, or "sigmoid" of each. The experts
    of the K largest are chosen, and their scores are their weights. With "softmax_of_chosen" the
    logits are the scores, and the weights are the softmax over the K.
    ``renormalises`` divides weights by their sum, ``norm_exponent`` by their norm of that exponent;
    ``scaling_factor`` multiplies them.

    The experts form ``num_groups`` equal groups, and only the ``topk_groups`` best count, by the
    sum of their ``best_of_group`` largest scores. The results named in ``float32`` are so in a
    model of half precision, too. ``sorts`` puts the best expert first.
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
        """Whether a weight is a share of all experts, whichever of them are chosen."""
        is_divided = self.renormalises or self.norm_exponent is not None
        return self.score == "softmax" and not is_divided


def _as_it_is(config: Config) -> Config:
    return config


def size(config: Config, key: str, default: int | None = None) -> int:
    """Return a size that a configuration has; ``default`` is for one that may be left out.

    Raises ``KeyError``, and ``ValueError`` naming the key for what is no positive integer.
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
    """Return query heads, key/value heads and a head's size."""
    heads = size(config, "num_attention_heads")
    kv_heads = size(config, "num_key_value_heads", heads)
    return heads, kv_heads, size(config, "head_dim", max(1, config["hidden_size"] // heads))


def _keys_and_values(config: Config) -> int:
    _, kv_heads, head_size = head_sizes(config)
    return 2 * kv_heads * head_size


def _nothing(config: Config) -> tuple[str, ...]:
    return ()


def _no_other_names(config: Config) -> dict[str, str]:
    return {}


@dataclass(frozen=True, slots=True)
class Family:
    """How to read one family's checkpoints and where its experts sit in transformers' class.

    ``experts_module`` and ``experts_class`` name the class that the router replaces by a
    parameter-free one (``None`` where the model is our own, and has it already); ``gate`` describes
    the gate, whose parameters are those of ``gate_module`` in the same block.
    ``dense_tensors`` lists name and shape of every tensor that a router needs; together with
    ``expert_tensors`` (of a layer's expert) it is the whole checkpoint. ``stacks_experts`` says
    that a layer's experts share their tensors.

    ``usual`` gives a configuration the key names that the other families have; all functions here
    take it so. ``transformers_config`` is what transformers' configuration is made from.
    ``options`` are the values that are served of keys for which others exist. ``cache_values``
    counts the numbers that a layer's attention keeps of a token; ``caches_latents`` says that they
    are latents of which keys and values are made (:mod:`router.model.latent_attention`). Tensors
    whose names end by one of ``in_float32`` may be so beside others of half precision; those that
    begin by one of ``ignored`` may be there and are not read. ``module_names`` has what the model
    calls a tensor where the checkpoint calls it otherwise.
    """

    model_type: str
    architectures: tuple[str, ...]
    experts_module: str | None
    experts_class: str | None
    expert_shape: Callable[[Config], ExpertShape]
    expert_tensors: Callable[[Config, int, int], ExpertTensors]
    dense_tensors: Callable[[Config], Shapes]
    gate: Callable[[Config], GateSpec]
    gate_module: str = "gate"
    stacks_experts: bool = False
    usual: Callable[[Config], Config] = _as_it_is
    transformers_config: Callable[[Config], Config] = _as_it_is
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    cache_values: Callable[[Config], int] = _keys_and_values
    caches_latents: bool = False
    in_float32: tuple[str, ...] = ()
    ignored: Callable[[Config], tuple[str, ...]] = _nothing
    module_names: Callable[[Config], dict[str, str]] = _no_other_names

    def expert_parts(self, config: Config, shape: ExpertShape) -> Iterator[Part]:
        """Yield the parts of all experts; of experts that share their tensors, the first one's."""
        for layer_id in shape.layers:
            for expert_id in range(1 if self.stacks_experts else shape.num_experts):
                yield from self.expert_tensors(config, layer_id, expert_id).parts()
