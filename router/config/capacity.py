"""The ``expert_capacity:`` section; part of :mod:`router.config.deployment`."""

from __future__ import annotations

from pydantic import Field, model_validator

from router.section import Section


class CapacityConfig(Section):
    """Bounds the tokens of a step that one expert takes.

    A token for which an expert has no room goes to its next expert in line, and the reply is not
    ``exact`` (GShard, Lepikhin et al. 2020, section 2.2). Exactly one of the two keys is given.
    """

    factor: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Multiple of the tokens that each expert takes when all loads are equal.",
    )
    tokens: int | None = Field(default=None, ge=1, description="Number of tokens.")

    @model_validator(mode="after")
    def _has_one_key(self) -> CapacityConfig:
        if (self.factor is None) == (self.tokens is None):
            raise ValueError(
                "needs exactly one of factor and tokens "
                f"(given: factor {self.factor}, tokens {self.tokens})"
            )
        return self
