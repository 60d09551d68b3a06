"""Counts the parameters of a Mixture-of-Experts model from its configuration: pure functions.

The counts are the sizes of the tensors in a checkpoint of the model's family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.checkpoint.config import checked_shape, family_of, usual_config, wrong_kinds
from router.model.memory import RouterSizes, router_sizes


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The parameters of a model, by the process that holds them.

    ``router`` has the sizes of everything outside the routed experts. ``lookup_parameters`` of its
    parameters belong to the embedding, of which a token reads a single row. ``expert_parameters``
    belong to one routed expert, of inner size ``intermediate_size``.
    """

    model_type: str
    num_layers: int
    num_moe_layers: int
    num_experts: int
    num_experts_per_tok: int
    router: RouterSizes
    lookup_parameters: int
    expert_parameters: int
    intermediate_size: int
    max_position_embeddings: int

    @property
    def router_parameters(self) -> int:
        """All parameters outside the routed experts."""
        return self.router.parameters

    @property
    def cache_values_per_token(self) -> int:
        """The values that the key/value cache stores for a token in all layers."""
        return self.router.num_layers * self.router.cached_head_values

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
    with wrong_kinds(file):
        router = router_sizes(family, config)
    is_tied = bool(config.get("tie_word_embeddings"))
    return ModelShape(
        model_type=family.model_type,
        num_layers=router.num_layers,
        num_moe_layers=len(shape.layers),
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_tok,
        router=router,
        lookup_parameters=0 if is_tied else config["vocab_size"] * shape.hidden_size,
        expert_parameters=shape.expert_parameters,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=config["max_position_embeddings"],
    )
