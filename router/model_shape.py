"""How many parameters the parts of a Mixture-of-Experts model have, from its configuration: pure.

For :mod:`router.plan`, which plans models of more families than are served. A family's function
counts what its class in transformers has (Grok-1's: its makers' code).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from experts.checkpoint import checked_shape, usual_config
from experts.families import FAMILIES, Family
from experts.families.base import Config


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Parameters of a model by who holds them.

    ``router_parameters`` are all but the routed experts': ``lookup_parameters`` of them are an
    embedding of which a token takes one row and computes with no other. ``expert_parameters`` are
    one routed expert's. ``cache_values_per_token`` are the numbers that the key/value cache keeps
    of a token in all layers.
    """

    model_type: str
    num_layers: int
    num_moe_layers: int
    num_experts: int
    num_experts_per_tok: int
    router_parameters: int
    lookup_parameters: int
    expert_parameters: int
    cache_values_per_token: int
    max_position_embeddings: int

    @property
    def num_all_experts(self) -> int:
        """Routed experts of all layers."""
        return self.num_moe_layers * self.num_experts

    @property
    def total_parameters(self) -> int:
        """All parameters of the model."""
        return self.router_parameters + self.num_all_experts * self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token computes with."""
        chosen = self.num_moe_layers * self.num_experts_per_tok * self.expert_parameters
        return self.router_parameters - self.lookup_parameters + chosen


def shape_of(config: Mapping[str, Any], where: str) -> ModelShape:
    """Count the parameters that a configuration describes.

    Raises :class:`CheckpointError` naming ``where`` for a family that is not known here, and for
    sizes that are missing or no positive integers.
    """
    model_type = str(config.get("model_type"))
    if model_type in FAMILIES:
        return _of_family(FAMILIES[model_type], dict(config), Path(where))
    if model_type not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES.keys() | FAMILIES.keys()))
        raise CheckpointError(f"unknown model_type {model_type!r}; known: {known}", where)
    sizes = _Sizes(config, where)
    parts = _FAMILIES[model_type](sizes)
    hidden, layers = sizes("hidden_size"), sizes("num_hidden_layers")
    table = sizes("vocab_size") * hidden
    is_tied = sizes.says("tie_word_embeddings")
    moe_layers = layers - parts.num_dense_layers
    moe_layer = parts.num_experts * hidden + parts.moe_layer_extras  # the gate, and what else
    router = table * (1 if is_tied else 2) + hidden  # the last norm
    router += layers * (parts.attention.parameters + parts.norms)
    router += moe_layers * moe_layer + parts.num_dense_layers * parts.dense_layer_extras
    return ModelShape(
        model_type=model_type,
        num_layers=layers,
        num_moe_layers=moe_layers,
        num_experts=parts.num_experts,
        num_experts_per_tok=sizes("num_experts_per_tok"),
        router_parameters=router,
        lookup_parameters=0 if is_tied else table,
        expert_parameters=parts.expert_parameters,
        cache_values_per_token=layers * parts.attention.cache_values,
        max_position_embeddings=sizes("max_position_embeddings"),
    )


def _of_family(family: Family, given: Config, file: Path) -> ModelShape:
    """Count the tensors of a family that is served."""
    config = usual_config(family, given, file)
    shape = checked_shape(family, config, file)
    dense, layers = family.dense_tensors(config), config["num_hidden_layers"]
    is_tied = bool(config.get("tie_word_embeddings"))
    return ModelShape(
        model_type=family.model_type,
        num_layers=layers,
        num_moe_layers=len(shape.layers),
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_tok,
        router_parameters=sum(prod(size) for size in dense.values()),
        lookup_parameters=0 if is_tied else config["vocab_size"] * shape.hidden_size,
        expert_parameters=shape.expert_parameters,
        cache_values_per_token=layers * family.cache_values(config),
        max_position_embeddings=config["max_position_embeddings"],
    )


class _Sizes:
    """A configuration whose sizes are checked as they are read."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self._where = where

    def __call__(self, key: str, default: int | None = None) -> int:
        value = self._config.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            given = f"{key} must be a positive integer (given: {value!r:.40})"
            raise CheckpointError(given, self._where)
        return value

    def says(self, key: str) -> bool:
        """Return whether ``key`` has a value other than false, zero and nothing."""
        return bool(self._config.get(key))


