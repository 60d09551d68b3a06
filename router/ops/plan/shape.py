"""Counts the parameters of a Mixture-of-Experts model from its configuration: pure functions.

The counts are the sizes of the tensors in a checkpoint of the model's family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from experts.checkpoint.config import checked_shape, family_of, usual_config, wrong_kinds


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The parameters of a model, by the process that holds them.

    ``router_parameters`` are all parameters outside the routed experts. ``lookup_parameters`` of
    them belong to the embedding, of which a token reads a single row. ``expert_parameters`` belong
    to one routed expert. ``cache_values_per_token`` is the number of values that the key/value
    cache stores for a token in all layers.
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
        """Parameters in the computation of one token."""
        chosen = self.num_moe_layers * self.num_experts_per_tok * self.expert_parameters
        return self.router_parameters - self.lookup_parameters + chosen


def shape_of(given: Mapping[str, Any], where: str) -> ModelShape:
    """Count the parameters that a configuration describes.

    Raises :class:`CheckpointError` naming ``where`` for a family that is not served, and for a size
    that is missing or no positive integer.
    """
    file = Path(where)
    family = family_of(dict(given), file)
    config = usual_config(family, dict(given), file)
    shape = checked_shape(family, config, file)
    layers = config["num_hidden_layers"]
    with wrong_kinds(file):
        dense, cache_values = family.dense_tensors(config), family.cache_values(config)
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
        cache_values_per_token=layers * cache_values,
        max_position_embeddings=config["max_position_embeddings"],
    )
