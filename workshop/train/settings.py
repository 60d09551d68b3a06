"""The settings of a training run: a YAML file, validated before any work begins."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from cluster.errors import ConfigError, ExpertMeshError
from router.config.deployment import read_document

DenseSize = Literal["active", "total"]


class TrainingError(ConfigError):
    """A training run is refused; the message says what was given and what is allowed."""


class TrainingFailedError(ExpertMeshError):
    """A valid training run has failed; the message says what to do."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Settings):
    """Sizes of the Mixtral model, named as in transformers' `MixtralConfig`.

    A model with a single expert is dense: each token takes that expert.
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    num_local_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    max_position_embeddings: PositiveInt
    rope_theta: PositiveFloat

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice "
                f"num_attention_heads {self.num_attention_heads} (rotary halves)"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must be at most "
                f"num_local_experts {self.num_local_experts}"
            )
        return self


class GroupSettings(_Settings):
    """GShard's controls in training (Lepikhin et al. 2020, section 2.2).

    In each group of `tokens` an expert takes at most `capacity_factor` times an equal share of the
    choices. A choice beyond that adds nothing to the layer's output. With `random_second` a token
    takes its second expert with a probability of twice that expert's weight.
    """

    tokens: PositiveInt
    capacity_factor: PositiveFloat
    random_second: bool = False


class GatingSettings(_Settings):
    """Noisy top-k gating and the weights of its balancing losses (Shazeer et al. 2017)."""

    noisy: bool
    importance_weight: NonNegativeFloat
    load_weight: NonNegativeFloat
    groups: GroupSettings | None = None

    @model_validator(mode="after")
    def _load_needs_noise(self) -> Self:
        if self.load_weight and not self.noisy:
            raise ValueError(
                f"load_weight {self.load_weight} needs noisy: true; "
                "without noise the load has no gradient, so give 0"
            )
        return self


class OptimizationSettings(_Settings):
    """Batches and steps; the learning rate rises linearly at first, then falls along a cosine."""

    sequence_length: int = Field(ge=2)
    batch_size: PositiveInt
    steps: PositiveInt
    learning_rate: PositiveFloat
    final_learning_rate: NonNegativeFloat
    warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat
    checkpoint_every_steps: PositiveInt

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}"
            )
        return self


class CardSettings(_Settings):
    """The part of the model card that a person writes: a name, the texts and their commands."""

    name: str
    text: str
    text_commands: str


class TrainingConfig(_Settings):
    """A training run; on one thread it and the texts determine each weight."""

    seed: NonNegativeInt
    holdout_every_blocks: int = Field(ge=2)
    model: ModelSettings
    gating: GatingSettings
    optimization: OptimizationSettings
    card: CardSettings

    @model_validator(mode="after")
    def _sequence_fits(self) -> Self:
        if self.optimization.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"sequence_length {self.optimization.sequence_length} must be at most "
                f"max_position_embeddings {self.model.max_position_embeddings}"
            )
        return self

    @model_validator(mode="after")
    def _noise_needs_a_choice(self) -> Self:
        model = self.model
        if self.gating.noisy and model.num_experts_per_tok == model.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok {model.num_experts_per_tok} of num_local_experts "
                f"{model.num_local_experts} leaves no choice; give gating noisy: false and "
                "load_weight: 0, or more experts"
            )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        groups = self.gating.groups
        if groups is None:
            return self
        step_tokens = self.optimization.batch_size * self.optimization.sequence_length
        if step_tokens % groups.tokens:
            raise ValueError(
                f"gating.groups.tokens {groups.tokens} must divide batch_size times "
                f"sequence_length, {step_tokens}"
            )
        if groups.random_second and self.model.num_experts_per_tok != 2:
            raise ValueError(
                "gating.groups.random_second needs num_experts_per_tok 2 "
                f"(given: {self.model.num_experts_per_tok})"
            )
        return self

    def recipe(self) -> dict[str, Any]:
        """Return the settings that determine the weights: all but the card."""
        return self.model_dump(exclude={"card"}, exclude_none=True)

    def as_dense(self, size: DenseSize) -> Self:
        """Return the same run of a dense model, its feed-forward as wide as several experts.

        `active`: as wide as the experts of a token; `total`: as wide as all experts of a layer.
        """
        model = self.model
        width = model.num_experts_per_tok if size == "active" else model.num_local_experts
        changed = {
            **self.model_dump(),
            "model": {
                **model.model_dump(),
                "intermediate_size": width * model.intermediate_size,
                "num_local_experts": 1,
                "num_experts_per_tok": 1,
            },
            "gating": {"noisy": False, "importance_weight": 0, "load_weight": 0},
            "card": {**self.card.model_dump(), "name": f"{self.card.name}-dense-{size}"},
        }
        return type(self).model_validate(changed)


def load_config(path: Path, sizes: ModelSettings | None = None) -> TrainingConfig:
    """Read and validate a training configuration.

    ``sizes`` are those of a model at which the run starts; ``model`` may be left out then.
    Raises ConfigError for a file that is no YAML, and TrainingError that names the file and each
    offending key, or the first size that is another than the model's.
    """
    try:
        document = read_document(path)
        if sizes is not None and isinstance(document, dict):
            document.setdefault("model", sizes.model_dump())
        config = TrainingConfig.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'the file'}: {item['msg']}"
            for item in error.errors()
        )
        raise TrainingError(f"{path}: {problems}") from error
    if sizes is not None:
        for name, size in sizes.model_dump().items():
            given = getattr(config.model, name)
            if given != size:
                raise TrainingError(
                    f"{path}: model.{name} is {given}, and that of --from is {size}"
                )
    return config