@dataclass(frozen=True, slots=True)
class _Attention:
    """One layer's parameters, and the numbers that it caches of a token."""

    parameters: int
    cache_values: int


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a family has in one layer; ``norms`` and attention are in every layer."""

    attention: _Attention
    norms: int
    num_experts: int
    expert_parameters: int
    moe_layer_extras: int = 0
    num_dense_layers: int = 0
    dense_layer_extras: int = 0


def _grouped_query(sizes: _Sizes) -> tuple[_Attention, int, int]:
    """Count grouped-query attention (Ainslie et al. 2023): (attention, query size, key size)."""
    hidden, heads = sizes("hidden_size"), sizes("num_attention_heads")
    head_dim = sizes("head_dim", max(1, hidden // heads))
    queries, keys = heads * head_dim, sizes("num_key_value_heads", heads) * head_dim
    return _Attention(2 * hidden * (queries + keys), 2 * keys), queries, keys


def _mixtral(sizes: _Sizes) -> _Parts:
    hidden, inner = sizes("hidden_size"), sizes("intermediate_size")
    attention, _, _ = _grouped_query(sizes)
    return _Parts(attention, 2 * hidden, sizes("num_local_experts"), 3 * hidden * inner)


def _grok_1(sizes: _Sizes) -> _Parts:
    return replace(_mixtral(sizes), norms=4 * sizes("hidden_size"))


def _gpt_oss(sizes: _Sizes) -> _Parts:
    """All layers are counted as caching every token, those with a sliding window too."""
    hidden, inner = sizes("hidden_size"), sizes("intermediate_size")
    attention, queries, keys = _grouped_query(sizes)
    biases, sinks = queries + 2 * keys + hidden, sizes("num_attention_heads")
    num_experts = sizes("num_local_experts")
    return _Parts(
        replace(attention, parameters=attention.parameters + biases + sinks),
        2 * hidden,
        num_experts,
        3 * hidden * inner + 2 * inner + hidden,
        moe_layer_extras=num_experts,  # the gate's bias
    )


def _deepseek_v3(sizes: _Sizes) -> _Parts:
    """Multi-head latent attention caches one latent and one rotary key of a token in a layer."""
    hidden, inner = sizes("hidden_size"), sizes("moe_intermediate_size")
    num_dense = sizes("first_k_dense_replace") if sizes.says("first_k_dense_replace") else 0
    num_experts = sizes("n_routed_experts")
    shared = sizes("n_shared_experts") if sizes.says("n_shared_experts") else 0
    return _Parts(
        _latent(sizes),
        2 * hidden,
        num_experts,
        3 * hidden * inner,
        moe_layer_extras=num_experts + shared * 3 * hidden * inner,  # correction bias, shared
        num_dense_layers=num_dense,
        dense_layer_extras=3 * hidden * sizes("intermediate_size") if num_dense else 0,
    )


def _latent(sizes: _Sizes) -> _Attention:
    """Count multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434)."""
    hidden, heads = sizes("hidden_size"), sizes("num_attention_heads")
    plain, rotary, value = (
        sizes(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    latent, queries = sizes("kv_lora_rank"), heads * (plain + rotary)
    if sizes.says("q_lora_rank"):
        rank = sizes("q_lora_rank")
        query = hidden * rank + rank + rank * queries
    else:
        query = hidden * queries
    keys_and_values = hidden * (latent + rotary) + latent + latent * heads * (plain + value)
    return _Attention(query + keys_and_values + heads * value * hidden, latent + rotary)


_FAMILIES: dict[str, Callable[[_Sizes], _Parts]] = {
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "grok-1": _grok_1,
}
